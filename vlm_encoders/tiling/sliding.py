"""Plain tiles: as many along each side as the image is long, no search for an aspect ratio."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from connectors.errors import VlmError
from connectors.tokens import Grid
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.plan import Page, Size, TilePlan, check_sizes
from vlm_encoders.tiling.tiler import Tiler

__all__ = ["SlidingTiler"]


@dataclass(frozen=True)
class SlidingTiler(Tiler):
    """Plain tiles near the image's own resolution, and a thumbnail: 1024x1024 px are 4 tiles of 448 px and 1 thumbnail.

    Along a side stand as many tiles as come nearest to its length, halves rounded up, at least one;
    the image is squashed to just these. The thumbnail is last, as in InternVL and Idefics3, and left
    out where the one tile shows the whole image already. Views follow one another in the prompt:
    tiles that overlap hold the same place twice, so no map of single places could be joined of them.

    Args:
        tile_size: side of a tile in px, the encoder's image size.
        overlap: px that neighbouring tiles share.
        max_tiles: most tiles, without the thumbnail; a larger grid shrinks to that of the largest
            smaller copy of the image whose tiles are few enough. None for no such limit.
        thumbnail: put the whole image behind the tiles, where there are several.
    """

    tile_size: int = 448
    overlap: int = 0
    max_tiles: int | None = None
    thumbnail: bool = True

    name = "tiles"

    def __post_init__(self) -> None:
        """Refuse an overlap or a number of tiles that leaves no grid."""
        check_sizes((1, 1), self.tile_size)
        if not 0 <= self.overlap < self.tile_size:
            raise VlmError(
                f"tiles of {self.tile_size} px cannot overlap by {self.overlap} px; use 0 to {self.tile_size - 1}"
            )
        if self.max_tiles is not None and self.max_tiles < 1:
            raise VlmError(f"max_tiles={self.max_tiles} leaves no tile; use 1 or more, or None for no limit")

    @property
    def layout(self) -> TileLayout:
        """Tile after tile, the thumbnail last."""
        return TileLayout(unpad=False, newline=False)

    @property
    def max_views(self) -> int | None:
        """`max_tiles`, and the thumbnail where there are several; None without that limit."""
        return None if self.max_tiles is None else self.max_tiles + (self.thumbnail and self.max_tiles > 1)

    def ranked(self, image_size: Size) -> Iterator[TilePlan]:
        """Give the full grid first, then those of ever smaller copies of the image, to the one view at the end."""
        check_sizes(image_size, self.tile_size)
        view = (self.tile_size, self.tile_size)
        for grid in self._grids(image_size):
            if self.max_tiles is not None and grid[0] * grid[1] > self.max_tiles:
                continue
            pages = [Page.squashed(grid, view, overlap=self.overlap)]
            if self.thumbnail and grid != (1, 1):
                pages.append(Page.squashed((1, 1), view))
            yield TilePlan(image_size, tuple(pages), "last" if len(pages) == 2 else None)

    def _grids(self, image_size: Size) -> Iterator[Grid]:
        height, width = image_size
        rows, columns = self._count(height), self._count(width)
        while (rows, columns) != (1, 1):
            yield rows, columns
            # As the copy shrinks, that side loses a tile first whose least length for its tiles is the
            # larger part of what it is now; whole numbers, so that sides that tie lose theirs at once.
            row_part, column_part = self._least(rows) * width, self._least(columns) * height
            rows, columns = rows - (row_part >= column_part), columns - (column_part >= row_part)
        yield 1, 1

    def _count(self, side: int) -> int:
        """Count the tiles along a side, halves rounded up."""
        step = self.tile_size - self.overlap
        return max(1, (2 * (side - self.overlap) + step) // (2 * step))

    def _least(self, count: int) -> int:
        """Give twice the least px of a side with so many tiles; the one tile that always stays needs none."""
        return 0 if count == 1 else 2 * self.overlap + (2 * count - 1) * (self.tile_size - self.overlap)
