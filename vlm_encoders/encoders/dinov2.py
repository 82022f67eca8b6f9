"""DINOv2 with and without registers by transformers.

Tokens are the last block's behind the final norm. Views are 224 px, as the released
image processor makes them, though the position table is of 518 px: transformers
interpolates it, without antialiasing in the models without registers, where timm
antialiases (0.3 % apart off 518 px).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlm_encoders.encoders.rows import BICUBIC, BICUBIC_ANTIALIASED, IMAGENET, vit_row
from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_SMALL = EncoderSpec(
    name="dinov2-vit-s-14",
    family="dinov2",
    backend="transformers",
    source="Dinov2Model",
    weights="facebook/dinov2-small",
    image_size=(224, 224),
    trained_size=(518, 518),
    positions=BICUBIC,
    packs=True,
    stride=14,
    dim=384,
    heads=6,
    mlp_dim=1536,
    num_layers=12,
    num_prefix=1,
    final_norm=True,
    resize="crop",
    crop_pct=224 / 256,
    parameters=22_056_192,
    licence="Apache-2.0",
    reference="https://arxiv.org/abs/2304.07193",
    **IMAGENET,
)
_REGISTERS = replace(
    _SMALL,
    name="dinov2-vit-s-14-reg",
    source="Dinov2WithRegistersModel",
    weights="facebook/dinov2-with-registers-small",
    positions=BICUBIC_ANTIALIASED,
    num_prefix=5,
    prefix_kinds=("cls", *("register",) * 4),
    parameters=22_057_728,
    reference="https://arxiv.org/abs/2309.16588",
    options=(("num_register_tokens", 4),),
)
# SwiGLU's hidden width is two thirds of 4 x 1536, rounded up to eights.
_GIANT: dict[str, Any] = {"dim": 1536, "num_layers": 40, "heads": 24, "mlp_dim": 4096, "gated_mlp": True}
_SWIGLU = ("use_swiglu_ffn", True)

SPECS = (
    _SMALL,
    vit_row(_SMALL, "dinov2-vit-b-14", "facebook/dinov2-base", "b", 86_579_712),
    vit_row(_SMALL, "dinov2-vit-l-14", "facebook/dinov2-large", "l", 304_367_616),
    vit_row(_SMALL, "dinov2-vit-g-14", "facebook/dinov2-giant", "b", 1_136_479_232, options=(_SWIGLU,), **_GIANT),
    _REGISTERS,
    vit_row(_REGISTERS, "dinov2-vit-b-14-reg", "facebook/dinov2-with-registers-base", "b", 86_582_784),
    vit_row(_REGISTERS, "dinov2-vit-l-14-reg", "facebook/dinov2-with-registers-large", "l", 304_371_712),
    vit_row(
        _REGISTERS,
        "dinov2-vit-g-14-reg",
        "facebook/dinov2-with-registers-giant",
        "b",
        1_136_485_376,
        options=(*_REGISTERS.options, _SWIGLU),
        **_GIANT,
    ),
)
