"""Pictures by plan: one image becomes what the encoder sees, exactly as the libraries cut it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from connectors.errors import VlmError
from vlm_encoders.spec_values import Interpolation
from vlm_encoders.tiling.plan import Page, Size, TilePlan

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Steps", "canvas_picture", "check_plan", "cut"]

Steps: TypeAlias = "dict[tuple[Size, ...], Image]"
"""An image resized to one size after the other, by these sizes."""


def cut(image: Image, plan: TilePlan) -> list[Image]:
    """Cut an image into the `num_views` pictures of its plan.

    Tiles come row by row, on black padding, page by page. A plan without a
    grid hands the image on as it is.

    Args:
        image: the upright RGB image that the plan was made for.
        plan: from a tiler's `plan`.

    Raises:
        VlmError: the image is not RGB, or has another size than the plan; or a canvas is too large.

    Source: transformers `LlavaNextImageProcessorPil`, `GotOcr2ImageProcessorPil`.
    """
    check_plan((image.height, image.width), plan)
    if image.mode != "RGB":
        raise VlmError(f"tiles are cut from RGB images, got mode {image.mode}; convert the image first")
    if plan.grid is None:
        return [image]
    views: list[Image] = []
    steps: Steps = {}
    for page in plan.pages:
        canvas = canvas_picture(image, page, plan.interpolation, steps)
        boxes = [(box.left, box.top, box.left + box.width, box.top + box.height) for box in page.boxes]
        views += [canvas.crop(box) for box in boxes]
    return views


def canvas_picture(image: Image, page: Page, interpolation: Interpolation, steps: Steps) -> Image:
    """Lay an image on the canvas of a page, resized by Pillow.

    Args:
        image: upright, RGB.
        page: of the image's plan.
        interpolation: the plan's.
        steps: of this image, empty at first; what this page adds, the next ones begin with.
    """
    from PIL import Image as PILImage

    from vlm_encoders.preprocess.exact import FILTERS

    top, left, *content = page.content
    sizes = (*page.through, (content[0], content[1]))
    for place, (height, width) in enumerate(sizes, 1):
        made = steps.get(sizes[:place])
        image = image.resize((width, height), FILTERS[interpolation]) if made is None else made
        if page.through:
            steps[sizes[:place]] = image
    if not page.padded:
        return image
    canvas = PILImage.new("RGB", (page.canvas[1], page.canvas[0]))
    canvas.paste(image, (left, top))
    return canvas


def check_plan(image_size: Size, plan: TilePlan) -> None:
    """Refuse an image that the plan was not made for, and canvases over the limit of any picture.

    Args:
        image_size: (height, width) of the image, px.
        plan: the plan.

    Raises:
        VlmError: the sizes differ, or a picture on the way is over the limit.
    """
    if image_size != plan.image_size:
        raise VlmError(
            f"the plan is for an image of {plan.image_size[0]}x{plan.image_size[1]} px, got "
            f"{image_size[0]}x{image_size[1]} px; plan with (height, width) after turning the image upright"
        )
    if plan.grid is None:
        # Preprocessing resizes, and has the same limit.
        return
    from vlm_encoders.preprocess.sizes import MAX_PIXELS

    for page in plan.pages:
        rows = image_size[0]
        for height, width in (*page.through, page.content[2:], page.canvas):
            # Pillow may resize the width first, so a picture as tall as the last lies between.
            rows, between = height, max(rows, height)
            if between * width > MAX_PIXELS:
                raise VlmError(
                    f"an image of {image_size[0]}x{image_size[1]} px would be resized through {between}x{width} px, "
                    f"over the limit of {MAX_PIXELS} px; crop it first, or allow fewer tiles"
                )
