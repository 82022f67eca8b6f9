"""From levels of 255 to the numbers that a network takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm_encoders.spec import EncoderSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Normaliser"]


class Normaliser:
    """Writes levels as pixels of mean 0 and deviation 1.

    Args:
        spec: whose mean and deviation are used.
        exact: take the operations of the libraries, in their order: bit-equal to theirs. Otherwise one
            multiplication and one addition, which differ by the rounding of float32, 5e-7 at most.
    """

    def __init__(self, spec: EncoderSpec, *, exact: bool = True) -> None:
        import torch

        self._mean, self._std = (torch.tensor(each).view(3, 1, 1) for each in (spec.mean, spec.std))
        self._factors = None if exact else [1 / (255 * std) for std in spec.std]
        self._black = [torch.tensor(-mean / std) for mean, std in zip(spec.mean, spec.std, strict=True)]

    def __call__(self, levels: Tensor, pixels: Tensor) -> None:
        """Write levels (rows, columns, 3) into float32 pixels (3, rows, columns)."""
        import torch

        pixels.copy_(levels.permute(2, 0, 1))
        if self._factors is None:
            pixels.div_(255).sub_(self._mean).div_(self._std)
            return
        for plane, black, factor in zip(pixels, self._black, self._factors, strict=True):
            torch.add(black, plane, alpha=factor, out=plane)
