"""The shapes that ViTs share, for the tables of encoders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlm_encoders.spec import EncoderSpec

__all__ = ["BICUBIC", "BICUBIC_ANTIALIASED", "CLIP_COLOURS", "HALVES", "IMAGENET", "vit_row"]

IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALVES: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLIP_COLOURS: dict[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
BICUBIC = "a learned table, resampled bicubically in float32 without antialiasing"
BICUBIC_ANTIALIASED = "a learned table, resampled bicubically in float32 with antialiasing"

_SHAPES = {  # width, blocks, heads, hidden width of the MLP
    "t": (192, 12, 3, 768),
    "s": (384, 12, 6, 1536),
    "b": (768, 12, 12, 3072),
    "l": (1024, 24, 16, 4096),
    "h": (1280, 32, 16, 5120),
    "so400m": (1152, 27, 16, 4304),
    "bigg": (1664, 48, 16, 8192),
}


def vit_row(base: EncoderSpec, name: str, weights: str, shape: str, parameters: int, **changes: Any) -> EncoderSpec:
    """Give a row like `base` of one of the usual shapes.

    Args:
        base: a row of the same family.
        name: of the encoder.
        weights: hub id.
        shape: "t", "s", "b", "l", "h", "so400m" or "bigg".
        parameters: of the tower.
        **changes: further fields, over those of the shape; `side` stands for a square `image_size`.
    """
    width, depth, heads, hidden = _SHAPES[shape]
    fields: dict[str, Any] = {
        "dim": width,
        "num_layers": depth,
        "heads": heads,
        "mlp_dim": hidden,
        "parameters": parameters,
    }
    side = changes.pop("side", None)
    if side is not None:
        fields["image_size"] = (side, side)
    return replace(base, name=name, weights=weights, **(fields | changes))
