"""S2 and dynamic S2: the image at several scales, joined channel by channel before the connector."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from connectors.errors import VlmError
from vlm_encoders.tiling.internvl import InternVLTiler
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.markers import Markers
from vlm_encoders.tiling.plan import Page, Size, TilePlan, check_sizes
from vlm_encoders.tiling.tiler import Tiler

__all__ = ["DynamicS2Tiler", "S2Tiler"]

_MOST = 32
"""Views along a side, beyond which somebody has written px."""


@dataclass(frozen=True)
class S2Tiler(Tiler):
    """S2: the image squashed to growing squares, their maps averaged to the first one's grid.

    An image costs as many tokens as one view, each of them `len(scales)` times as wide. Every scale is
    resized from the image itself; LLaVA-1.5's and S2's own code resizes the normalised pixels of one
    scale to the others without antialiasing, as the encoder `multiscale:` does.

    Args:
        tile_size: side of a view in px, the encoder's image size.
        scales: views along a side at each scale, growing.

    Source: S2, arXiv 2403.13043; `s2wrapper.forward`.
    """

    tile_size: int = 336
    scales: tuple[int, ...] = (1, 2, 3)

    name = "s2"

    def __post_init__(self) -> None:
        """Refuse scales that do not grow."""
        object.__setattr__(self, "scales", tuple(self.scales))
        _require_growing(self.name, self.scales)

    @property
    def layout(self) -> TileLayout:
        """Token after token of the first scale's grid."""
        return TileLayout(unpad=False, newline=False, scales=len(self.scales), joined_on="first")

    @property
    def max_views(self) -> int:
        """The views of all scales."""
        return sum(scale * scale for scale in self.scales)

    def ranked(self, image_size: Size) -> Iterator[TilePlan]:
        """Give the one plan: every image costs the same."""
        check_sizes(image_size, self.tile_size)
        yield TilePlan(image_size, _squares(self.scales, self.tile_size))


@dataclass(frozen=True)
class DynamicS2Tiler(Tiler):
    """NVILA's dynamic S2: squares at the smaller scales, InternVL's grid at the largest, all joined on that grid.

    Args:
        tile_size: side of a view in px, the encoder's image size.
        scales: views along a side at each scale, growing; at the last one its square is only the least
            number of tiles.
        max_tiles: most tiles at the last scale.
        markers: end an image with a line break.

    Source: NVILA, arXiv 2412.04468; VILA's `dynamic_s2_preprocess` and `merge_features_for_dynamic_s2`.
    """

    tile_size: int = 448
    scales: tuple[int, ...] = (1, 2, 3)
    max_tiles: int = 12
    markers: bool = True

    name = "dynamic-s2"

    def __post_init__(self) -> None:
        """Refuse scales that do not grow, or that need more tiles than there may be."""
        object.__setattr__(self, "scales", tuple(self.scales))
        _require_growing(self.name, self.scales)
        if self._min_tiles > self.max_tiles:
            raise VlmError(
                f"'{self.name}' has at least {self._min_tiles} tiles at scale {self.scales[-1]}, but "
                f"max_tiles={self.max_tiles}; raise it, or use smaller scales"
            )

    @property
    def layout(self) -> TileLayout:
        """The joined map row by row, and a line break as of VILA's `BasicImageEncoder`."""
        markers = Markers(end="\n") if self.markers else Markers()
        return TileLayout(unpad=False, newline=False, rows=True, markers=markers, scales=len(self.scales))

    @property
    def max_views(self) -> int:
        """The squares, and `max_tiles`."""
        return sum(scale * scale for scale in self.scales[:-1]) + self.max_tiles

    def ranked(self, image_size: Size) -> Iterator[TilePlan]:
        """Give the grid of nearest aspect ratio first, and the image as one view last."""
        view = (self.tile_size, self.tile_size)
        squares = _squares(self.scales[:-1], self.tile_size)
        grids = InternVLTiler(self.tile_size, self._min_tiles, self.max_tiles, thumbnail=False)
        for plan in grids.ranked(image_size):
            yield TilePlan(image_size, (*squares, plan.main))
        yield TilePlan(image_size, (Page.squashed((1, 1), view),))

    @property
    def _min_tiles(self) -> int:
        return self.scales[-1] ** 2


def _squares(sides: tuple[int, ...], tile_size: int) -> tuple[Page, ...]:
    return tuple(Page.squashed((side, side), (tile_size, tile_size)) for side in sides)


def _require_growing(name: str, scales: tuple[int, ...]) -> None:
    if not scales or scales[0] < 1 or list(scales) != sorted(set(scales)):
        raise VlmError(f"'{name}' takes growing scales of at least 1, got {list(scales)}; use for example 1, 2, 3")
    if scales[-1] > _MOST:
        raise VlmError(
            f"'{name}' has {scales[-1]} views along a side at scale {scales[-1]}; scales are views along a side and no "
            f"px, such as 1/2/3, and {_MOST} at most"
        )
