"""LLaVA-UHD's slices: cuts that keep their shape, each encoded in a size of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from connectors.errors import VlmError
from connectors.tokens import Grid
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.markers import Markers
from vlm_encoders.tiling.plan import Page, Size, TilePlan, check_sizes
from vlm_encoders.tiling.tiler import Tiler

__all__ = ["UHDTiler"]


@dataclass(frozen=True)
class UHDTiler(Tiler):
    """LLaVA-UHD's and MiniCPM-V's slicing: cuts of nearly the encoder's area, and the whole image at low resolution.

    The image asks for as many slices as its area holds squares of `slice_size` px; grids of so many, one
    fewer or one more are scored by how far the logarithm of their shape lies from that of the image.
    Slices, and the whole image, get that square's area in a shape of their own; an image of no more than
    this area is one view. A strip, of about one to several hundred, gets more: a side has a patch at least.

    Args:
        tile_size: side in px of the view that the encoder is named for, and of every view where `square`.
        slice_size: side in px of the square whose area a view has; None for `tile_size`. The presets
            have the released side; `slice_size=none` follows the encoder.
        patch: px that the sides of views must be a multiple of for the encoder, which tells it.
        merge: tokens of a side that the connector joins to one; sides are whole ones of these.
        max_slices: most slices, without the whole image.
        rounding: how sides are brought to multiples: "floor" in LLaVA-UHD, "nearest", halves to even,
            in MiniCPM-V.
        thumbnail: where the whole image stands: "last" in LLaVA-UHD, "first" in MiniCPM-V.
        square: squash every view to a square of `tile_size` px, for encoders of one size.
        markers: write LLaVA-UHD's comma between slices of a row and its line break behind a row. MiniCPM-V's
            own marks are left out: its `<image>` stands for an image here.

    Source: LLaVA-UHD, arXiv 2403.11703, section 3.1; its released code, in which an image's longest
    side is brought to 1024 px before, which is left out here; transformers `MiniCPMV4_6ImageProcessorPil`.
    """

    tile_size: int = 336
    slice_size: int | None = None
    patch: int = 14
    merge: int = 1
    max_slices: int = 7
    rounding: Literal["floor", "nearest"] = "floor"
    thumbnail: Literal["first", "last"] = "last"
    square: bool = False
    markers: bool = True

    name = "llava-uhd"
    native = True

    def __post_init__(self) -> None:
        """Refuse numbers that leave no slice, and other words."""
        # Squares are views of one size, so that this tiler is native or not by its option.
        object.__setattr__(self, "native", not self.square)
        check_sizes((1, 1), min(self.tile_size, self._slice_size))
        if min(self.patch, self.merge, self.max_slices) < 1:
            raise VlmError(
                f"'{self.name}' has patch={self.patch}, merge={self.merge} and max_slices={self.max_slices}; "
                "use 1 or more"
            )
        if self.rounding not in {"floor", "nearest"} or self.thumbnail not in {"first", "last"}:
            raise VlmError(
                f"'{self.name}' has rounding='{self.rounding}' and thumbnail='{self.thumbnail}'; use floor or nearest, "
                "and first or last"
            )

    @property
    def view_step(self) -> int | None:
        """What both sides of a view are a multiple of, px."""
        return self.patch * self.merge if self.native else None

    @property
    def layout(self) -> TileLayout:
        """View after view; commas and line breaks tell where slices stand."""
        markers = Markers(between=",", row_end="\n") if self.markers else Markers()
        return TileLayout(unpad=False, newline=False, markers=markers)

    @property
    def max_views(self) -> int:
        """The slices, and the whole image."""
        return 1 if self.max_slices == 1 else self.max_slices + 1

    def ranked(self, image_size: Size) -> Iterator[TilePlan]:
        """Give the slices that the image asks for, and then those of ever fewer, down to one view."""
        check_sizes(image_size, self.tile_size)
        before = None
        for most in range(min(self._wanted(image_size) + 1, self.max_slices), 0, -1):
            plan = self._plan(image_size, most)
            if plan != before:
                yield plan
            before = plan

    def check(self, spec: EncoderSpec) -> None:
        """Refuse an encoder that does not take these views.

        Raises:
            VlmError: it takes one size and they have many, or sides of other multiples.
        """
        super().check(spec)
        if self.native and self.patch * self.merge % spec.side_step:
            raise VlmError(
                f"'{self.label}' makes views with sides of multiples of {self.patch * self.merge} px, {spec.name} "
                f"takes multiples of {spec.side_step}; use patch={spec.side_step}"
            )

    @classmethod
    def told_by(cls, spec: EncoderSpec) -> dict[str, Any]:
        """Give the options that an encoder tells: its patch too."""
        return super().told_by(spec) | {"patch": spec.side_step}

    @property
    def _slice_size(self) -> int:
        return self.tile_size if self.slice_size is None else self.slice_size

    def _wanted(self, image_size: Size) -> int:
        return math.ceil(math.prod(image_size) / (self._slice_size * self._slice_size))

    def _plan(self, image_size: Size, most: int) -> TilePlan:
        whole = Page.squashed((1, 1), self._view(*image_size))
        count = min(self._wanted(image_size), most)
        if count <= 1:
            return TilePlan(image_size, (whole,))
        grid = _nearest_grid(image_size, [each for each in (count - 1, count, count + 1) if 1 < each <= most])
        sides = (self._multiple(side, tiles) / tiles for side, tiles in zip(image_size, grid, strict=True))
        slices = Page.squashed(grid, self._view(*sides))
        pages = (whole, slices) if self.thumbnail == "first" else (slices, whole)
        return TilePlan(image_size, pages, self.thumbnail)

    def _view(self, height: float, width: float) -> Size:
        """Give the view of a slice of this shape: about the square's area, in whole patches."""
        if self.square:
            return self.tile_size, self.tile_size
        ratio = width / height
        rows = int(self._slice_size / math.sqrt(ratio))
        step = self.patch * self.merge
        return self._multiple(rows, step), self._multiple(int(rows * ratio), step)

    def _multiple(self, length: int, step: int) -> int:
        count = length // step if self.rounding == "floor" else round(length / step)
        return max(count, 1) * step


def _nearest_grid(image_size: Size, counts: list[int]) -> Grid:
    """Find the grid of one of these numbers of tiles whose shape is nearest to the image's; the first of equals."""
    height, width = image_size
    shape = math.log(width / height)
    grids = [(count // columns, columns) for count in counts for columns in range(1, count + 1) if count % columns == 0]
    return min(grids, key=lambda grid: abs(shape - math.log(grid[1] / grid[0])))
