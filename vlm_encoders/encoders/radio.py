"""C-RADIOv4 by transformers: three CLS tokens and seven registers apart, no norm behind the last block.

The network norms pixels itself, so that here they only go from 0 to 1: mean 0, deviation 1.
"""

from __future__ import annotations

from vlm_encoders.spec import EncoderSpec

__all__ = ["POSITIONS", "SPECS"]

POSITIONS = "a learned table for 2048 px, resampled bilinearly to the longer side in float32 and cropped"

SPECS = (
    EncoderSpec(
        name="c-radio-v4-h-16",
        family="radio",
        backend="transformers",
        source="RadioModel",
        weights="nvidia/C-RADIOv4-H",
        image_size=(512, 512),
        positions=POSITIONS,
        stride=16,
        dim=1280,
        heads=16,
        mlp_dim=5120,
        num_layers=32,
        num_prefix=10,
        prefix_kinds=(*("cls",) * 3, *("register",) * 7),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        parameters=651_727_360,
        licence="NVIDIA Open Model License",
        reference="https://arxiv.org/abs/2312.06709",
    ),
)
