"""From an image and its plan to normalised pixels, view by view."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

from connectors.errors import VlmError
from vlm_encoders.preprocess import ImageLike
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling.cut import Steps, canvas_picture, check_plan, cut
from vlm_encoders.tiling.plan import Page, Size, TilePlan
from vlm_encoders.view_pixels import ViewPixels

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vlm_encoders.preprocess.load import Levels

__all__ = ["TilePixels"]


@dataclass(frozen=True)
class TilePixels:
    """Images to the pixels of their views, normalised for an encoder; it knows no weights.

    With `exact_pixels` in the spec they are equal, bit by bit, to the pictures that `cut` gives,
    normalised: those of the PIL-backed processors. Without it torch resizes under bilinear and
    bicubic filters, straight to each page and without a picture in between: see `fast.is_near`
    for how far that is. Where levels agree, pixels differ by the rounding of float32 alone.

    Attributes:
        spec: of the encoder.
    """

    spec: EncoderSpec

    def load(self, image: ImageLike) -> Levels:
        """Give an image in any form as upright RGB, once for both its size and its pixels.

        Raises:
            VlmError: see `load_image`.
        """
        from vlm_encoders.preprocess.load import load_levels

        return load_levels(image, by_torch=not any(each.exact_pixels for each in self.spec.pixel_specs))

    def size(self, levels: Levels) -> Size:
        """Give (height, width) of a loaded image, px."""
        from vlm_encoders.preprocess.load import size_of

        return size_of(levels)

    def __call__(self, levels: Levels, plan: TilePlan) -> Tensor | list[Tensor]:
        """Make float32 pixels on the CPU.

        Args:
            levels: as `load` gave them.
            plan: made for an image of this size.

        Returns:
            (V, 3, height, width) where all views have one size, otherwise (3, height, width) of
            each; in a joint, flattened: (V, L).

        Raises:
            VlmError: the plan is for an image of another size, or a canvas is too large.
        """
        chunks = list(self.stream(levels, plan, plan.num_views))
        return chunks[0] if len(chunks) == 1 else [view for chunk in chunks for view in chunk]

    def stream(self, levels: Levels, plan: TilePlan, size: int) -> Iterator[Tensor]:
        """Make the same pixels some views at a time, so that memory is bounded by a chunk and one page's levels.

        In a joint of several encoders the pictures of all views, in whole levels, are made first.

        Args:
            levels: as `load` gave them.
            plan: made for an image of this size.
            size: most views in a chunk.

        Yields:
            (n, 3, height, width), in a joint (n, L): consecutive views of one size.

        Raises:
            VlmError: `size` is no number of views, or as in a call.
        """
        if size < 1:
            raise VlmError(f"a chunk holds at least one view, got size={size}; give 1 or more")
        check_plan(self.size(levels), plan)
        image = _Image(levels)
        if plan.resize is not None:
            spec = self.spec if plan.resize == "encoder" else self.spec.altered(resize=plan.resize, crop_pct=1.0)
            yield ViewPixels(spec)(image.form)
        elif self._is_direct(plan):
            yield from self._direct(image, plan, size)
        else:
            # A tile has the size of a view already: to crop it would lose its border.
            make = ViewPixels(self.spec.altered(resize="squash", crop_pct=1.0))
            pictures = cut(image.picture, plan)
            for begin in range(0, len(pictures), size):
                yield make(pictures[begin : begin + size])

    def _is_direct(self, plan: TilePlan) -> bool:
        """Say whether views need but be normalised: for one network, which sees their sizes."""
        if self.spec.pixel_specs != (self.spec,):
            return False
        return self.spec.packs or all(page.view == self.spec.image_size for page in plan.pages)

    def _direct(self, image: _Image, plan: TilePlan, size: int) -> Iterator[Tensor]:
        import torch

        from vlm_encoders.preprocess.normalise import Normaliser

        normalise = Normaliser(self.spec, exact=self.spec.exact_pixels)
        views = self._levels(image, plan)
        for (height, width), alike in groupby(plan.views):
            left = len(list(alike))
            while left:
                pixels = torch.empty(min(size, left), 3, height, width)
                left -= len(pixels)
                for each in pixels:
                    normalise(next(views), each)
                yield pixels

    def _levels(self, image: _Image, plan: TilePlan) -> Iterator[Tensor]:
        """Give the levels (height, width, 3) of each view, one page after the other."""
        for page in plan.pages:
            canvas = self._canvas(image, page, plan)
            for top, left, height, width in page.boxes:
                yield canvas[top : top + height, left : left + width]

    def _canvas(self, image: _Image, page: Page, plan: TilePlan) -> Tensor:
        """Lay the image on the canvas of a page: levels (height, width, 3)."""
        from vlm_encoders.preprocess.fast import fast_view, is_near
        from vlm_encoders.preprocess.load import tensor_of
        from vlm_encoders.preprocess.sizes import Placement

        top, left, height, width = page.content
        placement = Placement(plan.image_size, plan.image_size, (height, width), (0, 0), (height, width))
        # What one resize is off, the next would carry on.
        if self.spec.exact_pixels or page.through or not is_near(placement, plan.interpolation):
            return tensor_of(canvas_picture(image.picture, page, plan.interpolation, image.steps))
        content = fast_view(image.tensor, placement, plan.interpolation, (0, 0, 0))
        if not page.padded:
            return content
        canvas = content.new_zeros((*page.canvas, 3))
        canvas[top : top + height, left : left + width] = content
        return canvas


@dataclass
class _Image:
    """An image in the forms that the ways to pixels take, each made once and only if asked for."""

    levels: Levels
    steps: Steps = field(default_factory=dict)

    @cached_property
    def picture(self) -> Image:
        from vlm_encoders.preprocess.load import picture_of

        return picture_of(self.levels)

    @cached_property
    def tensor(self) -> Tensor:
        """Levels (height, width, 3)."""
        from vlm_encoders.preprocess.load import tensor_of

        return tensor_of(self.levels)

    @property
    def form(self) -> ImageLike:
        """What preprocessing takes, without a copy."""
        import torch

        return self.levels.permute(2, 0, 1) if isinstance(self.levels, torch.Tensor) else self.levels
