"""Grey pictures of more than 8 bits, scaled by their mode and file, never by what they show."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps

from connectors.errors import VlmError

__all__ = ["deep_to_rgb", "is_deep"]

_BITS_PER_SAMPLE = 258
"""Number of the TIFF tag."""


def is_deep(image: Image.Image) -> bool:
    """Say whether Pillow's own conversion would clip its levels at 255."""
    return image.mode in {"I", "F"} or image.mode.startswith("I;16")


def deep_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Scale a grey picture of 16-bit or float levels to 8 bits and give it upright, in RGB.

    Raises:
        VlmError: its levels are floats outside of 0 to 1, or integers of which neither mode nor file says the scale.
    """
    top = _top(image, name)
    upright = ImageOps.exif_transpose(image)
    values = np.asarray(upright, dtype=np.float64)
    # NaN compares false, so it is refused too.
    if image.mode == "F" and not (values.min() >= 0 and values.max() <= 1):
        raise VlmError(
            f"{name} is a float image, which runs from 0 to 1, got {values.min():.4g} to {values.max():.4g}; "
            "scale it, or give 8 or 16 bits"
        )
    grey = np.clip(np.rint(values / top * 255), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _top(image: Image.Image, name: str) -> float:
    """Give the level that is white."""
    if image.mode == "F":
        return 1.0
    if image.mode.startswith("I;16"):
        # Pillow widens 12 bits of a TIFF file to 16 without scaling them.
        tags: Any = getattr(image, "tag_v2", {})
        return 4095.0 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535.0
    # Of PGM files Pillow scales all depths over 8 bits to 16; before 11 it gave PNG's 16 bits this mode.
    if image.format in {"PPM", "PNG"}:
        return 65535.0
    raise VlmError(
        f"{name} has 32-bit integer levels (mode I), of which nothing says which is white; "
        "convert it to 8 bits (mode L) or 16 (mode I;16)"
    )
