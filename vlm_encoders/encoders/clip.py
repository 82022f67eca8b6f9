"""CLIP towers: OpenAI's by transformers, LAION's by OpenCLIP.

The feature layer is -2 without the final norm, as in LLaVA: CLIP's last block and
norm serve the CLS token's contrastive loss. `last_hidden_state` of transformers is
before that norm.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_BASE_32 = EncoderSpec(
    name="clip-vit-b-32",
    family="clip",
    backend="transformers",
    source="CLIPVisionModel",
    weights="openai/clip-vit-base-patch32",
    image_size=(224, 224),
    stride=32,
    dim=768,
    heads=12,
    mlp_dim=3072,
    num_layers=12,
    num_prefix=1,
    feature_layer=-2,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    resize="crop",
    parameters=87_456_000,
    licence="MIT",
    reference="https://arxiv.org/abs/2103.00020",
    # OpenAI trained with x * sigmoid(1.702 x): plain GELU is 1 % off after three blocks.
    options=(("hidden_act", "quick_gelu"),),
)
_LARGE_14 = replace(
    _BASE_32,
    name="clip-vit-l-14",
    weights="openai/clip-vit-large-patch14",
    stride=14,
    dim=1024,
    heads=16,
    mlp_dim=4096,
    num_layers=24,
    parameters=303_179_776,
)

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
        reference="https://arxiv.org/abs/2212.07143",
        options=(),
    ),
)
