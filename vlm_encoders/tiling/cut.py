"""Pixels by plan: one image becomes the pictures that the encoder sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

from connectors.errors import VlmError
from vlm_encoders.tiling.plan import TilePlan

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["cut"]


def cut(image: Image, plan: TilePlan) -> list[Image]:
    """Cut an image into the `num_views` pictures of its plan.

    Tiles come row by row, on black padding, resized bicubically; the thumbnail is
    the whole image squashed to one tile, where the plan puts it. A plan without a
    grid hands the image on as it is.

    Args:
        image: the upright RGB image that the plan was made for.
        plan: from a tiler's `plan`.

    Raises:
        VlmError: the image is not RGB, or has another size than the plan.

    Source: transformers `LlavaNextImageProcessorPil`, `GotOcr2ImageProcessorPil`.
    """
    if (image.height, image.width) != plan.image_size:
        raise VlmError(
            f"the plan is for an image of {plan.image_size[0]}x{plan.image_size[1]} px, got "
            f"{image.height}x{image.width}; plan with (height, width) after turning the image upright"
        )
    if image.mode != "RGB":
        raise VlmError(f"tiles are cut from RGB images, got mode {image.mode}; convert the image first")
    if plan.grid is None:
        return [image]
    tiles = _tiles(image, plan)
    if plan.thumbnail is None:
        return tiles
    thumbnail = _resize(image, plan.tile_size, plan.tile_size)
    return [thumbnail, *tiles] if plan.thumbnail == "first" else [*tiles, thumbnail]


def _tiles(image: Image, plan: TilePlan) -> list[Image]:
    from PIL import Image as PILImage

    top, left, height, width = plan.content
    canvas = _resize(image, height, width)
    canvas_height, canvas_width = plan.canvas
    if plan.padded:
        resized, canvas = canvas, PILImage.new("RGB", (canvas_width, canvas_height))
        canvas.paste(resized, (left, top))
    side = plan.tile_size
    corners = [(x, y) for y in range(0, canvas_height, side) for x in range(0, canvas_width, side)]
    return [canvas.crop((x, y, x + side, y + side)) for x, y in corners]


def _resize(image: Image, height: int, width: int) -> Image:
    from PIL.Image import Resampling

    return image.resize((width, height), Resampling.BICUBIC)
