"""The pixels of a view, for one network or for several that see it together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_encoders.preprocess import ImageLike, Preprocessor
from vlm_encoders.preprocess.forms import as_list
from vlm_encoders.spec import EncoderSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ViewPixels"]


@dataclass(frozen=True)
class ViewPixels:
    """Images to pixels (B, 3, height, width); in a joint, those of its parts flattened: (B, L).

    Attributes:
        spec: whose `pixel_specs` say how each part preprocesses for itself.
    """

    spec: EncoderSpec

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Make float32 pixels of one image or several, on the CPU.

        Raises:
            VlmError: there is no image, or one cannot be read or resized.
        """
        import torch

        ways = [Preprocessor(each) for each in self.spec.pixel_specs]
        if len(ways) == 1:
            return ways[0](images)
        # A path is read anew by each part: how it is decoded is part of a way to pixels.
        many = as_list(images)
        return torch.cat([way(many).flatten(1) for way in ways], dim=1)
