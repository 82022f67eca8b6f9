"""Swin by timm: the last stage, one token for 32 x 32 px, behind the final norm.

Stochastic depth is off, so that an encoder in training mode gives the same tokens.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_TINY = EncoderSpec(
    name="swin-t-224",
    family="swin",
    backend="timm",
    source="swin_tiny_patch4_window7_224.ms_in22k_ft_in1k",
    weights="timm/swin_tiny_patch4_window7_224.ms_in22k_ft_in1k",
    image_size=(224, 224),
    stride=32,
    dim=768,
    block_dim=96,
    heads=3,
    mlp_dim=384,
    num_layers=12,
    final_norm=True,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    resize="crop",
    crop_pct=0.9,
    parameters=27_519_354,
    licence="MIT",
    reference="https://arxiv.org/abs/2103.14030",
    options=(("drop_path_rate", 0.0),),
)
_BASE = replace(
    _TINY,
    name="swin-b-224",
    source="swin_base_patch4_window7_224.ms_in22k",
    weights="timm/swin_base_patch4_window7_224.ms_in22k",
    dim=1024,
    block_dim=128,
    heads=4,
    mlp_dim=512,
    num_layers=24,
    parameters=86_743_224,
)

SPECS = (
    _TINY,
    _BASE,
    replace(
        _BASE,
        name="swin-b-384",
        source="swin_base_patch4_window12_384.ms_in22k",
        weights="timm/swin_base_patch4_window12_384.ms_in22k",
        image_size=(384, 384),
        crop_pct=1.0,
        parameters=86_878_584,
    ),
    replace(
        _BASE,
        name="swin-l-384",
        source="swin_large_patch4_window12_384.ms_in22k",
        weights="timm/swin_large_patch4_window12_384.ms_in22k",
        image_size=(384, 384),
        crop_pct=1.0,
        dim=1536,
        block_dim=192,
        heads=6,
        mlp_dim=768,
        parameters=195_198_516,
    ),
)
