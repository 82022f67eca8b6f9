"""SigLIP and the fixed-size SigLIP 2 by transformers.

Tokens are `last_hidden_state`: the last block and the final norm, as in PaliGemma.
There is no CLS token, and the MAP head is not built. Fixed-size SigLIP 2 releases are
of SigLIP's class; they were released with a bilinear resize.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlm_encoders.encoders.rows import BICUBIC, HALVES, vit_row
from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_FIRST = EncoderSpec(
    name="siglip-b-16-224",
    family="siglip",
    backend="transformers",
    source="SiglipVisionModel",
    weights="google/siglip-base-patch16-224",
    image_size=(224, 224),
    positions=BICUBIC,
    stride=16,
    dim=768,
    heads=12,
    mlp_dim=3072,
    num_layers=12,
    final_norm=True,
    parameters=85_797_120,
    licence="Apache-2.0",
    reference="https://arxiv.org/abs/2303.15343",
    **HALVES,
)
_SECOND = replace(_FIRST, interpolation="bilinear", reference="https://arxiv.org/abs/2502.14786")
_WORDS = {"b": "base", "l": "large", "so400m": "so400m", "giant": "giant-opt"}
_GIANT: dict[str, Any] = {"dim": 1536, "num_layers": 40, "mlp_dim": 6144}


def _row(base: EncoderSpec, shape: str, stride: int, side: int, parameters: int, ending: str = "") -> EncoderSpec:
    first = "siglip" if base is _FIRST else "siglip2"
    giant = _GIANT if shape == "giant" else {}
    return vit_row(
        base,
        f"{first}-{shape}-{stride}-{side}{ending}",
        f"google/{first}-{_WORDS[shape]}-patch{stride}-{side}{ending}",
        "so400m" if giant else shape,
        parameters,
        side=side,
        stride=stride,
        **giant,
    )


SPECS = (
    _FIRST,
    _row(_FIRST, "b", 16, 256, 85_843_200),
    _row(_FIRST, "b", 16, 384, 86_088_960),
    _row(_FIRST, "b", 16, 512, 86_433_024),
    _row(_FIRST, "l", 16, 256, 303_361_024),
    _row(_FIRST, "l", 16, 384, 303_688_704),
    _row(_FIRST, "so400m", 14, 224, 412_442_352),
    _row(_FIRST, "so400m", 14, 384, 412_987_248),
    _row(_FIRST, "so400m", 16, 256, 412_649_712, "-i18n"),
    _row(_SECOND, "b", 32, 256, 87_465_216),
    _row(_SECOND, "b", 16, 224, 85_797_120),
    _row(_SECOND, "b", 16, 256, 85_843_200),
    _row(_SECOND, "b", 16, 384, 86_088_960),
    _row(_SECOND, "b", 16, 512, 86_433_024),
    _row(_SECOND, "l", 16, 256, 303_361_024),
    _row(_SECOND, "l", 16, 384, 303_688_704),
    _row(_SECOND, "l", 16, 512, 304_147_456),
    _row(_SECOND, "so400m", 14, 224, 412_442_352),
    _row(_SECOND, "so400m", 14, 384, 412_987_248),
    _row(_SECOND, "so400m", 16, 256, 412_649_712),
    _row(_SECOND, "so400m", 16, 384, 413_018_352),
    _row(_SECOND, "so400m", 16, 512, 413_534_448),
    _row(_SECOND, "giant", 16, 256, 1_134_838_272),
    _row(_SECOND, "giant", 16, 384, 1_135_329_792),
)
