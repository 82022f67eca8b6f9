"""CLIP towers: OpenAI's, MetaCLIP's and the large ones of LAION by transformers, LAION's B/32 by OpenCLIP.

The feature layer is -2 without the final norm, as in LLaVA: CLIP's last block and
norm serve the CLS token's contrastive loss. `last_hidden_state` of transformers is
before that norm.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_encoders.encoders.openclip import OPEN_CLIP_TABLE
from vlm_encoders.encoders.rows import BICUBIC, CLIP_COLOURS, vit_row
from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_BASE_32 = EncoderSpec(
    name="clip-vit-b-32",
    family="clip",
    backend="transformers",
    source="CLIPVisionModel",
    weights="openai/clip-vit-base-patch32",
    image_size=(224, 224),
    positions=BICUBIC,
    stride=32,
    dim=768,
    heads=12,
    mlp_dim=3072,
    num_layers=12,
    num_prefix=1,
    feature_layer=-2,
    resize="crop",
    parameters=87_456_000,
    licence="MIT",
    reference="https://arxiv.org/abs/2103.00020",
    # OpenAI trained with x * sigmoid(1.702 x): plain GELU is 1 % off after three blocks.
    options=(("hidden_act", "quick_gelu"),),
    **CLIP_COLOURS,
)
_LAION = replace(_BASE_32, stride=14, reference="https://arxiv.org/abs/2212.07143", options=(("hidden_act", "gelu"),))
_META = replace(_BASE_32, licence="CC-BY-NC-4.0", reference="https://arxiv.org/abs/2309.16671")
_META_2 = replace(_META, source="MetaClip2VisionModel", stride=14, reference="https://arxiv.org/abs/2507.22062")
_LARGE_14 = vit_row(_BASE_32, "clip-vit-l-14", "openai/clip-vit-large-patch14", "l", 303_179_776, stride=14)

SPECS = (
    _BASE_32,
    replace(_BASE_32, name="clip-vit-b-16", weights="openai/clip-vit-base-patch16", stride=16, parameters=85_799_424),
    _LARGE_14,
    replace(
        _LARGE_14,
        name="clip-vit-l-14-336",
        weights="openai/clip-vit-large-patch14-336",
        image_size=(336, 336),
        parameters=303_507_456,
    ),
    replace(
        _BASE_32,
        name="openclip-vit-b-32-laion2b",
        backend="open_clip",
        source="ViT-B-32",
        weights="laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        positions=OPEN_CLIP_TABLE,
        reference="https://arxiv.org/abs/2212.07143",
        options=(),
    ),
    vit_row(_LAION, "openclip-vit-h-14-laion2b", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "h", 630_766_080),
    vit_row(
        _LAION,
        "openclip-vit-g-14-laion2b",
        "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
        "h",
        1_011_203_840,
        dim=1408,
        num_layers=40,
        mlp_dim=6144,
    ),
    vit_row(_LAION, "openclip-vit-bigg-14-laion2b", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "bigg", 1_842_777_344),
    vit_row(_META, "metaclip-vit-b-32", "facebook/metaclip-b32-fullcc2.5b", "b", 87_456_000),
    vit_row(_META, "metaclip-vit-b-16", "facebook/metaclip-b16-fullcc2.5b", "b", 85_799_424, stride=16),
    vit_row(_META, "metaclip-vit-l-14", "facebook/metaclip-l14-fullcc2.5b", "l", 303_179_776, stride=14),
    vit_row(_META, "metaclip-vit-h-14", "facebook/metaclip-h14-fullcc2.5b", "h", 630_766_080, stride=14),
    vit_row(_META_2, "metaclip2-vit-h-14", "facebook/metaclip-2-worldwide-huge-quickgelu", "h", 630_766_080),
)
