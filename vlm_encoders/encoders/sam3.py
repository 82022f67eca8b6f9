"""SAM 3's image encoder by transformers: 72 x 72 tokens of 14 px, in front of its pyramid."""

from __future__ import annotations

from vlm_encoders.encoders.rows import HALVES
from vlm_encoders.spec import EncoderSpec

__all__ = ["POSITIONS", "SPECS"]

POSITIONS = (
    "a learned table of 24x24 places, tiled, and rotary angles in float32 that the global blocks scale by the columns"
)

SPECS = (
    EncoderSpec(
        name="sam3-vit-l-14",
        family="sam3",
        backend="transformers",
        source="Sam3ViTModel",
        weights="facebook/sam3",
        image_size=(1008, 1008),
        positions=POSITIONS,
        stride=14,
        dim=1024,
        heads=16,
        mlp_dim=4736,
        windowed=True,
        num_layers=32,
        interpolation="bilinear",
        parameters=446_236_672,
        licence="SAM License",
        reference="https://arxiv.org/abs/2511.16719",
        **HALVES,
    ),
)
