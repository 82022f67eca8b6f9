"""SigLIP 2 NaFlex by transformers: patches of 16 px in any grid, behind the final norm."""

from __future__ import annotations

from vlm_encoders.encoders.rows import HALVES, vit_row
from vlm_encoders.spec import EncoderSpec

__all__ = ["POSITIONS", "SPECS"]

POSITIONS = "a learned table, resampled bilinearly in float32 with antialiasing"

_BASE = EncoderSpec(
    name="siglip2-naflex-b-16",
    family="siglip2",
    backend="transformers",
    source="Siglip2VisionModel",
    weights="google/siglip2-base-patch16-naflex",
    image_size=(256, 256),
    positions=POSITIONS,
    packs=True,
    stride=16,
    dim=768,
    heads=12,
    mlp_dim=3072,
    num_layers=12,
    final_norm=True,
    interpolation="bilinear",
    parameters=85_843_200,
    licence="Apache-2.0",
    reference="https://arxiv.org/abs/2502.14786",
    **HALVES,
)

SPECS = (
    _BASE,
    vit_row(_BASE, "siglip2-naflex-so400m-16", "google/siglip2-so400m-patch16-naflex", "so400m", 412_649_712),
)
