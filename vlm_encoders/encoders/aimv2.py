"""AIMv2 by transformers: the last block behind the final norm, no prefix.

The fixed models take one size of view; `aimv2-l-14-native` takes any.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_encoders.encoders.rows import CLIP_COLOURS
from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_LARGE = EncoderSpec(
    name="aimv2-l-14-224",
    family="aimv2",
    backend="transformers",
    source="Aimv2VisionModel",
    weights="apple/aimv2-large-patch14-224",
    image_size=(224, 224),
    sizes="native",
    positions="a learned table of one size",
    stride=14,
    dim=1024,
    heads=8,
    mlp_dim=2816,
    gated_mlp=True,
    num_layers=24,
    final_norm=True,
    resize="crop",
    parameters=309_197_824,
    licence="Apple AMLR",
    reference="https://arxiv.org/abs/2411.14402",
    **CLIP_COLOURS,
)
_SHAPES = {  # hub's word, width, heads, hidden width of the MLP, parameters at 224 px
    "l": ("large", 1024, 8, 2816, 309_197_824),
    "h": ("huge", 1536, 12, 4096, 680_851_968),
    "1b": ("1B", 2048, 16, 5632, 1_234_958_336),
    "3b": ("3B", 3072, 24, 8192, 2_720_658_432),
}


def _row(shape: str, side: int) -> EncoderSpec:
    word, width, heads, hidden, parameters = _SHAPES[shape]
    return replace(
        _LARGE,
        name=f"aimv2-{shape}-14-{side}",
        weights=f"apple/aimv2-{word}-patch14-{side}",
        image_size=(side, side),
        dim=width,
        heads=heads,
        mlp_dim=hidden,
        # A larger view has a larger position table, and nothing else.
        parameters=parameters + ((side // 14) ** 2 - (224 // 14) ** 2) * width,
    )


SPECS = (
    *(_row(shape, side) for shape in _SHAPES for side in (224, 336, 448)),
    replace(
        _LARGE,
        name="aimv2-l-14-native",
        weights="apple/aimv2-large-patch14-native",
        sizes="any",
        packs=True,
        positions="sines of the rows and columns, in the parameters' dtype",
        parameters=308_935_680,
        options=(("is_native", True),),
    ),
)
