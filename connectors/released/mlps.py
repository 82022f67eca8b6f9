"""Layouts of connectors that map each token alone: LLaVA and those after it.

Source: the code of LLaVA, `llava/model/multimodal_projector/builder.py` of
https://github.com/haotian-liu/LLaVA; `LlavaMultiModalProjector`,
`FastVlmMultiModalProjector` and `VipLlavaMultiModalProjector` of transformers.
"""

from __future__ import annotations

from connectors.released.hints import Hint
from connectors.released.keys import pair
from connectors.released.layout import Layout
from connectors.released.weights import Plan, Weights, link

__all__ = ["MLPS", "stack"]

_HF = "multi_modal_projector."
_NEWLINE = "image_newline"


def stack(weights: Weights, before: str, activation: str = "gelu") -> tuple[str, int, int]:
    """Read a stack of maps with activations between, numbered 0, 2, 4, ... behind `before`.

    LLaVA and Honeybee give each map a bias, and every hidden layer the width that goes out.

    Returns:
        The link of the recipe, the width that comes in and the width that goes out.
    """
    numbers = weights.numbers(before) or [0]
    first, last = (weights.shape(f"{before}{number}.weight") for number in (0, numbers[-1]))
    return link("mlp", depth=len(numbers), activation=activation), first[1], last[0]


def _llava(weights: Weights) -> Plan:
    recipe, in_dim, out_dim = stack(weights, "mm_projector.")
    return Plan(recipe, in_dim, out_dim, _NEWLINE in weights)


def _llava_linear(weights: Weights) -> Plan:
    out_dim, in_dim = weights.shape("mm_projector.weight")
    return Plan("linear", in_dim, out_dim, _NEWLINE in weights)


def _llava_hf(weights: Weights) -> Plan:
    _, in_dim = weights.shape(f"{_HF}linear_1.weight")
    out_dim, _ = weights.shape(f"{_HF}linear_2.weight")
    bias = weights.has_bias(f"{_HF}linear_1", f"{_HF}linear_2")
    return Plan(link("mlp", activation=weights.hints["activation"], bias=bias), in_dim, out_dim, _NEWLINE in weights)


def _vip_llava(weights: Weights) -> Plan:
    out_dim, in_dim = weights.shape(f"{_HF}linear_1.weight")
    recipe = f"{link('norm', eps=weights.hints['eps'])}+{link('mlp', activation=weights.hints['activation'])}"
    return Plan(recipe, in_dim, out_dim)


_LLAVA_ROOTS = ("model.", "", "base_model.model.model.")
_LLAVA_PARTS = ("mm_projector.", "vision_resampler.", _NEWLINE)
_TWO_MAPS = (pair(f"{_HF}linear_1", "mlp.layers.0"), pair(f"{_HF}linear_2", "mlp.layers.2"))

MLPS = (
    Layout(
        name="llava",
        source="LLaVA's `build_vision_projector`, `mlp2x_gelu` of any depth; in `mm_projector.bin` or the whole model",
        used_by="LLaVA 1.5, LLaVA-NeXT and LLaVA-OneVision as LLaVA's own code saves them",
        roots=_LLAVA_ROOTS,
        parts=_LLAVA_PARTS,
        marks=("mm_projector.0.weight",),
        pairs=(pair("mm_projector.{}", "mlp.layers.{}"), pair(_NEWLINE, "newline")),
        plan=_llava,
    ),
    Layout(
        name="llava-linear",
        source="LLaVA's `build_vision_projector`, `linear`",
        used_by="LLaVA 1.0",
        roots=_LLAVA_ROOTS,
        parts=_LLAVA_PARTS,
        marks=("mm_projector.weight",),
        pairs=(pair("mm_projector", "linear.proj"), pair(_NEWLINE, "newline")),
        plan=_llava_linear,
    ),
    Layout(
        name="llava-hf",
        source="`LlavaMultiModalProjector` and `FastVlmMultiModalProjector` of transformers",
        used_by="LLaVA 1.5, LLaVA-NeXT, LLaVA-NeXT-Video, LLaVA-OneVision and FastVLM",
        roots=("", "model."),
        parts=(_HF, _NEWLINE),
        marks=(f"{_HF}linear_1.weight", f"{_HF}linear_2.weight"),
        pairs=(*_TWO_MAPS, pair(_NEWLINE, "newline")),
        plan=_llava_hf,
        hints={"activation": Hint("mlp", "gelu")},
        # The last two: PerceptionLM, whose encoder is a timm ViT, pools behind the same two maps (FastVLM's has
        # stages and no blocks); the others of these names are of sound.
        never=(
            *(f"{_HF}{norm}." for norm in ("projector_layernorm", "layernorm", "layer_norm")),
            "vision_tower.timm_model.blocks.",
            "audio_tower.",
        ),
        fits=lambda weights: not weights.is_gated(f"{_HF}linear_1", f"{_HF}linear_2"),
    ),
    Layout(
        name="vip-llava-hf",
        source="`VipLlavaMultiModalProjector` of transformers; the tokens are of several layers, side by side",
        used_by="ViP-LLaVA",
        roots=("", "model."),
        parts=(_HF,),
        marks=(f"{_HF}projector_layernorm.weight", f"{_HF}linear_1.weight"),
        pairs=(pair(f"{_HF}projector_layernorm", "norm.norm"), *_TWO_MAPS),
        plan=_vip_llava,
        hints={"activation": Hint("mlp", "gelu"), "eps": Hint("norm", 1e-5)},
    ),
)
