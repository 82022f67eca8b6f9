"""Where an image is cut: integers only, so that tokens are counted before pixels move.

Sizes are (height, width) in px; grids are (rows, columns) of tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, TypeAlias

from connectors.errors import VlmError
from connectors.tokens import Grid

__all__ = ["LLAVA_NEXT_GRIDS", "Box", "Size", "TilePlan", "plan_internvl", "plan_tiles", "whole_image"]

Size: TypeAlias = tuple[int, int]
"""(height, width) in px."""

LLAVA_NEXT_GRIDS: tuple[Grid, ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""The tile grids of LLaVA-NeXT, in the order that decides its ties."""


class Box(NamedTuple):
    """A rectangle in px, from the top left corner of a canvas."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class TilePlan:
    """How one image becomes views.

    Attributes:
        image_size: (height, width) of the image.
        tile_size: side of a tile, and of the thumbnail.
        grid: (rows, columns) of tiles; None where the image itself is the one
            view and the encoder's own preprocessing resizes it.
        content: where the resized image lies on the canvas of all tiles; what is
            around it is padding.
        thumbnail: the whole image squashed to one tile, before the tiles or behind
            them, or no such view.
    """

    image_size: Size
    tile_size: int
    grid: Grid | None
    content: Box
    thumbnail: Literal["first", "last"] | None

    @property
    def num_tiles(self) -> int:
        """Tiles, without the thumbnail; the whole image is one."""
        return 1 if self.grid is None else self.grid[0] * self.grid[1]

    @property
    def num_views(self) -> int:
        """Pictures that the encoder sees."""
        return self.num_tiles + (self.thumbnail is not None)

    @property
    def canvas(self) -> Size:
        """(height, width) in px of all tiles together."""
        rows, columns = self.grid or (1, 1)
        return rows * self.tile_size, columns * self.tile_size

    @property
    def padded(self) -> bool:
        """Whether a part of the canvas is padding."""
        return (self.content.height, self.content.width) != self.canvas


def plan_tiles(
    image_size: Size,
    tile_size: int,
    grids: Sequence[Grid] = LLAVA_NEXT_GRIDS,
    thumbnail: bool = True,  # noqa: FBT001, FBT002
) -> TilePlan:
    """Plan AnyRes: the grid that keeps most of the image, aspect ratio kept, centred.

    Args:
        image_size: (height, width) of the image in px.
        tile_size: side of a tile in px.
        grids: (rows, columns) to choose from; of equal ones the first wins.
        thumbnail: put the whole image, squashed to one tile, in front.

    Raises:
        VlmError: a size is not positive, or there is no grid.

    Source: LLaVA-NeXT; transformers `LlavaNextImageProcessor`, whose float
    operations are repeated in the same order so that no rounding differs.
    """
    _check_sizes(image_size, tile_size)
    if not grids or any(rows < 1 or columns < 1 for rows, columns in grids):
        raise VlmError(
            f"tile grids are (rows, columns) of at least one tile, got {list(grids)}; give for example (1, 2)"
        )
    grid = _fullest_grid(image_size, tile_size, grids)
    content = _centred(image_size, (grid[0] * tile_size, grid[1] * tile_size))
    return TilePlan(image_size, tile_size, grid, content, "first" if thumbnail else None)


def plan_internvl(
    image_size: Size, tile_size: int = 448, *, min_tiles: int = 1, max_tiles: int = 12, thumbnail: bool = True
) -> TilePlan:
    """Plan InternVL's dynamic tiling: the grid of nearest aspect ratio, squashed.

    Args:
        image_size: (height, width) of the image in px.
        tile_size: side of a tile in px.
        min_tiles: fewest tiles.
        max_tiles: most tiles, without the thumbnail.
        thumbnail: put the whole image behind the tiles, where there are several.

    Raises:
        VlmError: a size is not positive, or no number of tiles is allowed.

    Source: InternVL 1.5, section 3.2; transformers `GotOcr2ImageProcessor`.
    """
    _check_sizes(image_size, tile_size)
    if not 1 <= min_tiles <= max_tiles:
        raise VlmError(f"{min_tiles} to {max_tiles} tiles hold no grid; ask for 1 <= min_tiles <= max_tiles")
    height, width = image_size
    best, best_distance = (1, 1), math.inf
    for rows, columns in _grids_between(min_tiles, max_tiles):
        distance = abs(width / height - columns / rows)
        large_enough = height * width > 0.5 * tile_size * tile_size * rows * columns
        if distance < best_distance or (distance == best_distance and large_enough):
            best, best_distance = (rows, columns), distance
    content = Box(0, 0, best[0] * tile_size, best[1] * tile_size)
    return TilePlan(image_size, tile_size, best, content, "last" if thumbnail and best != (1, 1) else None)


def whole_image(image_size: Size, tile_size: int) -> TilePlan:
    """Plan one view: the image itself, resized by the encoder's own preprocessing.

    Raises:
        VlmError: a size is not positive.
    """
    _check_sizes(image_size, tile_size)
    return TilePlan(image_size, tile_size, None, Box(0, 0, tile_size, tile_size), None)


def _check_sizes(image_size: Size, tile_size: int) -> None:
    if min(image_size) < 1 or tile_size < 1:
        height, width = image_size
        raise VlmError(
            f"an image of {height}x{width} px cannot be cut into tiles of {tile_size} px; "
            "sizes are (height, width) of at least 1 px"
        )


def _fullest_grid(image_size: Size, tile_size: int, grids: Sequence[Grid]) -> Grid:
    height, width = image_size
    best, most_kept, least_waste = grids[0], 0, math.inf
    for rows, columns in grids:
        canvas_height, canvas_width = rows * tile_size, columns * tile_size
        scale = min(canvas_width / width, canvas_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        waste = canvas_height * canvas_width - kept
        if kept > most_kept or (kept == most_kept and waste < least_waste):
            best, most_kept, least_waste = (rows, columns), kept, waste
    return best


def _centred(image_size: Size, canvas: Size) -> Box:
    height, width = image_size
    scale_height, scale_width = canvas[0] / height, canvas[1] / width
    if scale_width < scale_height:
        new_height, new_width = min(math.ceil(height * scale_width), canvas[0]), canvas[1]
    else:
        new_height, new_width = canvas[0], min(math.ceil(width * scale_height), canvas[1])
    return Box((canvas[0] - new_height) // 2, (canvas[1] - new_width) // 2, new_height, new_width)


@cache
def _grids_between(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    sides = range(1, max_tiles + 1)
    # Columns run outermost: together with the stable sort this is the order that decides InternVL's ties.
    grids = [(rows, columns) for columns in sides for rows in sides if min_tiles <= rows * columns <= max_tiles]
    return tuple(sorted(grids, key=math.prod))
