"""The whole image as one view."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from connectors.errors import VlmError
from vlm_encoders.spec_values import Resize
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.plan import Page, Size, TilePlan, check_sizes
from vlm_encoders.tiling.tiler import Tiler

__all__ = ["WholeImage", "whole_image"]


@dataclass(frozen=True)
class WholeImage(Tiler):
    """One view: the image itself, resized by the encoder's preprocessing.

    Args:
        tile_size: side of the picture that the encoder sees, in px.
        resize: "squash", "pad" (zeros at the right and bottom, as in SAM), "expand" (the mean colour on
            both sides, as in LLaVA-1.5), "crop", or "encoder" for the way of the encoder's own training.
    """

    resize: Resize | Literal["encoder"] = "encoder"

    name = "whole"
    resized_by_encoder = True

    def __post_init__(self) -> None:
        """Refuse another word."""
        words = (*get_args(Resize), "encoder")
        if self.resize not in words:
            raise VlmError(f"'whole' has resize='{self.resize}'; use {', '.join(words)}")

    @property
    def layout(self) -> TileLayout:
        """The tokens as they are."""
        return TileLayout(unpad=False, newline=False)

    @property
    def max_views(self) -> int:
        """One."""
        return 1

    def ranked(self, image_size: Size) -> Iterator[TilePlan]:
        """Give the one plan."""
        yield whole_image(image_size, self.tile_size, self.resize)


def whole_image(image_size: Size, view: int | Size, resize: Resize | Literal["encoder"] = "encoder") -> TilePlan:
    """Plan one view: the image itself, resized by the encoder's own preprocessing.

    Args:
        image_size: (height, width) of the image, px.
        view: side, or (height, width), of the view, px.
        resize: as in `WholeImage`.

    Raises:
        VlmError: a size is not positive.
    """
    size = (view, view) if isinstance(view, int) else view
    check_sizes(image_size, min(size))
    return TilePlan(image_size, (Page.squashed((1, 1), size),), resize=resize)
