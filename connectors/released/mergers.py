"""Layouts of connectors that merge blocks of tokens in one module: Qwen-VL, Gemma 3, GOT-OCR 2.0.

Source: `PatchMerger`, `Qwen2_5_VLPatchMerger`, `Qwen3VLVisionPatchMerger`,
`Gemma3MultiModalProjector` and `GotOcr2MultiModalProjector` of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from torch import Tensor

from connectors.errors import VlmError
from connectors.released.hints import Hint, Hints
from connectors.released.keys import TRANSPOSED, pair
from connectors.released.layout import Layout
from connectors.released.weights import Plan, Weights, link

__all__ = ["MERGERS"]

_HF = "multi_modal_projector."
_MERGER, _DEEPSTACK = "visual.merger.", "visual.deepstack_merger_list."


def _merger(weights: Weights, norm: str, first: str, last: str, kind: str) -> Plan:
    if count := weights.count(_DEEPSTACK):
        raise VlmError(
            f"there are {count} deepstack mergers, which feed layers of the LLM and fit in no chain; "
            "pass deepstack=False to leave them out and load the last merger alone"
        )
    (in_dim,) = weights.shape(f"{_MERGER}{norm}.weight", 1)
    _, wide = weights.shape(f"{_MERGER}{first}.weight")
    out_dim, _ = weights.shape(f"{_MERGER}{last}.weight")
    factor = math.isqrt(wide // in_dim) or 1
    recipe = link("patch_merger", factor=factor, norm=kind, eps=weights.hints["eps"], on_odd=weights.hints["on_odd"])
    return Plan(recipe, in_dim, out_dim)


def _without_deepstack(tensors: Mapping[str, Tensor], hints: Hints) -> dict[str, Tensor]:
    kept = hints["deepstack"]
    return {name: tensor for name, tensor in tensors.items() if kept or not name.startswith(_DEEPSTACK)}


def _merger_layout(
    name: str, used_by: str, names: tuple[str, str, str], kind: str, roots: tuple[str, ...], *, deepstack: bool = False
) -> Layout:
    norm, first, last = names
    theirs = {"patch_merger.norm": norm, "patch_merger.layers.0": first, "patch_merger.layers.2": last}
    marks = (f"{norm}.weight", *((f"{norm}.bias",) if kind == "layer" else ()), f"{first}.weight", f"{last}.weight")
    left_out = {"deepstack": Hint("", usual=True)} if deepstack else {}
    return Layout(
        name=name,
        source="the patch merger of transformers' " + used_by,
        used_by=used_by,
        roots=roots,
        parts=(_MERGER, _DEEPSTACK),
        marks=tuple(_MERGER + mark for mark in marks),
        pairs=tuple(pair(_MERGER + each, ours) for ours, each in theirs.items()),
        plan=partial(_merger, norm=norm, first=first, last=last, kind=kind),
        hints={"eps": Hint("patch_merger", 1e-6), "on_odd": Hint("patch_merger", "error"), **left_out},
        # Without the encoder's own norms, a merger that lost its bias could be one of Qwen2.5-VL.
        never=() if kind == "layer" else (f"{_MERGER}{norm}.bias", "visual.blocks.0.norm1.bias"),
        prepare=_without_deepstack if deepstack else None,
    )


def _gemma3(weights: Weights) -> Plan:
    in_dim, out_dim = weights.shape(f"{_HF}mm_input_projection_weight")
    return Plan(link("pooled_projector", grid=weights.hints["grid"], eps=weights.hints["eps"]), in_dim, out_dim)


def _got_ocr2(weights: Weights) -> Plan:
    middle, in_dim, *_ = weights.shape(f"{_HF}conv_upsampler1.weight", 4)
    wide, *_ = weights.shape(f"{_HF}conv_upsampler2.weight", 4)
    out_dim, _ = weights.shape(f"{_HF}multimodal_projector.weight")
    return Plan(f"{link('conv', dim=middle)}+{link('conv', dim=wide)}+linear", in_dim, out_dim)


MERGERS = (
    _merger_layout("qwen2-vl", "Qwen2-VL", ("ln_q", "mlp.0", "mlp.2"), "layer", ("", "model.")),
    _merger_layout("qwen2.5-vl", "Qwen2.5-VL", ("ln_q", "mlp.0", "mlp.2"), "rms", ("", "model.")),
    _merger_layout(
        "qwen3-vl",
        "Qwen3-VL",
        ("norm", "linear_fc1", "linear_fc2"),
        "layer",
        ("model.", ""),
        deepstack=True,
    ),
    Layout(
        name="gemma3-hf",
        source="`Gemma3MultiModalProjector` of transformers, from 64x64 tokens to 16x16",
        used_by="Gemma 3",
        roots=("", "model."),
        parts=(_HF,),
        marks=(f"{_HF}mm_input_projection_weight", f"{_HF}mm_soft_emb_norm.weight"),
        pairs=(
            pair(f"{_HF}mm_input_projection_weight", "pooled_projector.proj.weight", move=TRANSPOSED),
            pair(f"{_HF}mm_soft_emb_norm", "pooled_projector.norm"),
        ),
        plan=_gemma3,
        hints={"grid": Hint("pooled_projector", (16, 16)), "eps": Hint("pooled_projector", 1e-6)},
    ),
    Layout(
        name="got-ocr2-hf",
        source="`GotOcr2MultiModalProjector` of transformers",
        used_by="GOT-OCR 2.0",
        roots=("", "model."),
        parts=(_HF,),
        marks=(f"{_HF}conv_upsampler1.weight", f"{_HF}conv_upsampler2.weight"),
        pairs=(
            pair(f"{_HF}conv_upsampler1", "conv.conv"),
            pair(f"{_HF}conv_upsampler2", "conv2.conv"),
            pair(f"{_HF}multimodal_projector", "linear.proj"),
        ),
        plan=_got_ocr2,
    ),
)
