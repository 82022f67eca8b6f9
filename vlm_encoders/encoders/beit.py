"""BEiT by transformers: the last block, behind which there is no norm.

Stochastic depth is off, so that an encoder in training mode gives the same tokens.
"""

from __future__ import annotations

from vlm_encoders.encoders.rows import HALVES, vit_row
from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_BASE = EncoderSpec(
    name="beit-b-16-224",
    family="beit",
    backend="transformers",
    source="BeitModel",
    weights="microsoft/beit-base-patch16-224-pt22k-ft22k",
    image_size=(224, 224),
    positions="a bias for each offset, resampled bilinearly in float32",
    stride=16,
    dim=768,
    heads=12,
    mlp_dim=3072,
    num_layers=12,
    num_prefix=1,
    interpolation="bilinear",
    parameters=85_760_448,
    licence="Apache-2.0",
    reference="https://arxiv.org/abs/2106.08254",
    options=(("use_relative_position_bias", True), ("drop_path_rate", 0.0)),
    **HALVES,
)

SPECS = (
    _BASE,
    vit_row(_BASE, "beit-l-16-224", "microsoft/beit-large-patch16-224-pt22k-ft22k", "l", 303_403_520),
    vit_row(_BASE, "beit-l-16-512", "microsoft/beit-large-patch16-512", "l", 304_647_680, side=512),
)
