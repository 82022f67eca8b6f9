"""What is kept of a model of timm: planned on the meta device before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from connectors.errors import VlmError
from connectors.tokens import Grid, VisualTokens
from vlm_encoders.encoders.timm_network import (
    REFUSALS,
    create_network,
    probe_layers,
    probe_network,
    refuse_machinery,
)
from vlm_encoders.encoders.trim import drop_parameters, park_parameters, trace_parameters
from vlm_encoders.spec import EncoderSpec

__all__ = ["Plan", "cut", "kept_network", "module_paths", "plan_network", "trim"]


@dataclass(frozen=True)
class Plan:
    """How a network is created and cut so that its tokens depend on all that is left.

    Attributes:
        options: arguments of `timm.create_model`, the depth included where it can be told.
        size: (height, width) that the network is built for, px; None for its own.
        places: the feature layers, counted from 0.
        grid: (rows, columns) that must be told where tokens are read without it; None for maps.
        idle: parameters that no token depends on, in modules that never run.
        parked: parameters that no token depends on, in modules that run all the same.
        layers: for each kept layer the paths of what it adds to those before.
    """

    options: dict[str, Any]
    size: Grid | None
    places: tuple[int, ...]
    grid: Grid | None
    idle: frozenset[str]
    parked: frozenset[str]
    layers: tuple[tuple[str, ...], ...]


def plan_network(spec: EncoderSpec) -> Plan:
    """Build the network without memory, cut it, and see which parameters its tokens depend on.

    Raises:
        VlmError: the network cannot be built so, or has no norm for one of the layers.
    """
    refuse_machinery(spec.name, dict(spec.options))
    places = tuple(spec.num_layers + layer for layer in spec.layers)
    options, size, network = _built(spec, places)
    try:
        with torch.enable_grad(), _watch(network) as run:
            kept, grid = probe_layers(network, spec.image_size, range(spec.kept_layers))
            used = probe_layers(network, spec.image_size, places, norm=True)[0] if spec.final_norm else []
    except REFUSALS as error:
        raise _refusal(spec, error) from error
    _check_tokens(spec, used or [kept[place] for place in places])
    added = trace_parameters(network, [(layer.tokens, layer.prefix) for layer in kept])
    for place, visual in zip(places, used, strict=False):
        _check_norm(spec, network, place, kept[place], visual)
    needed = used or [kept[place] for place in places]
    parts = [tensor for visual in needed for tensor in (visual.tokens, visual.prefix)]
    (reached,) = trace_parameters(network, [parts])
    idle = {name for name, _ in network.named_parameters()} - set(reached)
    parked = {name for name in idle if name.rpartition(".")[0] in run}
    plan = Plan(options, size, places, grid, frozenset(idle - parked), frozenset(parked), ())
    trim(network, plan)
    layers = tuple(_layer_paths(network, set(names) - idle, place) for place, names in enumerate(added))
    return replace(plan, layers=layers)


def kept_network(spec: EncoderSpec, plan: Plan) -> Any:
    """Create what the plan keeps; what timm builds as fixed, such as sines for places, stays so, in buffers."""
    network = create_network(spec.name, spec.source, plan.options, plan.size)
    trim(cut(network, plan.places, final_norm=spec.final_norm), plan)
    fixed = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    park_parameters(network, fixed, persistent=True)
    return network


def cut(network: Any, places: tuple[int, ...], *, final_norm: bool) -> Any:
    """Take what is behind the feature layers off, the head included, and the norm if it is not used."""
    network.prune_intermediate_layers(indices=sorted(places), prune_norm=not final_norm, prune_head=True)
    return network


def trim(network: Any, plan: Plan) -> None:
    """Leave no parameter that the tokens do not depend on."""
    park_parameters(network, plan.parked)
    drop_parameters(network, plan.idle)


def module_paths(network: nn.Module, names: set[str]) -> tuple[str, ...]:
    """Give the paths of the largest modules that hold these parameters alone, and of those left over."""
    found: list[str] = []
    for child, module in network.named_children():
        own = {f"{child}.{name}" for name, _ in module.named_parameters()}
        if own and own <= names:
            found.append(child)
        elif own & names:
            inner = {name.removeprefix(f"{child}.") for name in names if name.startswith(f"{child}.")}
            found.extend(f"{child}.{path}" for path in module_paths(module, inner))
    return (*found, *(name for name, _ in network.named_parameters(recurse=False) if name in names))


@contextmanager
def _watch(network: nn.Module) -> Iterator[set[str]]:
    """Collect the paths of the modules that run, the network's own among them."""
    run = {""}
    handles = [
        module.register_forward_hook(lambda *_, path=path: run.add(path)) for path, module in network.named_modules()
    ]
    yield run
    for handle in handles:
        handle.remove()


