"""UReader's shape-adaptive grids, and Monkey's one grid: the image squashed to tiles beside the whole image."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from connectors.errors import VlmError
from connectors.tokens import Grid
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.markers import Markers
from vlm_encoders.tiling.plan import Page, Size, TilePlan, check_sizes
from vlm_encoders.tiling.tiler import Tiler

__all__ = ["DOCOWL_GRIDS", "UREADER_GRIDS", "MonkeyTiler", "UReaderTiler"]


def _grids(*sides: str) -> tuple[Grid, ...]:
    return tuple((int(rows), int(columns)) for rows, columns in (side.split("x") for side in sides))


UREADER_GRIDS: tuple[Grid, ...] = _grids(
    *("1x1", "1x2", "2x1", "1x3", "3x1", "1x4", "2x2", "4x1", "1x5", "5x1", "1x6", "2x3", "3x2", "6x1", "1x7", "7x1"),
    *("1x8", "2x4", "4x2", "8x1", "1x9", "3x3", "9x1", "1x10", "2x5", "5x2", "10x1", "1x11", "11x1", "2x6", "3x4"),
    *("4x3", "6x2", "2x7", "7x2", "3x5", "5x3", "2x8", "4x4", "8x2", "2x9", "3x6", "6x3", "9x2", "2x10", "4x5"),
    *("5x4", "10x2"),
)
"""UReader's tile grids of up to 20 tiles, in the order that decides its ties."""

DOCOWL_GRIDS: tuple[Grid, ...] = _grids(
    *("1x1", "1x2", "2x1", "1x3", "3x1", "2x2", "1x4", "4x1", "1x5", "5x1", "1x6", "6x1", "2x3", "3x2", "1x7", "7x1"),
    *("4x2", "2x4", "1x8", "8x1", "3x3", "1x9", "9x1"),
)
"""The tile grids of DocOwl 1.5, up to 9 tiles, in the order that decides its ties."""


@dataclass(frozen=True)
class UReaderTiler(Tiler):
    """UReader's and DocOwl's shape-adaptive cropping: the grid that overlaps the image most, the whole image first.

    A grid's canvas is laid over the image, corner on corner. What counts is the overlap (intersection
    over union) with the image brought to the canvas's width, a hundred times, and the overlap with
    the image as large as it is. The image is squashed to the best grid; its whole view is squashed too,
    and there for the grid of one tile as well.

    Args:
        tile_size: side of a tile in px, the encoder's image size.
        grids: (rows, columns) to choose from; of equally good ones the first wins.
        thumbnail: put the whole image in front.
        markers: write DocOwl 1.5's marks in front of the views; UReader has none.

    Source: UReader, arXiv 2310.05126, section 3.1; DocOwl 1.5, arXiv 2403.12895. The scores are
    rounded to float32 after each step, as the tensors of their code are, so that the same grids tie.
    """

    tile_size: int = 224
    grids: tuple[Grid, ...] = UREADER_GRIDS
    thumbnail: bool = True
    markers: bool = False

    name = "ureader"

    def __post_init__(self) -> None:
        """Refuse grids without a tile."""
        # JSON and callers bring lists; tuples keep the tiler hashable and equal to what was saved.
        object.__setattr__(self, "grids", tuple((int(rows), int(columns)) for rows, columns in self.grids))
        check_sizes((1, 1), self.tile_size)
        if not self.grids or min(map(min, self.grids)) < 1:
            raise VlmError(f"'{self.name}' takes grids of at least one tile, got {list(self.grids)}; give (1, 2)")

    @property
    def layout(self) -> TileLayout:
        """View after view, behind DocOwl 1.5's marks where they are asked for."""
        markers = Markers(thumbnail="<global_img>", tile="<crop_img_row{row0}_col{column0}>", single="<global_img>")
        return TileLayout(unpad=False, newline=False, markers=markers if self.markers else Markers())

    @property
    def max_views(self) -> int:
        """The tiles of the largest grid, and the thumbnail."""
        return max(rows * columns for rows, columns in self.grids) + self.thumbnail

    def ranked(self, image_size: Size) -> Iterator[TilePlan]:
        """Give the grid that overlaps most first, and the thumbnail alone last."""
        check_sizes(image_size, self.tile_size)
        view = (self.tile_size, self.tile_size)
        whole = Page.squashed((1, 1), view)
        for grid in sorted(self.grids, key=lambda grid: -_overlap(image_size, grid, self.tile_size)):
            page = Page.squashed(grid, view)
            yield TilePlan(image_size, (whole, page), "first") if self.thumbnail else TilePlan(image_size, (page,))
        if self.thumbnail:
            yield TilePlan(image_size, (whole,))


@dataclass(frozen=True)
class MonkeyTiler(Tiler):
    """Monkey's windows: the image squashed to one grid whatever its shape, and the whole of it last.

    The whole view is made of the squashed image, as in Monkey. There it is resized as normalised
    pixels, bicubic without antialiasing, here as an image with it.

    Args:
        tile_size: side of a window in px, the encoder's image size.
        grid: (rows, columns) of windows.
        thumbnail: put the whole image behind them.
        markers: write `<img>` in front of the image and `</img>` behind it.

    Source: Monkey, arXiv 2311.06607, section 3.1, whose windows of 448 px make 896 x 896.
    """

    tile_size: int = 448
    grid: Grid = (2, 2)
    thumbnail: bool = True
    markers: bool = True

    name = "monkey"

    def __post_init__(self) -> None:
        """Refuse a grid without a tile."""
        object.__setattr__(self, "grid", (int(self.grid[0]), int(self.grid[1])))
        check_sizes((1, 1), self.tile_size)
        if min(self.grid) < 1:
            raise VlmError(f"'{self.name}' takes a grid of at least one tile, got {self.grid}; give (2, 2)")

    @property
    def layout(self) -> TileLayout:
        """View after view, between the marks of an image."""
        markers = Markers(start="<img>", end="</img>") if self.markers else Markers()
        return TileLayout(unpad=False, newline=False, markers=markers)

    @property
    def max_views(self) -> int:
        """The windows, and the whole image."""
        return self.grid[0] * self.grid[1] + self.thumbnail

    def ranked(self, image_size: Size) -> Iterator[TilePlan]:
        """Give the grid, and then the whole image as one view."""
        check_sizes(image_size, self.tile_size)
        view = (self.tile_size, self.tile_size)
        windows = Page.squashed(self.grid, view)
        whole = Page.squashed((1, 1), view, through=(windows.canvas,))
        yield TilePlan(image_size, (windows, whole), "last") if self.thumbnail else TilePlan(image_size, (windows,))
        yield TilePlan(image_size, (whole,))


def _overlap(image_size: Size, grid: Grid, tile_size: int) -> float:
    """Score a grid: 100 times the overlap of shapes, and the overlap of sizes, in float32."""
    rows, columns = grid[0] * tile_size, grid[1] * tile_size
    height, width = image_size
    in_shape = int(_single(_single(height / width) * columns))
    shape = _iou((rows, columns), (in_shape, columns))
    return _single(_single(shape * 100) + _iou((rows, columns), image_size))


def _iou(one: Size, other: Size) -> float:
    """Give the intersection over union of two rectangles with one corner in common."""
    inside = min(one[0], other[0]) * min(one[1], other[1])
    union = one[0] * one[1] + other[0] * other[1] - inside
    return _single(_single(inside) / _single(_single(union) + _single(1e-5)))


def _single(value: float) -> float:
    """Round to float32; of two of them, a sum, product or quotient rounded so is the one in float32."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded
