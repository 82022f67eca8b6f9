"""CLIP towers that OpenCLIP alone has: LAION, DataComp, DFN and CLIPA.

Read as OpenAI's: at feature layer -2, without the last norm. DFN's weights were trained
with QuickGELU, whatever the architecture of that size says.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_encoders.encoders.rows import CLIP_COLOURS, HALVES, IMAGENET, vit_row
from vlm_encoders.spec import EncoderSpec

__all__ = ["OPEN_CLIP_TABLE", "SPECS"]

OPEN_CLIP_TABLE = "a learned table, resampled bicubically in float32 with antialiasing when weights are loaded"
"""Positions of OpenCLIP's own towers, in words."""

_LAION = EncoderSpec(
    name="openclip-vit-b-16-laion2b",
    family="clip",
    backend="open_clip",
    source="ViT-B-16",
    weights="laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
    image_size=(224, 224),
    positions=OPEN_CLIP_TABLE,
    stride=16,
    dim=768,
    heads=12,
    mlp_dim=3072,
    num_layers=12,
    num_prefix=1,
    feature_layer=-2,
    resize="crop",
    parameters=85_799_424,
    licence="MIT",
    reference="https://arxiv.org/abs/2212.07143",
    options=(("quick_gelu", False),),
    **CLIP_COLOURS,
)
_DATACOMP = replace(_LAION, reference="https://arxiv.org/abs/2304.14108")
_DFN = replace(
    _LAION,
    licence="Apple, as on its model card",
    reference="https://arxiv.org/abs/2309.17425",
    options=(("quick_gelu", True),),
)
_DFN_HUGE = replace(_DFN, source="ViT-H-14-quickgelu", stride=14, resize="squash")
_LARGE = {"source": "ViT-L-14", "stride": 14}

SPECS = (
    _LAION,
    vit_row(
        _LAION,
        "openclip-vit-l-14-laion2b",
        "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
        "l",
        303_179_776,
        **_LARGE,
        **HALVES,
    ),
    replace(_DATACOMP, name="datacomp-vit-b-16", weights="laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K"),
    vit_row(_DATACOMP, "datacomp-vit-l-14", "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K", "l", 303_179_776, **_LARGE),
    replace(_DFN, name="dfn-vit-b-16", source="ViT-B-16-quickgelu", weights="apple/DFN2B-CLIP-ViT-B-16"),
    vit_row(
        _DFN,
        "dfn-vit-l-14",
        "apple/DFN2B-CLIP-ViT-L-14",
        "l",
        303_179_776,
        source="ViT-L-14-quickgelu",
        stride=14,
    ),
    vit_row(_DFN_HUGE, "dfn-vit-h-14", "apple/DFN5B-CLIP-ViT-H-14", "h", 630_766_080),
    vit_row(
        _DFN_HUGE,
        "dfn-vit-h-14-378",
        "apple/DFN5B-CLIP-ViT-H-14-378",
        "h",
        631_371_520,
        source="ViT-H-14-378-quickgelu",
        side=378,
    ),
    vit_row(
        _LAION,
        "clipa-vit-l-14-336",
        "UCSC-VLAA/ViT-L-14-CLIPA-336-datacomp1B",
        "l",
        303_505_408,
        source="ViT-L-14-CLIPA-336",
        stride=14,
        side=336,
        interpolation="bilinear",
        resize="squash",
        licence="Apache-2.0",
        reference="https://arxiv.org/abs/2306.15658",
        **IMAGENET,
    ),
)