def _cut_copy(spec: EncoderSpec, options: dict[str, Any], size: Grid | None, places: tuple[int, ...]) -> Any:
    return cut(probe_network(spec.name, spec.source, options, size), places, final_norm=spec.final_norm)


def _built(spec: EncoderSpec, places: tuple[int, ...]) -> tuple[dict[str, Any], Grid | None, Any]:
    """Give options, size and the cut copy: not told its size if it takes the views as it is, and short if it can be."""
    options: dict[str, Any] = dict(spec.options)
    size = None
    network = _cut_copy(spec, options, None, places)
    if spec.image_size != spec.native_size and not _runs(network, spec, places):
        size = spec.image_size
        network = _cut_copy(spec, options, size, places)
    if spec.stages or spec.kept_layers == spec.num_layers:
        return options, size, network
    fewer = {**options, "depth": spec.kept_layers}
    try:
        shorter = _cut_copy(spec, fewer, size, places)
    except (VlmError, *REFUSALS):
        # Not all classes can be told their depth.
        return options, size, network
    return (fewer, size, shorter) if _shapes(shorter) == _shapes(network) else (options, size, network)


def _runs(network: Any, spec: EncoderSpec, places: tuple[int, ...]) -> bool:
    try:
        with torch.no_grad():
            probe_layers(network, spec.image_size, places)
    except REFUSALS:
        return False
    return True


def _refusal(spec: EncoderSpec, error: Exception) -> VlmError:
    reason = " ".join(str(error).split())[:200]
    if spec.image_size == spec.native_size:
        return VlmError(f"{spec.name}: timm cannot run it so ({reason}); leave final_norm and the options out")
    rows, columns = spec.image_size
    return VlmError(f"{spec.name}: cannot take views of {rows}x{columns} px ({reason}); leave image_size out")


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _check_tokens(spec: EncoderSpec, found: list[VisualTokens]) -> None:
    """Hold what is measured to what the spec foretells, before anything real is built."""
    expected, first = spec.token_spec(), found[0].spec
    width = sum(visual.spec.dim for visual in found)
    if (first.grid, first.num_prefix, width) != (expected.grid, expected.num_prefix, expected.dim):
        raise VlmError(
            f"{spec.name}: at {spec.image_size[0]}x{spec.image_size[1]} px timm's {spec.source} gives a grid of "
            f"{first.grid} and {first.num_prefix} prefix tokens of width {width}, its spec says {expected.grid}, "
            f"{expected.num_prefix} and {expected.dim}; leave image_size and the options out"
        )


def _check_norm(spec: EncoderSpec, network: nn.Module, place: int, plain: VisualTokens, normed: VisualTokens) -> None:
    before, after = (set(trace_parameters(network, [(one.tokens, one.prefix)])[0]) for one in (plain, normed))
    if after <= before:
        kind, layer = type(network).__name__, place - spec.num_layers
        raise VlmError(f"{spec.name}: timm's {kind} has no norm for layer {layer}; pass final_norm=False")


def _layer_paths(network: Any, names: set[str], place: int) -> tuple[str, ...]:
    """Give the modules of a layer; the first one's own alone, without the stem in front of it."""
    if place == 0 and isinstance(getattr(network, "feature_info", None), list):
        named = network.feature_info[0].get("module")
        own = {name for name in names if named and name.startswith(f"{named}.")}
        names = own or names
    return module_paths(network, names)
