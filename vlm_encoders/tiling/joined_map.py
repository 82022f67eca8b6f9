"""The map of all tiles together: which of its tokens show the image, and how many may stay."""

from __future__ import annotations

import math
from typing import NamedTuple

from connectors.tokens import Grid
from vlm_encoders.tiling.plan import Size, TilePlan

__all__ = ["Window", "cap_grid", "shown_window"]


class Window(NamedTuple):
    """Tokens of a joined map, from its top left."""

    top: int
    left: int
    rows: int
    columns: int


def shown_window(plan: TilePlan, grid: Grid, *, unpad: bool) -> Window:
    """Find the tokens of the joined map that stay.

    Args:
        plan: whose tiles are joined.
        grid: (rows, columns) of a tile's tokens.
        unpad: drop those that show padding.
    """
    rows, columns = (tiles * side for tiles, side in zip(plan.main.grid, grid, strict=True))
    if not (unpad and plan.padded):
        return Window(0, 0, rows, columns)
    # Without a thumbnail an image thinner than a token would leave no token at all.
    return _without_padding(plan.image_size, rows, columns, least=0 if plan.thumbnail else 1)


def cap_grid(rows: int, columns: int, most: int | None) -> Grid:
    """Bring a map with more tokens than `most` down to it, in its shape.

    Source: transformers `LlavaOnevisionModel.pack_image_features`. A map of up to 1.21 times as
    many stays as it is; a side that would come to nothing, where that class fails, keeps one.
    """
    if most is None:
        return rows, columns
    ratio = math.sqrt(rows * columns / most)
    return (max(1, int(rows // ratio)), max(1, int(columns // ratio))) if ratio > 1.1 else (rows, columns)


def _without_padding(image_size: Size, rows: int, columns: int, least: int) -> Window:
    """Find the tokens that show the image, at least so many rows or columns.

    Source: transformers `unpad_image`, whose rounding to seven places gives just these whole
    numbers: 836 * 24 / 352 is 57, and not the 56.999... of floats, by which LLaVA-NeXT's own code
    drops one column more at either side. An odd number of padding rows leaves one in, and an image
    far thinner than a token leaves none.
    """
    height, width = image_size
    if width * rows > columns * height:
        padding = (rows - max(least, height * columns // width)) // 2
        return Window(padding, 0, rows - 2 * padding, columns)
    padding = (columns - max(least, width * rows // height)) // 2
    return Window(0, padding, rows, columns - 2 * padding)
