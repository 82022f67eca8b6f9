"""NaFlex, of SigLIP 2 and timm: every image scaled, up or down, to as many patches as are allowed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from connectors.errors import VlmError
from vlm_encoders.spec_values import Interpolation
from vlm_encoders.tiling.native import NativeTiler
from vlm_encoders.tiling.plan import Size, check_sizes

__all__ = ["NaFlexTiler", "fill_patches"]


@dataclass(frozen=True)
class NaFlexTiler(NativeTiler):
    """The image in its aspect ratio at the largest scale that keeps to a number of patches.

    Args:
        max_patches: most patches of a view; with `merge`, patches before these are joined.

    Source: transformers `Siglip2ImageProcessor`; timm `ResizeToSequence`, which has 576 patches.
    """

    interpolation: Interpolation = "bilinear"
    max_patches: int = 256

    name = "naflex"

    def __post_init__(self) -> None:
        """Refuse fewer patches than one multiple has."""
        super().__post_init__()
        if self.max_patches < self.merge**2:
            raise VlmError(f"'{self.name}' has max_patches={self.max_patches}; use {self.merge**2} or more")

    def view_size(self, image_size: Size) -> Size:
        """See `fill_patches`."""
        return self.smaller(image_size, self.max_patches // self.merge**2)

    def smaller(self, image_size: Size, limit: int) -> Size:
        """Give the view of at most so many patches, merged ones with `merge`."""
        return fill_patches(image_size, self.multiple, limit)

    def limit(self, image_size: Size) -> int:
        """Give one patch less than the view has."""
        return math.prod(self.view_size(image_size)) // self.multiple**2 - 1


def fill_patches(image_size: Size, patch: int, max_patches: int) -> Size:
    """Give the size at the largest scale, sides rounded up to patches, that has at most so many patches.

    The scale is sought by halving an interval of at most 100, down to 1e-5: what both libraries do, and so
    what decides where patches could be one more.

    Args:
        image_size: (height, width) of the image, px.
        patch: side of a patch, px.
        max_patches: most patches.

    Source: transformers `siglip2.image_processing_siglip2.get_image_size_for_max_num_patches`, timm
    `get_image_size_for_seq`.
    """
    check_sizes(image_size, patch)

    def grid(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(side * scale / patch)) for side in image_size)
        return rows, columns

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        if math.prod(grid(middle)) <= max_patches:
            low = middle
        else:
            high = middle
    rows, columns = grid(low)
    return rows * patch, columns * patch
