"""Any image near its own size, for every encoder of native resolution."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlm_encoders.tiling.native import NativeTiler, check_area, last_holding
from vlm_encoders.tiling.plan import Size

__all__ = ["AnySizeTiler"]


@dataclass(frozen=True)
class AnySizeTiler(NativeTiler):
    """The image near its own size: the longer side to the nearest multiple, the shorter as the shape then asks.

    Only images outside of the area's bounds are scaled. No released model's rule; it is all in whole
    numbers, keeps the shape as well as multiples can for the longer side, and holds for the thinnest image.

    Args:
        min_pixels: least height x width of the view, px; a thin image may have fewer where one more
            multiple would be more than `max_pixels`.
        max_pixels: most, but for a view of one multiple.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 1024 * 1024

    name = "native"

    def __post_init__(self) -> None:
        """Refuse bounds that no area has."""
        super().__post_init__()
        check_area(self.name, self.min_pixels, self.max_pixels)

    def view_size(self, image_size: Size) -> Size:
        """Give the view whose longer side has as many multiples as it may have, one more than `limit` says."""
        return self.smaller(image_size, self.limit(image_size) + 1)

    def smaller(self, image_size: Size, limit: int) -> Size:
        """Give the view whose longer side has `limit` multiples."""
        long, short = max(image_size), min(image_size)
        across = max(1, _nearest(short * limit, long))
        sides = limit * self.multiple, across * self.multiple
        return sides if image_size[0] == long else sides[::-1]

    def limit(self, image_size: Size) -> int:
        """Give one multiple less than the longer side of the view has."""
        own = max(1, _nearest(max(image_size), self.multiple))
        if self._area(image_size, own) < self.min_pixels:
            # So many in one row would be enough.
            enough = -(-self.min_pixels // self.multiple**2)
            own = last_holding(enough, lambda count: self._area(image_size, count) < self.min_pixels) + 1
        if self._area(image_size, own) > self.max_pixels:
            own = max(1, last_holding(own, lambda count: self._area(image_size, count) <= self.max_pixels))
        return own - 1

    def _area(self, image_size: Size, limit: int) -> int:
        return math.prod(self.smaller(image_size, limit))


def _nearest(value: int, step: int) -> int:
    """Divide, and round to the nearest whole number, halves up."""
    return (2 * value + step) // (2 * step)
