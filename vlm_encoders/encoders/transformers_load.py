"""Transformers' vision towers made from a spec, and loaded strictly."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from connectors.errors import VlmError
from connectors.registry import nearest
from vlm_encoders.encoders.nested import NestedTower, find_tower, load_nested
from vlm_encoders.encoders.towers import SOURCES, tower
from vlm_encoders.encoders.towers.base import Tower
from vlm_encoders.encoders.towers.entries import LOOSE, as_entry, own_entries, telling_entries
from vlm_encoders.encoders.transformers_report import check_report, quiet, told
from vlm_encoders.encoders.weights import find_weights, load_state, read_json, snapshot
from vlm_encoders.spec import EncoderSpec

__all__ = ["build_tower", "load_tower", "read_config", "require_tower", "tower_config", "tower_weights"]

_ATTENTION = "attn_implementation"


def require_tower(spec: EncoderSpec) -> Tower:
    """Find the tower of `spec.source`.

    Raises:
        VlmError: there is none.
    """
    found = tower(spec.source)
    if found is None:
        raise VlmError(f"{spec.name}: transformers class '{spec.source}' is not one of {', '.join(sorted(SOURCES))}")
    return found


def tower_config(found: Tower, spec: EncoderSpec) -> Any:
    """Make the class's config from the spec and its options, with the kept layers alone.

    Raises:
        VlmError: the class has no such option.
    """
    options = dict(spec.options)
    attention = options.pop(_ATTENTION, None)
    make = found.config_class()
    default = make()
    known = own_entries(default)
    for option, value in options.items():
        if option in {"dtype", "torch_dtype"}:
            raise VlmError(f"{spec.name}: '{option}' is no option of {spec.source}; use dtype=")
        # A config would keep a misspelt option and nobody would read it.
        if option not in known:
            raise VlmError(f"{spec.name}: {spec.source} has no option '{option}'; {nearest(option, known)}")
        options[option] = as_entry(value, getattr(default, option))
    with _buildable(spec):
        config = make(**found.cut(found.config_of(spec) | dict(found.fixed) | options, spec))
    if attention is not None:
        config._attn_implementation = attention  # noqa: SLF001
    return config


def build_tower(found: Tower, spec: EncoderSpec, dtype: torch.dtype) -> nn.Module:
    """Make the tower of `spec` with random weights.

    Raises:
        VlmError: the class cannot be built so.
    """
    config = tower_config(found, spec)
    with _buildable(spec):
        network: nn.Module = found.network_class()(config, **found.arguments)
    return _finish(found, network, spec, dtype)


def tower_weights(spec: EncoderSpec, *, pretrained: bool | str) -> Path:
    """Give the local folder or file with the weights; of a whole VLM's shards only the tower's are fetched.

    Raises:
        VlmError: there are no such weights, here or on the hub.
    """
    wanted = None
    if pretrained is True and spec.weights is not None and not Path(spec.weights).expanduser().exists():
        folder = snapshot(spec.weights, spec.name, weights=False, revision=spec.revision)
        nested = find_tower(read_json(folder / "config.json", spec.name), spec.name)
        if nested is not None and nested.renames:
            found = nested

            def wanted(key: str) -> bool:
                return found.rename(key) is not None

    return find_weights(spec.name, spec.weights, pretrained=pretrained, revision=spec.revision, wanted=wanted)


def load_tower(found: Tower, spec: EncoderSpec, path: Path, dtype: torch.dtype) -> nn.Module:
    """Load the kept layers strictly: every weight found, and every other one accounted for.

    Raises:
        VlmError: the checkpoint is of another encoder, broken, or not whole.
    """
    folder = path.parent if path.is_file() else path
    raw = read_json(folder / "config.json", spec.name)
    nested = find_tower(raw, spec.name)
    _compare(read_config(found, raw, spec.name), found, spec, folder)
    state = _read(found, nested, spec, path)
    config = tower_config(found, spec)
    with quiet(), told(f"{spec.name}: weights in '{path}' cannot be loaded", "give a checkpoint of this encoder"):
        network, report = found.network_class().from_pretrained(
            None,
            config=config,
            state_dict=state,
            # A table that is resampled in half precision is another table.
            dtype=torch.float32 if found.resamples(spec) else dtype,
            output_loading_info=True,
            # A last norm that is dropped has another width where stages are cut; the report tells.
            ignore_mismatched_sizes=True,
            **found.arguments,
        )
    check_report(report, found, spec, path)
    return _own(_finish(found, network, spec, dtype), state)


def read_config(found: Tower, raw: dict[str, Any], owner: str) -> Any:
    """Read the config of a vision tower, or of the whole model around it.

    Raises:
        VlmError: transformers cannot read it.
    """
    make = found.config_class()
    nested = find_tower(raw, owner)
    own = nested.config if nested is not None else raw.get(make.base_config_key, raw)
    with told(f"{owner}: transformers cannot read its config.json", "repair it"):
        return make.from_dict({key: value for key, value in own.items() if key != "model_type"})


def _finish(found: Tower, network: nn.Module, spec: EncoderSpec, dtype: torch.dtype) -> nn.Module:
    found.prepare(network, spec)
    # Buffers such as rotary frequencies stay in float32, as in transformers' own loading.
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network


def _compare(theirs: Any, found: Tower, spec: EncoderSpec, folder: Path) -> None:
    """Refuse a checkpoint whose config says another thing than the encoder's."""
    whole = tower_config(found, spec.at_layer(-1, final_norm=False))
    loose = {*LOOSE, *found.fixed, *found.loose}
    there = telling_entries(theirs)
    for key, ours in telling_entries(whole).items():
        if key not in loose and there.get(key) != ours:
            raise VlmError(
                f"{spec.name}: '{folder}' has {key} {there.get(key)}, the encoder has {ours}; "
                f"use 'hf:{folder}' to take the folder as it is"
            )


def _read(found: Tower, nested: NestedTower | None, spec: EncoderSpec, path: Path) -> dict[str, Tensor]:
    """Read the tensors up to the feature layer, under names that the class knows."""
    # Peft would put it into the network without a word.
    if (path / "adapter_config.json").is_file():
        raise VlmError(
            f"{spec.name}: '{path}' holds an adapter, which is not applied; merge it first, or name the file with "
            "the weights without it"
        )
    cut = re.compile(found.behind(spec))

    def wanted(key: str) -> bool:
        return not cut.match(key)

    if nested is not None and nested.renames:
        return load_nested(path, nested, spec.name, wanted)
    return load_state(path, spec.name, wanted=wanted)


def _own(network: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Bring into memory what is still mapped: a network must not change with its file."""
    mapped = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.untyped_storage().data_ptr() in mapped:
            tensor.data = tensor.data.clone()
    return network


def _buildable(spec: EncoderSpec) -> AbstractContextManager[None]:
    return told(f"{spec.name}: {spec.source} cannot be built so", "mend the option")
