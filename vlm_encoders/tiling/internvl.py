"""InternVL's dynamic tiling: the grid of nearest aspect ratio, squashed, thumbnail last."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from connectors.errors import VlmError
from connectors.tokens import Grid
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.markers import Markers
from vlm_encoders.tiling.plan import Page, Size, TilePlan, check_sizes
from vlm_encoders.tiling.tiler import Tiler

__all__ = ["InternVLTiler", "grids_between", "plan_internvl"]


@dataclass(frozen=True)
class InternVLTiler(Tiler):
    """InternVL's dynamic tiling: the nearest aspect ratio, squashed, thumbnail last.

    Args:
        tile_size: side of a tile in px, the encoder's image size.
        min_tiles: fewest tiles.
        max_tiles: most tiles, without the thumbnail.
        thumbnail: put the whole image behind the tiles, where there are several.
        markers: write `<img>` in front of the image and `</img>` behind it.
    """

    tile_size: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    markers: bool = True

    name = "internvl"

    def __post_init__(self) -> None:
        self.plan((self.tile_size, self.tile_size))

    @property
    def layout(self) -> TileLayout:
        """Tile after tile, between the marks of an image; of transformers `InternVLProcessor`."""
        markers = Markers(start="<img>", end="</img>") if self.markers else Markers()
        return TileLayout(unpad=False, newline=False, markers=markers)

    @property
    def max_views(self) -> int:
        """`max_tiles`, and the thumbnail where there are several."""
        return self.max_tiles + (self.thumbnail and self.max_tiles > 1)

    def ranked(self, image_size: Size) -> Iterator[TilePlan]:
        """Give the grid of nearest aspect ratio first; see `plan_internvl`."""
        return _plans(image_size, self.tile_size, self.min_tiles, self.max_tiles, thumbnail=self.thumbnail)


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
    return next(_plans(image_size, tile_size, min_tiles, max_tiles, thumbnail=thumbnail))


def _plans(image_size: Size, tile_size: int, min_tiles: int, max_tiles: int, *, thumbnail: bool) -> Iterator[TilePlan]:
    check_sizes(image_size, tile_size)
    if not 1 <= min_tiles <= max_tiles:
        raise VlmError(f"{min_tiles} to {max_tiles} tiles hold no grid; ask for 1 <= min_tiles <= max_tiles")
    height, width = image_size
    view = (tile_size, tile_size)

    def distance(grid: Grid) -> float:
        return abs(width / height - grid[1] / grid[0])

    def large_enough(grid: Grid) -> bool:
        return height * width > 0.5 * tile_size * tile_size * grid[0] * grid[1]

    for _, equal in groupby(sorted(grids_between(min_tiles, max_tiles), key=distance), key=distance):
        # Of equal ones the last that the image is large enough for wins, or else the first.
        near = list(equal)
        for grid in [*filter(large_enough, near[::-1]), *(grid for grid in near if not large_enough(grid))]:
            pages = [Page.squashed(grid, view)]
            if thumbnail and grid != (1, 1):
                pages.append(Page.squashed((1, 1), view))
            yield TilePlan(image_size, tuple(pages), "last" if len(pages) == 2 else None)


@cache
def grids_between(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    """Give the grids of so many tiles, by their number; this order decides InternVL's ties."""
    sides = range(1, max_tiles + 1)
    # Columns run outermost: together with the stable sort this is the order of InternVL.
    grids = [(rows, columns) for columns in sides for rows in sides if min_tiles <= rows * columns <= max_tiles]
    return tuple(sorted(grids, key=math.prod))
