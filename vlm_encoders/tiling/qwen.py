"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: sides of whole merged patches, an area within bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from connectors.errors import VlmError
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.markers import Markers
from vlm_encoders.tiling.native import NativeTiler, check_area, last_holding
from vlm_encoders.tiling.plan import Size, check_sizes

__all__ = ["Qwen2VLTiler", "smart_resize"]


@dataclass(frozen=True)
class Qwen2VLTiler(NativeTiler):
    """Qwen2-VL's `smart_resize`: 28 px to a token behind the merger; 32 px in Qwen3-VL, by its encoder's patch.

    Args:
        min_pixels: least height x width of the view, px.
        max_pixels: most; an image so thin that one side is a single multiple may have more.
        markers: write `<|vision_start|>` in front of the image and `<|vision_end|>` behind it.
    """

    patch: int = 14
    merge: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    markers: bool = True

    name = "qwen2-vl"

    def __post_init__(self) -> None:
        """Refuse bounds that no area has."""
        super().__post_init__()
        check_area(self.name, self.min_pixels, self.max_pixels)

    @property
    def layout(self) -> TileLayout:
        """The tokens between the marks of an image."""
        markers = Markers(start="<|vision_start|>", end="<|vision_end|>") if self.markers else Markers()
        return TileLayout(unpad=False, newline=False, markers=markers)

    def view_size(self, image_size: Size) -> Size:
        """See `smart_resize`."""
        return smart_resize(image_size, self.multiple, self.min_pixels, self.max_pixels)

    def smaller(self, image_size: Size, limit: int) -> Size:
        """Give what `smart_resize` makes of a view whose area is above `max_pixels`, with `limit` px for these.

        Small images that the rule enlarges have to stay below its own `min_pixels` then, and are rounded down too.
        """
        return _within(image_size, self.multiple, limit)

    def limit(self, image_size: Size) -> int:
        """Give an area below the view's own, px, far below where the rule has enlarged a strip's shorter side alone."""
        view = self.view_size(image_size)

        def within(limit: int) -> bool:
            height, width = self.smaller(image_size, limit)
            return height <= view[0] and width <= view[1]

        return last_holding(min(math.prod(view), self.max_pixels + 1), within)


def smart_resize(image_size: Size, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """Give the size of a view: sides the nearest multiples of `factor`, scaled where the area is out of bounds.

    Args:
        image_size: (height, width) of the image, px.
        factor: what both sides are a multiple of, px.
        min_pixels: least area, px.
        max_pixels: most area, px.

    Raises:
        VlmError: the image is over 200 times as long as wide, which the released processors refuse too.

    Source: transformers `qwen2_vl.image_processing_qwen2_vl.smart_resize`; halves are rounded to even.
    """
    check_sizes(image_size, factor)
    height, width = image_size
    if max(image_size) / min(image_size) > 200:
        raise VlmError(
            f"Qwen's rule takes images up to 200 times as long as wide, got {height}x{width} px; cut the image, or use "
            "the tiler native"
        )
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        return _within(image_size, factor, max_pixels)
    if rows * columns * factor**2 < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * scale / factor), math.ceil(width * scale / factor)
    return rows * factor, columns * factor


def _within(image_size: Size, factor: int, max_pixels: int) -> Size:
    """Scale to an area, each side rounded down to a multiple, but at least one."""
    height, width = image_size
    scale = math.sqrt(height * width / max_pixels)
    # Divided twice, as the source does: one division by the product rounds otherwise.
    rows, columns = (max(1, math.floor(side / scale / factor)) for side in image_size)
    return rows * factor, columns * factor
