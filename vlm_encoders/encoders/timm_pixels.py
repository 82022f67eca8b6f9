"""How timm's configs say that images become views, in this package's words."""

from __future__ import annotations

from typing import Any

from connectors.errors import VlmError

__all__ = ["pixel_fields"]

# SigLIP saw whole images, squashed; timm's configs of these towers cut the middle out,
# most of them at 0.9 (https://arxiv.org/abs/2303.15343).
_SIGLIP = frozenset(
    f"vit_{tower}_siglip{head}_{side}"
    for tower, sides in {
        "base_patch32": (256,),
        "base_patch16": (224, 256, 384, 512),
        "large_patch16": (256, 384, 512),
        "so400m_patch14": (224, 378, 384, 448),
        "so400m_patch16": (256, 384, 512),
        "giantopt_patch16": (256, 384),
    }.items()
    for side in sides
    for head in ("", "_gap")
)
# "border" pads the fitted image, "expand" the image before it is fitted: the same frame,
# apart from one row of pixels at its edges.
_RESIZES = {"center": "crop", "squash": "squash", "border": "expand"}
_FILTERS = frozenset({"bicubic", "bilinear", "lanczos", "nearest"})


def pixel_fields(data: dict[str, Any], architecture: str | None, name: str) -> dict[str, Any]:
    """Give the fields of a spec that say how pixels are made.

    Args:
        data: what `timm.data.resolve_model_data_config` gives.
        architecture: the model's name without its tag; None if `data` comes from a config of the weights' own.
        name: the encoder's, for messages.

    Raises:
        VlmError: the model wants a filter, or a way to crop, that this package does not have.
    """
    interpolation, mode = data["interpolation"], data["crop_mode"]
    if interpolation not in _FILTERS or mode not in _RESIZES:
        raise VlmError(
            f"{name}: interpolation '{interpolation}' with crop mode '{mode}' is unknown; register a spec instead"
        )
    siglip = architecture in _SIGLIP
    return {
        "mean": tuple(data["mean"]),
        "std": tuple(data["std"]),
        "interpolation": interpolation,
        "resize": "squash" if siglip else _RESIZES[mode],
        "crop_pct": 1.0 if siglip else data["crop_pct"],
    }
