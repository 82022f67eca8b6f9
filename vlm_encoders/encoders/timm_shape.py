"""What a model of timm gives, measured on the meta device: layers, norm, neck, sizes, prefix."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from connectors.errors import VlmError
from connectors.tokens import Grid, TokenSpec, VisualTokens
from vlm_encoders.encoders.timm_network import REFUSALS, probe_layers, probe_network
from vlm_encoders.encoders.trim import trace_parameters
from vlm_encoders.spec import PrefixKind, Stage

__all__ = ["block_fields", "positions", "prefix_kinds", "shape_fields", "size_fields"]

_PREFIXES: tuple[tuple[str, PrefixKind], ...] = (
    ("cls_token", "cls"),
    ("dist_token", "distillation"),
    ("reg_token", "register"),
)


def shape_fields(network: Any, size: Grid) -> dict[str, Any]:
    """Give the fields of a spec that say which tokens come out, and of how many weights.

    Args:
        network: untouched, as `probe_network` gives it.
        size: (height, width) of its own views, px.
    """
    with torch.enable_grad():
        layers, _ = probe_layers(network, size, range(len(network.feature_info)))
        normed = _normed(network, size) or layers[-1]
    plain, after = ([visual.tokens, visual.prefix] for visual in (layers[-1], normed))
    reached, names = (set(trace_parameters(network, [parts])[0]) for parts in (plain, after))
    has_norm = bool(names - reached)
    specs = [visual.spec for visual in layers]
    out = normed.spec if has_norm else specs[-1]
    strides = [_stride(network, place, size, spec) for place, spec in enumerate(specs)]
    rounding = _rounding(size, strides, specs)
    stages = tuple(_stage(size, stride, spec, rounding) for stride, spec in zip(strides, specs, strict=True))
    same = len(set(stages)) == 1 and stages[0].grid is None
    necked = (out.dim, out.grid) != (specs[-1].dim, specs[-1].grid)
    neck = _stage(size, _fit(size, out.grid), out, rounding) if necked else None
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    return {
        "stride": (neck or stages[-1]).stride,
        "dim": out.dim,
        "block_dim": specs[-1].dim if neck and same else None,
        "stages": () if same else stages,
        "neck": neck,
        "rounding": rounding,
        "num_layers": len(stages),
        "num_prefix": out.num_prefix,
        "final_norm": has_norm,
        "parameters": sum(sizes[name] for name in (names if has_norm else reached)),
    }


def size_fields(
    network: Any, name: str, source: str, options: dict[str, Any], size: Grid, shape: dict[str, Any]
) -> dict[str, Any]:
    """Find out by trying which views the network takes: of any size, square ones, or its own alone.

    Args:
        network: as for `shape_fields`, built for its own views.
        name: the encoder's, for messages.
        source: the model's name.
        options: with which it was built.
        size: (height, width) of its own views, px.
        shape: what `shape_fields` gave.
    """
    stages = shape["stages"] or (Stage(shape["dim"], shape["stride"]),) * shape["num_layers"]
    step = max(stage.stride for stage in stages)
    odd = step + 5 if shape["rounding"] == "ceil" else step
    height, width = size
    side = max(size)
    trials: list[tuple[Literal["any", "square"], Grid]] = [("any", (height + odd, width + 2 * odd))]
    if not (height % step or width % step):
        # Windows ask for more than whole tokens; a doubled view keeps theirs whole.
        trials.append(("any", (2 * height, width)))
    trials.append(("square", (side + odd, side + odd)))
    if not side % step:
        trials.append(("square", (2 * side, 2 * side)))
    for kind, trial in trials:
        expected = [_grid(trial, stage.stride, shape["rounding"]) for stage in stages]
        if _grids(network, trial) == expected or _grids_for(name, source, options, trial) == expected:
            return {"sizes": kind}
    return {"sizes": "native"}


def prefix_kinds(network: Any, count: int) -> tuple[PrefixKind, ...]:
    """Name the prefix tokens by the parameters that they come from."""
    kinds: list[PrefixKind] = []
    for attribute, kind in _PREFIXES:
        for owner in (network, getattr(network, "embeds", None)):
            token = getattr(owner, attribute, None)
            if isinstance(token, nn.Parameter):
                kinds += [kind] * token.shape[-2]
    unknown: PrefixKind = "other"
    return tuple(kinds) if len(kinds) == count else (unknown,) * count


def positions(network: Any) -> str:
    """Say how places reach the network, and how timm brings them to another size."""
    found = []
    owner = getattr(network, "embeds", network)
    if isinstance(getattr(owner, "pos_embed", None), nn.Parameter):
        found.append("a learned table, which timm resamples for another size in float32, antialiased, bicubic in most")
    if getattr(network, "rope", None) is not None:
        found.append("rotary angles, computed for each size")
    if any("relative_position" in key or "rel_pos" in key for key, _ in network.named_parameters()):
        found.append("biases for offsets, which timm resamples where a window or the grid changes")
    return "; ".join(found) or "convolutions alone or as timm's class computes them"


def block_fields(network: Any) -> dict[str, Any]:
    """Give heads and MLP width of a plain vision transformer, whose operations can be counted."""
    from timm.layers import Attention, AttentionRope, GluMlp, Mlp, PatchEmbed, SwiGLU
    from timm.models.eva import EvaAttention

    blocks = list(getattr(network, "blocks", []))
    attentions = {type(getattr(block, "attn", None)) for block in blocks}
    mlps = {type(getattr(block, "mlp", None)) for block in blocks}
    embed = getattr(network, "patch_embed", None)
    if not blocks or type(embed) is not PatchEmbed or len(mlps) != 1:
        return {}
    (kind,) = mlps
    if not attentions <= {Attention, AttentionRope, EvaAttention} or kind not in {Mlp, GluMlp, SwiGLU}:
        return {}
    return {"heads": blocks[0].attn.num_heads, "mlp_dim": blocks[0].mlp.fc2.in_features, "gated_mlp": kind is not Mlp}


def _normed(network: Any, size: Grid) -> VisualTokens | None:
    try:
        (normed,), _ = probe_layers(network, size, [len(network.feature_info) - 1], norm=True)
    except AssertionError:
        # Hiera and its kin refuse to be asked for a norm that they do not have.
        return None
    return normed


def _stride(network: Any, place: int, size: Grid, spec: TokenSpec) -> int:
    told = network.feature_info[place].get("reduction")
    if isinstance(told, int) and spec.grid in {_floor(size, told), _ceil(size, told)}:
        return told
    return _fit(size, spec.grid)


def _fit(size: Grid, grid: Grid | None) -> int:
    rows, _ = grid or (1, 1)
    return max(1, round(size[0] / rows))


def _rounding(size: Grid, strides: list[int], specs: list[TokenSpec]) -> Literal["floor", "ceil"]:
    if all(spec.grid == _floor(size, stride) for stride, spec in zip(strides, specs, strict=True)):
        return "floor"
    ceil = all(spec.grid == _ceil(size, stride) for stride, spec in zip(strides, specs, strict=True))
    return "ceil" if ceil else "floor"


def _stage(size: Grid, stride: int, spec: TokenSpec, rounding: str) -> Stage:
    told = _grid(size, stride, rounding)
    return Stage(spec.dim, stride, None if spec.grid == told else spec.grid)


def _grids_for(name: str, source: str, options: dict[str, Any], size: Grid) -> list[Grid | None]:
    try:
        network = probe_network(name, source, options, size)
    except (VlmError, *REFUSALS):
        return []
    return _grids(network, size)


def _grids(network: Any, size: Grid) -> list[Grid | None]:
    try:
        with torch.no_grad():
            layers, _ = probe_layers(network, size, range(len(network.feature_info)))
    except REFUSALS:
        return []
    return [visual.grid for visual in layers]


def _grid(size: Grid, stride: int, rounding: str) -> Grid:
    return _ceil(size, stride) if rounding == "ceil" else _floor(size, stride)


def _floor(size: Grid, stride: int) -> Grid:
    return size[0] // stride, size[1] // stride


def _ceil(size: Grid, stride: int) -> Grid:
    return -(-size[0] // stride), -(-size[1] // stride)
