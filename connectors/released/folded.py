"""Layouts of connectors behind a pixel shuffle: InternVL, Idefics3, Aya Vision, Command A Vision.

Source: `modeling_internvl_chat.py` of https://github.com/OpenGVLab/InternVL;
`InternVLMultiModalProjector`, `Idefics3Connector`, `AyaVisionMultiModalProjector` and
`Cohere2VisionMultiModalProjector` of transformers.
"""

from __future__ import annotations

import math
from functools import partial

from connectors.released.hints import Hint
from connectors.released.keys import HALVES, pair
from connectors.released.layout import Layout
from connectors.released.weights import Plan, Weights, link

__all__ = ["FOLDED"]

_HF = "multi_modal_projector."
_IDEFICS3 = "connector.modality_projection.proj"
_FACTOR, _ON_ODD = Hint("pixel_shuffle", 2), Hint("pixel_shuffle", "error")
_FOLD = {"factor": _FACTOR, "on_odd": _ON_ODD}


def _fold(weights: Weights, wide: int, **options: bool) -> tuple[str, int]:
    """Write the fold that gives tokens of width `wide`, and give the width of those that it takes."""
    if "factor" not in weights.hints and weights.encoder_dim is not None:
        factor = math.isqrt(wide // weights.encoder_dim)
    else:
        factor = weights.hints.whole("factor")
    fold = link("pixel_shuffle", factor=factor, on_odd=weights.hints["on_odd"], **options)
    return fold, weights.unfolded(wide, factor)


def _internvl(weights: Weights, first: str, last: str) -> Plan:
    _, wide = weights.shape(f"{first}.weight")
    out_dim, _ = weights.shape(f"{last}.weight")
    # transformers has the later of InternVL's two folds alone.
    transposed = "transposed" in weights.hints.known and bool(weights.hints["transposed"])
    fold, in_dim = _fold(weights, wide, transposed=transposed)
    return Plan(f"{fold}+{link('mlp', norm='layer', activation=weights.hints['activation'])}", in_dim, out_dim)


def _internvl_layout(
    name: str, source: str, used_by: str, part: str, names: tuple[str, str, str], encoder: str, hints: dict[str, Hint]
) -> Layout:
    norm, first, last = (part + each for each in names)
    return Layout(
        name=name,
        source=source,
        used_by=used_by,
        roots=("", "model."),
        parts=(part,),
        marks=(f"{norm}.weight", f"{first}.weight", f"{last}.weight"),
        pairs=(pair(norm, "mlp.norm"), pair(first, "mlp.layers.0"), pair(last, "mlp.layers.2")),
        plan=partial(_internvl, first=first, last=last),
        hints={**_FOLD, "activation": Hint("mlp", "gelu"), **hints},
        encoder=(encoder,),
    )


def _idefics3(weights: Weights) -> Plan:
    out_dim, wide = weights.shape(f"{_IDEFICS3}.weight")
    fold, in_dim = _fold(weights, wide)
    return Plan(f"{fold}+{link('linear', bias=False)}", in_dim, out_dim)


def _gated(weights: Weights, *, norm: bool) -> Plan:
    _, wide = weights.shape(f"{_HF}linear_1.weight")
    out_dim, hidden = weights.shape(f"{_HF}linear_2.weight")
    fold, in_dim = _fold(weights, wide)
    norms = [link("norm", eps=weights.hints["eps"])] if norm else []
    return Plan("+".join([fold, *norms, link("gated_mlp", hidden=hidden, bias=True)]), in_dim, out_dim)


def _gated_layout(name: str, source: str, used_by: str, roots: tuple[str, ...], *, norm: bool) -> Layout:
    maps = (
        pair(f"{_HF}linear_1", "gated_mlp.up_proj", "gated_mlp.gate_proj", move=HALVES),
        pair(f"{_HF}linear_2", "gated_mlp.down_proj"),
    )
    return Layout(
        name=name,
        source=source,
        used_by=used_by,
        roots=roots,
        parts=(_HF,),
        marks=(f"{_HF}linear_1.weight", f"{_HF}linear_2.weight", *((f"{_HF}layernorm.weight",) if norm else ())),
        pairs=(pair(f"{_HF}layernorm", "norm.norm"), *maps) if norm else maps,
        plan=partial(_gated, norm=norm),
        hints={**_FOLD, "eps": Hint("norm", 1e-6)} if norm else _FOLD,
        never=() if norm else (f"{_HF}layernorm.", f"{_HF}layer_norm.", f"{_HF}projector_layernorm."),
        fits=None if norm else lambda weights: weights.is_gated(f"{_HF}linear_1", f"{_HF}linear_2"),
        encoder=_SIGLIP,
    )


# Where the encoder's width stands: SigLIP as files have it and as transformers 5 has it in memory.
_SIGLIP = tuple(f"vision_tower.{middle}embeddings.patch_embedding.weight" for middle in ("vision_model.", ""))

FOLDED = (
    _internvl_layout(
        "internvl",
        "`mlp1` of InternVL's own `InternVLChatModel`",
        "InternVL 1.2 to 3; transposed=True where the config has `ps_version` v1, False with v2, as from 1.5 on",
        "mlp1.",
        ("0", "1", "3"),
        "vision_model.embeddings.patch_embedding.weight",
        {"transposed": Hint("pixel_shuffle", usual=False, asked=True)},
    ),
    _internvl_layout(
        "internvl-hf",
        "`InternVLMultiModalProjector` of transformers",
        "InternVL 2.5 and 3 as transformers saves them",
        _HF,
        ("layer_norm", "linear_1", "linear_2"),
        "vision_tower.embeddings.patch_embeddings.projection.weight",
        {},
    ),
    Layout(
        name="idefics3",
        source="`Idefics3Connector` and `SmolVLMConnector` of transformers",
        used_by="Idefics3 (factor=2) and SmolVLM (factor=4 in those of 512 px)",
        roots=("model.", ""),
        parts=("connector.",),
        marks=(f"{_IDEFICS3}.weight",),
        pairs=(pair(_IDEFICS3, "linear.proj"),),
        plan=_idefics3,
        hints={"factor": Hint("pixel_shuffle", 2, asked=True), "on_odd": _ON_ODD},
        encoder=("vision_model.embeddings.patch_embedding.weight",),
    ),
    _gated_layout(
        "aya-vision-hf",
        "`AyaVisionMultiModalProjector` of transformers",
        "Aya Vision",
        ("", "model."),
        norm=True,
    ),
    _gated_layout(
        "cohere2-vision-hf",
        "`Cohere2VisionMultiModalProjector` of transformers",
        "Command A Vision",
        ("model.", ""),
        norm=False,
    ),
)
