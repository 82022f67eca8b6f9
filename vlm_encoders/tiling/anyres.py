"""AnyRes of LLaVA-NeXT and LLaVA-OneVision: the image in its aspect ratio, padded, in tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from connectors.errors import VlmError
from connectors.tokens import Grid
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.plan import Box, Page, Size, TilePlan, check_sizes
from vlm_encoders.tiling.tiler import Tiler

__all__ = ["LLAVA_NEXT_GRIDS", "ONEVISION_GRIDS", "AnyResTiler", "plan_tiles"]

LLAVA_NEXT_GRIDS: tuple[Grid, ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""The tile grids of LLaVA-NeXT, in the order that decides its ties."""

ONEVISION_GRIDS: tuple[Grid, ...] = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7))
"""The tile grids of LLaVA-OneVision, up to 6x6, in the order that decides its ties."""


@dataclass(frozen=True)
class AnyResTiler(Tiler):
    """LLaVA-NeXT's AnyRes: the image in its aspect ratio, padded, in tiles.

    Args:
        tile_size: side of a tile in px, the encoder's image size.
        grids: (rows, columns) to choose from; of equally good ones the first wins.
        thumbnail: put the whole image, squashed to one tile, in front.
        cap: tiles whose tokens the joined map may have; a map of more is brought down bilinearly, as
            in OneVision's `anyres_max_9` with 9. As there, only one of more than 1.21 times as many
            is: at 384 px an image costs up to 8,765 tokens, not 729 * (9 + 1). None for no such limit.
    """

    tile_size: int = 336
    grids: tuple[Grid, ...] = LLAVA_NEXT_GRIDS
    thumbnail: bool = True
    cap: int | None = None

    name = "anyres"

    def __post_init__(self) -> None:
        # JSON and callers bring lists; tuples keep the tiler hashable and equal to what was saved.
        object.__setattr__(self, "grids", tuple((int(rows), int(columns)) for rows, columns in self.grids))
        self.plan((self.tile_size, self.tile_size))

    @property
    def layout(self) -> TileLayout:
        """Rows of the joined map without padding, each ended by the newline."""
        return TileLayout(unpad=True, newline=True, cap=self.cap)

    @property
    def max_views(self) -> int:
        """The tiles of the largest grid, and the thumbnail."""
        return max(rows * columns for rows, columns in self.grids) + self.thumbnail

    def ranked(self, image_size: Size) -> Iterator[TilePlan]:
        """Give the fullest grid first, see `plan_tiles`, and the thumbnail alone last."""
        yield from _plans(image_size, self.tile_size, self.grids, thumbnail=self.thumbnail)
        if self.thumbnail:
            page = Page.squashed((1, 1), (self.tile_size, self.tile_size))
            yield TilePlan(image_size, (page,), resize="squash")


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
    return next(_plans(image_size, tile_size, grids, thumbnail=thumbnail))


def _plans(image_size: Size, tile_size: int, grids: Sequence[Grid], *, thumbnail: bool) -> Iterator[TilePlan]:
    check_sizes(image_size, tile_size)
    if not grids or any(rows < 1 or columns < 1 for rows, columns in grids):
        raise VlmError(
            f"tile grids are (rows, columns) of at least one tile, got {list(grids)}; give for example (1, 2)"
        )
    view = (tile_size, tile_size)
    front = (Page.squashed((1, 1), view),) if thumbnail else ()
    for grid in sorted(grids, key=lambda grid: _merit(image_size, tile_size, grid)):
        page = Page(grid, view, _centred(image_size, (grid[0] * tile_size, grid[1] * tile_size)))
        yield TilePlan(image_size, (*front, page), "first" if thumbnail else None)


def _merit(image_size: Size, tile_size: int, grid: Grid) -> tuple[int, int]:
    """Give (lost px, wasted px) but for a constant: the least is best."""
    height, width = image_size
    canvas_height, canvas_width = grid[0] * tile_size, grid[1] * tile_size
    scale = min(canvas_width / width, canvas_height / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    return -kept, canvas_height * canvas_width - kept


def _centred(image_size: Size, canvas: Size) -> Box:
    height, width = image_size
    scale_height, scale_width = canvas[0] / height, canvas[1] / width
    if scale_width < scale_height:
        new_height, new_width = min(math.ceil(height * scale_width), canvas[0]), canvas[1]
    else:
        new_height, new_width = canvas[0], min(math.ceil(width * scale_height), canvas[1])
    return Box((canvas[0] - new_height) // 2, (canvas[1] - new_width) // 2, new_height, new_width)
