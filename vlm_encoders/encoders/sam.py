"""SAM's image encoder by transformers: the neck's 64 x 64 grid, 256 wide, or any block's tokens.

The longest edge becomes 1024 px and the rest is padded at the right and bottom;
tokens there see the padding. `final_norm` stands for the neck.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_encoders.encoders.rows import IMAGENET
from vlm_encoders.spec import EncoderSpec, Stage

__all__ = ["POSITIONS", "SPECS"]

POSITIONS = (
    "a learned table, resampled bicubically in float32 with antialiasing, and biases of relative rows and columns, "
    "resampled linearly in float32 in the global blocks"
)

_BASE = EncoderSpec(
    name="sam-vit-b",
    family="sam",
    backend="transformers",
    source="SamVisionModel",
    weights="facebook/sam-vit-base",
    image_size=(1024, 1024),
    positions=POSITIONS,
    stride=16,
    dim=256,
    block_dim=768,
    neck=Stage(256, 16),
    windowed=True,
    heads=12,
    mlp_dim=3072,
    num_layers=12,
    final_norm=True,
    interpolation="bilinear",
    resize="pad",
    parameters=89_670_912,
    licence="Apache-2.0",
    reference="https://arxiv.org/abs/2304.02643",
    options=(("global_attn_indexes", (2, 5, 8, 11)),),
    **IMAGENET,
)

SPECS = (
    _BASE,
    replace(
        _BASE,
        name="sam-vit-l",
        weights="facebook/sam-vit-large",
        block_dim=1024,
        heads=16,
        mlp_dim=4096,
        num_layers=24,
        parameters=308_278_272,
        options=(("global_attn_indexes", (5, 11, 17, 23)),),
    ),
    replace(
        _BASE,
        name="sam-vit-h",
        weights="facebook/sam-vit-huge",
        block_dim=1280,
        heads=16,
        mlp_dim=5120,
        num_layers=32,
        parameters=637_026_048,
        options=(("global_attn_indexes", (7, 15, 23, 31)),),
    ),
)
