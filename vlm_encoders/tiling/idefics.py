"""Idefics3's and SmolVLM's tiling: the longest edge brought to a length, then stretched to whole tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from connectors.errors import VlmError
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.markers import Markers
from vlm_encoders.tiling.plan import Page, Size, TilePlan, check_sizes
from vlm_encoders.tiling.tiler import Tiler

__all__ = ["IdeficsTiler"]

_AROUND = "<fake_token_around_image>"
_WHOLE = f"{_AROUND}<global-img>"


@dataclass(frozen=True)
class IdeficsTiler(Tiler):
    """Idefics3's and SmolVLM's splitting: tiles with marks of row and column, the whole image last.

    The image is resized twice, LANCZOS each time: its longest edge to `longest_edge` in its aspect
    ratio, and then to whole tiles. The whole image is made of the result of both.

    Args:
        tile_size: side of a tile in px, the encoder's image size.
        longest_edge: length in px that the longest edge is brought to, up or down; None for four tiles.
        max_side: the most px that a side may have before it is stretched to whole tiles.
        split: cut tiles; without, the image is squashed to one view, after its first resize.
        markers: write the marks around views.

    Source: Idefics3, arXiv 2408.12637; transformers `Idefics3ImageProcessorPil`, whose pixels these are. The
    torchvision one resizes to the same sizes, its levels differ by its own LANCZOS (BICUBIC below torchvision
    0.27). The `get_number_of_image_patches` of both leaves out that the shorter side grows with the longer
    one: where `longest_edge` is no multiple of the tile it counts other rows or columns than they cut.
    """

    tile_size: int = 364
    longest_edge: int | None = None
    max_side: int = 4096
    split: bool = True
    markers: bool = True

    name = "idefics3"

    def __post_init__(self) -> None:
        """Refuse lengths without a pixel."""
        check_sizes((1, 1), self.tile_size)
        if self._longest < 1 or self.max_side < 1:
            raise VlmError(
                f"'{self.name}' has longest_edge={self.longest_edge} and max_side={self.max_side}; give at least 1 px"
            )

    @property
    def layout(self) -> TileLayout:
        """Tile after tile, each behind the mark of its row and column; of transformers `Idefics3Processor`."""
        if not self.markers:
            return TileLayout(unpad=False, newline=False)
        markers = Markers(
            tile=_AROUND + "<row_{row}_col_{column}>",
            row_end="\n",
            thumbnail=f"\n{_WHOLE}",
            thumbnail_end=_AROUND,
            single=_WHOLE,
            single_end=_AROUND,
        )
        return TileLayout(unpad=False, newline=False, markers=markers)

    @property
    def max_views(self) -> int:
        """A square image's tiles, and the whole image."""
        side = self._tiles(min(_even(self._longest), self.max_side)) if self.split else 1
        return 1 if side == 1 else side * side + 1

    def ranked(self, image_size: Size) -> Iterator[TilePlan]:
        """Give the image at its longest edge, and then at ever fewer whole tiles, down to one view."""
        check_sizes(image_size, self.tile_size)
        yield self._plan(image_size, self._longest)
        if self.split:
            tiles = self._tiles(min(self._longest, self.max_side))
            for fewer in range(tiles - 1, 0, -1):
                yield self._plan(image_size, fewer * self.tile_size)

    @property
    def _longest(self) -> int:
        return 4 * self.tile_size if self.longest_edge is None else self.longest_edge

    def _plan(self, image_size: Size, longest: int) -> TilePlan:
        view = (self.tile_size, self.tile_size)
        first = _shrunk(_rescaled(image_size, longest), self.max_side)
        second = self._stretched(first)
        if not self.split or second == view:
            return TilePlan(image_size, (Page.squashed((1, 1), view, through=(first,)),), interpolation="lanczos")
        grid = (second[0] // self.tile_size, second[1] // self.tile_size)
        tiles = Page.squashed(grid, view, through=(first,))
        whole = Page.squashed((1, 1), view, through=(first, second))
        return TilePlan(image_size, (tiles, whole), "last", interpolation="lanczos")

    def _stretched(self, size: Size) -> Size:
        """Give the size of whole tiles: the longer side rounded up first, the other one in its proportion."""
        height, width = size
        ratio = width / height
        if width >= height:
            width = self._tiles(width) * self.tile_size
            return self._tiles(int(width / ratio)) * self.tile_size, width
        height = self._tiles(height) * self.tile_size
        return height, self._tiles(int(height * ratio)) * self.tile_size

    def _tiles(self, side: int) -> int:
        return math.ceil(side / self.tile_size)


def _rescaled(size: Size, longest: int) -> Size:
    """Bring the longest side to a length; the other one is cut to whole px and made even."""
    height, width = size
    ratio = width / height
    if width >= height:
        return max(_even(int(longest / ratio)), 1), longest
    return longest, max(_even(int(longest * ratio)), 1)


def _shrunk(size: Size, most: int) -> Size:
    """Bring the longer side down to `most`, if it is longer."""
    height, width = size
    ratio = width / height
    if width >= height and width > most:
        return max(int(most / ratio), 1), most
    if height > width and height > most:
        return most, max(int(most * ratio), 1)
    return size


def _even(side: int) -> int:
    return side + side % 2
