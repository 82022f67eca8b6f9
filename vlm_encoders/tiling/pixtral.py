"""Pixtral and Mistral 3: the longest edge bounded, sides rounded up to patches, a break behind each row of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from connectors.errors import VlmError
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.markers import Markers
from vlm_encoders.tiling.native import NativeTiler
from vlm_encoders.tiling.plan import Size, check_sizes

__all__ = ["PixtralTiler"]

_MARKERS = Markers(token_row="[IMG_BREAK]", end="[IMG_END]")  # noqa: S106


@dataclass(frozen=True)
class PixtralTiler(NativeTiler):
    """Pixtral's rule: smaller images keep their size, larger ones shrink to the longest edge.

    Mistral 3 is patch=14, merge=2, longest_edge=1540. One deviation: images so thin that the source's
    rounding leaves them no pixel, and its resize fails, have one multiple here.

    Args:
        longest_edge: most px of a side, before it is rounded up to a multiple.
        markers: write `[IMG_BREAK]` between rows of tokens and `[IMG_END]` behind the last.

    Source: transformers `PixtralImageProcessor`, `PixtralProcessor`.
    """

    longest_edge: int = 1024
    markers: bool = True

    name = "pixtral"

    def __post_init__(self) -> None:
        """Refuse an edge without pixels."""
        super().__post_init__()
        if self.longest_edge < 1:
            raise VlmError(f"'{self.name}' has longest_edge={self.longest_edge}; use 1 px or more")

    @property
    def layout(self) -> TileLayout:
        """The tokens in rows, with text between and behind them."""
        return TileLayout(unpad=False, newline=False, markers=_MARKERS if self.markers else Markers())

    def view_size(self, image_size: Size) -> Size:
        """Give the view under the longest edge."""
        return self.smaller(image_size, self.longest_edge)

    def smaller(self, image_size: Size, limit: int) -> Size:
        """Give the view under another longest edge, px."""
        check_sizes(image_size, limit)
        ratio = max(side / limit for side in image_size)
        sides = image_size if ratio <= 1 else tuple(math.floor(side / ratio) for side in image_size)
        rows, columns = (max(1, -(-side // self.multiple)) for side in sides)
        return rows * self.multiple, columns * self.multiple

    def limit(self, image_size: Size) -> int:
        """Give one px less than the longest edge, the image's own or the rule's."""
        return min(self.longest_edge, max(image_size)) - 1
