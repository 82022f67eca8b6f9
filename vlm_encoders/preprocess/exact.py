"""The exact path: Pillow resizes, as in the libraries' own processors."""

from __future__ import annotations

from PIL import Image

from connectors.errors import VlmError
from connectors.tokens import Grid
from vlm_encoders.preprocess.sizes import MAX_PIXELS, Placement
from vlm_encoders.spec import Interpolation

__all__ = ["FILTERS", "Colour", "exact_view"]

Colour = tuple[int, int, int]

FILTERS: dict[Interpolation, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


def exact_view(image: Image.Image, placement: Placement, interpolation: Interpolation, fill: Colour) -> Image.Image:
    """Make the shown part of a view, (rows, columns) px, of an RGB image.

    Raises:
        VlmError: a picture on the way is over the limit.
    """
    if placement.canvas != placement.image:
        _check(placement, "filled up to", placement.canvas)
        canvas = Image.new("RGB", (placement.canvas[1], placement.canvas[0]), fill)
        canvas.paste(image, (placement.margin[1], placement.margin[0]))
        image = canvas
    rows, columns = placement.resized
    # Pillow may resize the width first, so a picture as tall as the canvas lies between.
    _check(placement, "resized through", (max(rows, image.height), columns))
    resized = image.resize((columns, rows), FILTERS[interpolation])
    top, left = placement.start
    bottom, right = top + placement.shown[0], left + placement.shown[1]
    return resized.crop((left, top, right, bottom))


def _check(placement: Placement, how: str, size: Grid) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        height, width = placement.image
        raise VlmError(
            f"an image of {width}x{height} px would be {how} {size[1]}x{size[0]} px, "
            f"over the limit of {MAX_PIXELS} px; crop it first"
        )
