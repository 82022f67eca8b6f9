"""Images to pixels, as the encoder was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from connectors.errors import VlmError
from vlm_encoders.preprocess.exact import exact_view
from vlm_encoders.preprocess.fast import fast_view, is_close
from vlm_encoders.preprocess.forms import ImageLike, as_list
from vlm_encoders.preprocess.load import load_levels, picture_of, size_of, tensor_of
from vlm_encoders.preprocess.normalise import Normaliser
from vlm_encoders.preprocess.sizes import place
from vlm_encoders.spec import EncoderSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Preprocessor"]


@dataclass(frozen=True)
class Preprocessor:
    """Images to pixels (B, 3, S, S) as the encoder was trained on; it knows no weights.

    With `exact_pixels` in the spec they are equal, bit by bit, to those of the PIL-backed
    image processors of transformers and of the transforms of timm and open_clip that belong
    to the encoder. Without it torch does the resizing wherever sizes and filter alone say that
    this comes close, and Pillow elsewhere: photographs differ by at most one level of 255, some
    drawn patterns under bicubic by two in a few places (the rule and what was measured:
    `fast.is_close`). Where the levels agree, the pixels are equal bit by bit.

    Attributes:
        spec: whose size, resize, filter, mean and deviation are used.
    """

    spec: EncoderSpec

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Make float32 pixels (B, 3, S, S), on the CPU, of one image or several.

        Raises:
            VlmError: there is no image, or one cannot be read or is too narrow to be resized.
        """
        import torch

        many = as_list(images)
        if not many:
            raise VlmError("there is no image to preprocess; give one or more")
        normalise = Normaliser(self.spec)
        # SAM pads after it normalises: what is not shown is 0, not black.
        pixels = torch.zeros(len(many), 3, *self.spec.image_size)
        for view, image in zip(pixels, many, strict=True):
            levels = self._levels(image)
            normalise(levels, view[:, : levels.shape[0], : levels.shape[1]])
        return pixels

    def _levels(self, image: ImageLike) -> Tensor:
        """Make the shown part of the view, (rows, columns, 3) levels of 255."""
        spec = self.spec
        loaded = load_levels(image, by_torch=not spec.exact_pixels)
        placement = place(spec, size_of(loaded))
        # LLaVA cuts the mean colour down to whole levels.
        fill = (int(spec.mean[0] * 255), int(spec.mean[1] * 255), int(spec.mean[2] * 255))
        if not spec.exact_pixels and is_close(placement, spec.interpolation):
            return fast_view(tensor_of(loaded), placement, spec.interpolation, fill)
        return tensor_of(exact_view(picture_of(loaded), placement, spec.interpolation, fill))
