"""Where an image comes to lie in a view: sizes alone, so that both paths place it alike."""

from __future__ import annotations

from dataclasses import dataclass

from connectors.tokens import Grid
from vlm_encoders.spec import EncoderSpec

__all__ = ["MAX_PIXELS", "Placement", "cover_size", "expand_size", "fit_size", "place"]

MAX_PIXELS = 178_956_970
"""Largest image that is decoded, px, as in Pillow. More is taken for a decompression bomb."""


@dataclass(frozen=True)
class Placement:
    """How an image becomes a view; every pair is of rows and columns, px.

    Attributes:
        image: size of the image.
        canvas: size that it is filled up to before it is resized, itself in the middle.
        resized: size that the canvas is resized to.
        start: first row and column of the resized canvas that the view shows.
        shown: size of the part that it shows; what it leaves of the view is 0.
    """

    image: Grid
    canvas: Grid
    resized: Grid
    start: Grid
    shown: Grid

    @property
    def margin(self) -> Grid:
        """First row and column of the canvas that the image covers."""
        return (self.canvas[0] - self.image[0]) // 2, (self.canvas[1] - self.image[1]) // 2


def place(spec: EncoderSpec, image_size: Grid) -> Placement:
    """Say how an image of (height, width) px becomes a view of this encoder."""
    view = spec.image_size
    if spec.resize == "pad":
        fitted = fit_size(image_size, view)
        return Placement(image_size, image_size, fitted, (0, 0), fitted)
    if spec.resize == "expand":
        return Placement(image_size, expand_size(image_size, view), view, (0, 0), view)
    goal = (int(view[0] / spec.crop_pct), int(view[1] / spec.crop_pct))
    covered = goal if spec.resize == "squash" else cover_size(image_size, goal)
    # torchvision, under timm and open_clip, rounds half to even; transformers rounds down.
    spare = (covered[0] - view[0], covered[1] - view[1])
    down = spec.backend == "transformers"
    start = (spare[0] // 2, spare[1] // 2) if down else (round(spare[0] / 2), round(spare[1] / 2))
    return Placement(image_size, image_size, covered, start, view)


def cover_size(image_size: Grid, goal: Grid) -> Grid:
    """Give the smallest size (height, width) of the image's shape that covers `goal` px."""
    height, width = image_size
    rows, columns = goal
    if rows * width >= columns * height:
        return rows, max(columns, rows * width // height)
    return max(rows, columns * height // width), columns


def fit_size(image_size: Grid, goal: Grid) -> Grid:
    """Give the largest size (height, width) of the image's shape inside `goal` px."""
    height, width = image_size
    scale = min(goal[0] / height, goal[1] / width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def expand_size(image_size: Grid, goal: Grid) -> Grid:
    """Give the smallest size (height, width) of the shape of `goal` that holds the image, the longer side as it is.

    For a square goal it is the square of the longer side; otherwise the other side is
    rounded to the nearest px, half up.
    """
    height, width = image_size
    rows, columns = goal
    if height * columns >= width * rows:
        return height, max(width, (2 * height * columns + rows) // (2 * rows))
    return max(height, (2 * width * rows + columns) // (2 * columns)), width
