"""How an image becomes views: integers only, so that tokens are counted before pixels move.

Sizes are (height, width) in px; grids are (rows, columns) of tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from connectors.errors import VlmError
from connectors.tokens import Grid
from vlm_encoders.spec_values import Interpolation, Resize

__all__ = ["Box", "Page", "Size", "TilePlan", "check_sizes"]

Size: TypeAlias = tuple[int, int]
"""(height, width) in px."""


class Box(NamedTuple):
    """A rectangle in px, from the top left corner of a canvas."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Page:
    """The image at one scale: resized, laid on a canvas, and cut into views of one size, row by row.

    Attributes:
        grid: (rows, columns) of views.
        view: (height, width) of each view, px.
        content: where the resized image lies on the canvas; what is around it is black padding.
        through: sizes that the image is resized to before, one after the other.
        overlap: px that neighbouring views share.
    """

    grid: Grid
    view: Size
    content: Box
    through: tuple[Size, ...] = ()
    overlap: int = 0

    @classmethod
    def squashed(cls, grid: Grid, view: Size, *, through: tuple[Size, ...] = (), overlap: int = 0) -> Page:
        """Fill the whole canvas with the image, whatever its aspect ratio."""
        page = cls(grid, view, Box(0, 0, 1, 1), through, overlap)
        return cls(grid, view, Box(0, 0, *page.canvas), through, overlap)

    @property
    def num_views(self) -> int:
        """Views, row by row."""
        return self.grid[0] * self.grid[1]

    @property
    def canvas(self) -> Size:
        """(height, width) in px of all views together."""
        height, width = (
            count * side - (count - 1) * self.overlap for count, side in zip(self.grid, self.view, strict=True)
        )
        return height, width

    @property
    def padded(self) -> bool:
        """Whether a part of the canvas is padding."""
        return (self.content.height, self.content.width) != self.canvas

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Where each view lies on the canvas, row by row."""
        height, width = self.view
        return tuple(
            Box(row * (height - self.overlap), column * (width - self.overlap), height, width)
            for row in range(self.grid[0])
            for column in range(self.grid[1])
        )


@dataclass(frozen=True)
class TilePlan:
    """How one image becomes views.

    Attributes:
        image_size: (height, width) of the image.
        pages: the scales at which the image is cut, in the order of their views.
        thumbnail: which page shows the whole image as one view beside the tiles: the first or
            the last; None without such a view.
        resize: how preprocessing makes the one view of the whole image, by a word of
            `EncoderSpec.resize` or "encoder" for the encoder's own; None where the page says it.
        interpolation: the filter of the resize; `resize` has the encoder's.
    """

    image_size: Size
    pages: tuple[Page, ...]
    thumbnail: Literal["first", "last"] | None = None
    resize: Resize | Literal["encoder"] | None = field(default=None, kw_only=True)
    interpolation: Interpolation = field(default="bicubic", kw_only=True)

    @property
    def main_place(self) -> int:
        """Which page has the tiles: the last that is no thumbnail."""
        return len(self.pages) - (2 if self.thumbnail == "last" else 1)

    @property
    def thumbnail_place(self) -> int | None:
        """Which page is the thumbnail."""
        return None if self.thumbnail is None else 0 if self.thumbnail == "first" else len(self.pages) - 1

    @property
    def main(self) -> Page:
        """The page of the tiles."""
        return self.pages[self.main_place]

    @property
    def grid(self) -> Grid | None:
        """(rows, columns) of tiles; None where the whole image is the one view, and preprocessing resizes it."""
        return None if self.resize else self.main.grid

    @property
    def tile_size(self) -> int:
        """Height of a tile, px; its side where tiles are square."""
        return self.main.view[0]

    @property
    def content(self) -> Box:
        """Where the resized image lies on the canvas of all tiles."""
        return self.main.content

    @property
    def canvas(self) -> Size:
        """(height, width) in px of all tiles together."""
        return self.main.canvas

    @property
    def padded(self) -> bool:
        """Whether a part of the tiles' canvas is padding."""
        return self.main.padded

    @property
    def num_tiles(self) -> int:
        """Tiles, without the thumbnail and other scales; the whole image is one."""
        return self.main.num_views

    @property
    def num_views(self) -> int:
        """Pictures that the encoder sees."""
        return sum(page.num_views for page in self.pages)

    @property
    def views(self) -> tuple[Size, ...]:
        """(height, width) of each view in order, px."""
        return tuple(page.view for page in self.pages for _ in range(page.num_views))


def check_sizes(image_size: Size, tile_size: int) -> None:
    """Refuse sizes that are not positive whole numbers.

    Raises:
        VlmError: one is not.
    """
    sides = tuple(image_size) if isinstance(image_size, (tuple, list)) else ()
    if len(sides) != 2 or not all(hasattr(side, "__index__") for side in (*sides, tile_size)):
        raise VlmError(f"an image size is (height, width) in px, two whole numbers, got {image_size!r}")
    if min(*sides, tile_size) < 1:
        height, width = sides
        tiles = f" into tiles of {tile_size} px" if tile_size != 1 else ""
        raise VlmError(
            f"an image of {height}x{width} px cannot be cut{tiles}; sizes are (height, width) of at least 1 px"
        )
