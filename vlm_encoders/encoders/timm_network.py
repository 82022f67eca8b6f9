"""timm's networks as all of its classes offer them: created at a size, and read at several layers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from connectors.errors import VlmError
from connectors.tokens import Grid, VisualTokens

__all__ = [
    "REFUSALS",
    "create_network",
    "probe_layers",
    "probe_network",
    "read_arguments",
    "read_layers",
    "refuse_machinery",
    "set_attention",
]

REFUSALS = (AssertionError, ValueError, RuntimeError, IndexError, TypeError, ZeroDivisionError)
"""How timm's classes refuse a size or an option: each in its own way."""


# What timm's factory takes besides the arguments of a model: weights and forms that are chosen here.
_MACHINERY = frozenset(
    {
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn"),
        *("pretrained_model_args", "checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit", "pruned"),
        *("features_only", "out_indices", "feature_cfg", "feature_cls", "device", "dtype"),
    }
)


def refuse_machinery(name: str, options: Mapping[str, object]) -> None:
    """Refuse the options that timm's factory keeps for itself.

    Raises:
        VlmError: there is one of them.
    """
    found = sorted(_MACHINERY.intersection(options))
    if found:
        raise VlmError(f"{name}: {found[0]} is of timm's factory, not of the model; leave the option out")


def create_network(name: str, source: str, options: dict[str, Any], size: Grid | None = None) -> Any:
    """Create a model of timm without its head, in eval mode, on torch's current device.

    Args:
        name: the encoder's, for messages.
        source: the model's, with its tag.
        options: arguments of `timm.create_model`; `attn_implementation` is applied here.
        size: (height, width) of a view, px; None for the model's own. Models that take
            pixels of any size need not be told.

    Raises:
        VlmError: timm cannot build the model with these options, or at this size.
    """
    import timm

    options = {"num_classes": 0, **options}
    attention = options.pop("attn_implementation", None)
    sized = options if size is None else {**options, "img_size": size}
    try:
        network = timm.create_model(source, **sized)
    except TypeError as error:
        if size is not None and "'img_size'" in str(error):
            return create_network(name, source, {**options, "attn_implementation": attention})
        raise VlmError(f"{name}: timm cannot build it so ({error}); leave the option out") from error
    except (AssertionError, ValueError, RuntimeError, IndexError) as error:
        if size is None:
            raise
        rows, columns = size
        raise VlmError(f"{name}: cannot take views of {rows}x{columns} px: {error}; leave image_size out") from error
    if attention is not None:
        set_attention(network, attention, name)
    return network.eval()


def set_attention(network: Any, attention: object, name: str) -> None:
    """Let attention run fused ("sdpa") or spelled out ("eager"), in all modules that have both.

    Raises:
        VlmError: there is no such way, or no module with a choice.
    """
    if attention not in {"sdpa", "eager"}:
        raise VlmError(f"{name}: timm has no attn_implementation '{attention}'; use sdpa or eager")
    modules = [module for module in network.modules() if hasattr(module, "fused_attn")]
    if not modules:
        raise VlmError(
            f"{name}: timm's {type(network).__name__} has one attention alone; leave attn_implementation out"
        )
    for module in modules:
        module.fused_attn = attention == "sdpa"


def probe_layers(
    network: Any, size: Grid, places: Sequence[int], *, norm: bool = False
) -> tuple[list[VisualTokens], Grid | None]:
    """Read layers of one empty view of this size (px), on the network's own device.

    Returns:
        The tokens, and the grid that must be told where the class counts it from pixels,
        which the meta device does not have; None for maps.
    """
    pixels = torch.zeros(1, 3, *size, device=next(network.parameters()).device)
    try:
        return read_layers(network, pixels, places, norm=norm), None
    except RuntimeError as error:
        if "meta tensors" not in str(error):
            raise
    stride = network.feature_info[-1]["reduction"]
    grid = (size[0] // stride, size[1] // stride)
    return read_layers(network, pixels, places, norm=norm, grid=grid), grid


def probe_network(name: str, source: str, options: dict[str, Any], size: Grid | None = None) -> Any:
    """Create a copy to be probed, as `create_network` does: without memory, where that is quick."""
    try:
        with torch.device("meta"):
            network = create_network(name, source, options, size)
    except REFUSALS as error:
        if not options or size is not None:
            raise
        reason = " ".join(str(error).split())[:300]
        raise VlmError(f"{name}: timm cannot build it so ({reason}); leave the options out") from error
    if any(isinstance(module, nn.RNNBase) for module in network.modules()):
        # The meta device unrolls an LSTM step by step in Python: 20 s for one view of Sequencer.
        with torch.device("cpu"), torch.random.fork_rng():
            network = create_network(name, source, options, size)
    return network.requires_grad_(requires_grad=True)


def read_layers(
    network: Any,
    pixels: Tensor,
    places: Sequence[int],
    *,
    norm: bool = False,
    grid: Grid | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> list[VisualTokens]:
    """Run the network once and take the tokens of several layers.

    Args:
        network: any model of timm.
        pixels: (B, 3, height, width).
        places: layers, counted from 0, in the order wanted.
        norm: whether the class's own last norm is applied to each layer that it fits.
        grid: (rows, columns) of all layers, for a class that is read as "NLC"; None for maps.
        arguments: what `read_arguments` gave, to spare each call the look at the class.

    Returns:
        The tokens with their grid, prefix tokens apart where the class gives them.
    """
    if arguments is None:
        arguments = read_arguments(network, norm=norm, grid=grid)
    # timm gives layers in their order in the network, whatever the order asked for.
    order = sorted(set(places))
    found = dict(zip(order, network.forward_intermediates(pixels, indices=order, **arguments), strict=True))
    return [_tokens(found[place], grid) for place in places]


def read_arguments(network: Any, *, norm: bool = False, grid: Grid | None = None) -> dict[str, Any]:
    """Give the arguments with which the network's class is to be read, `norm` and `grid` as in `read_layers`."""
    offered = inspect.signature(network.forward_intermediates).parameters
    arguments: dict[str, Any] = {"output_fmt": "NCHW" if grid is None else "NLC", "intermediates_only": True}
    # Eva fails when it is asked for prefix tokens that it does not have.
    if "return_prefix_tokens" in offered and getattr(network, "num_prefix_tokens", None):
        arguments["return_prefix_tokens"] = True
    if norm:
        arguments["norm"] = True
    return arguments


def _tokens(found: Tensor | tuple[Tensor, Tensor], grid: Grid | None) -> VisualTokens:
    patches, prefix = found if isinstance(found, tuple) else (found, None)
    if grid is None:
        return VisualTokens.from_map(patches, prefix)
    return VisualTokens(patches, grid, prefix)
