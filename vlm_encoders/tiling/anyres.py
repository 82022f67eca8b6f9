"""Tilers: one object that plans, cuts, and knows the layout of its views."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from connectors.errors import UnknownNameError, VlmError
from connectors.registry import nearest
from connectors.tokens import Grid, TokenSpec
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling.cut import cut
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.plan import LLAVA_NEXT_GRIDS, Size, TilePlan, plan_internvl, plan_tiles, whole_image

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["TILERS", "AnyResTiler", "InternVLTiler", "Tiler", "WholeImage", "build_tiler", "tiler_from_config"]


@dataclass(frozen=True)
class Tiler(ABC):
    """What turns an image into views: a plan of integers, then pixels, then tokens.

    Attributes:
        name: on the command line and in checkpoints.
        layout: what released models use with this tiler, where tokens have a grid.
        tile_size: side of a view in px, the encoder's image size.
    """

    name: ClassVar[str]
    layout: ClassVar[TileLayout]
    tile_size: int

    @abstractmethod
    def plan(self, image_size: Size) -> TilePlan:
        """Plan the views of an image of (height, width) px."""

    @property
    @abstractmethod
    def max_views(self) -> int:
        """The most views that an image can become."""

    def cut(self, image: Image, plan: TilePlan) -> list[Image]:
        """Cut an image into the views of its plan; see `cut.cut`."""
        return cut(image, plan)

    def check(self, spec: EncoderSpec) -> None:
        """Refuse an encoder whose views are not this tiler's tiles.

        Raises:
            VlmError: the sizes differ, so that each tile would be resized once more.
        """
        if self.max_views > 1 and spec.image_size != (self.tile_size, self.tile_size):
            height, width = spec.image_size
            use = f"use tile_size={height}" if height == width else "build the encoder for square views"
            raise VlmError(
                f"'{self.name}' cuts tiles of {self.tile_size} px, but {spec.name} sees {height}x{width} px; {use}"
            )

    def layout_for(self, spec: TokenSpec) -> TileLayout:
        """Give the layout for tokens of this shape: queries have no rows, so their views follow one another."""
        return self.layout if spec.grid is not None else TileLayout(unpad=False, newline=False)

    def config(self) -> dict[str, Any]:
        """Give what `tiler_from_config` makes this tiler of again; JSON can hold it."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class WholeImage(Tiler):
    """One view: the image itself, resized by the encoder's own preprocessing.

    Args:
        tile_size: side of the picture that the encoder sees, in px.
    """

    name = "whole"
    layout = TileLayout(unpad=False, newline=False)

    @property
    def max_views(self) -> int:
        """One."""
        return 1

    def plan(self, image_size: Size) -> TilePlan:
        """Plan the one view."""
        return whole_image(image_size, self.tile_size)


@dataclass(frozen=True)
class AnyResTiler(Tiler):
    """LLaVA-NeXT's AnyRes: the image in its aspect ratio, padded, in tiles.

    Args:
        tile_size: side of a tile in px, the encoder's image size.
        grids: (rows, columns) to choose from; of equally good ones the first wins.
        thumbnail: put the whole image, squashed to one tile, in front.
    """

    tile_size: int = 336
    grids: tuple[Grid, ...] = LLAVA_NEXT_GRIDS
    thumbnail: bool = True

    name = "anyres"
    layout = TileLayout(unpad=True, newline=True)

    def __post_init__(self) -> None:
        # JSON and callers bring lists; tuples keep the tiler hashable and equal to what was saved.
        object.__setattr__(self, "grids", tuple((int(rows), int(columns)) for rows, columns in self.grids))
        self.plan((self.tile_size, self.tile_size))

    @property
    def max_views(self) -> int:
        """The tiles of the largest grid, and the thumbnail."""
        return max(rows * columns for rows, columns in self.grids) + self.thumbnail

    def plan(self, image_size: Size) -> TilePlan:
        """Plan the fullest grid; see `plan_tiles`."""
        return plan_tiles(image_size, self.tile_size, self.grids, thumbnail=self.thumbnail)


@dataclass(frozen=True)
class InternVLTiler(Tiler):
    """InternVL's dynamic tiling: the nearest aspect ratio, squashed, thumbnail last.

    Args:
        tile_size: side of a tile in px, the encoder's image size.
        min_tiles: fewest tiles.
        max_tiles: most tiles, without the thumbnail.
        thumbnail: put the whole image behind the tiles, where there are several.
    """

    tile_size: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True

    name = "internvl"
    layout = TileLayout(unpad=False, newline=False)

    def __post_init__(self) -> None:
        self.plan((self.tile_size, self.tile_size))

    @property
    def max_views(self) -> int:
        """`max_tiles`, and the thumbnail where there are several."""
        return self.max_tiles + (self.thumbnail and self.max_tiles > 1)

    def plan(self, image_size: Size) -> TilePlan:
        """Plan the grid of nearest aspect ratio; see `plan_internvl`."""
        return plan_internvl(
            image_size, self.tile_size, min_tiles=self.min_tiles, max_tiles=self.max_tiles, thumbnail=self.thumbnail
        )


TILERS: dict[str, type[Tiler]] = {tiler.name: tiler for tiler in (WholeImage, AnyResTiler, InternVLTiler)}
"""The tilers by name."""


def build_tiler(name: str, tile_size: int, **options: Any) -> Tiler:
    """Make a tiler by name, for an encoder that sees pictures of `tile_size` px.

    Raises:
        UnknownNameError: no tiler has this name.
        VlmError: an option is unknown or wrong.
    """
    if name not in TILERS:
        raise UnknownNameError(f"no tiler '{name}'; {nearest(name, list(TILERS))}")
    cls = TILERS[name]
    known = [field.name for field in fields(cls)]
    for option in options:
        if option not in known:
            raise VlmError(f"tiler '{name}' has no option '{option}'; it takes {', '.join(known)}")
    return cls(tile_size=tile_size, **options)


def tiler_from_config(config: Mapping[str, Any]) -> Tiler:
    """Make the tiler whose `config` this is.

    Raises:
        UnknownNameError: no tiler has this name.
        VlmError: the name or the tile size is missing, or an option is unknown.
    """
    options = dict(config)
    try:
        name, tile_size = options.pop("name"), options.pop("tile_size")
    except KeyError as error:
        raise VlmError(f"a tiler's config needs name and tile_size, got {', '.join(config) or 'nothing'}") from error
    return build_tiler(name, tile_size, **options)
