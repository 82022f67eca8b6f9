"""The fast path: torch resizes uint8 pixels with antialiasing, one axis after the other, as Pillow does.

torch rounds its weights to 16 bits and Pillow to 32, so a pass differs by one level of 255
at the most. Pillow rounds between two passes as well, and torch in the same place, so both
must take the axes in the same order.

What the first pass is off, the second carries on: by one level at most under bilinear, whose
weights are positive and sum to 1, by 1.3 under bicubic, whose weights are partly negative.
So under bilinear Pillow makes the second pass, on what is then a small picture, and adds no
error of its own. Under bicubic torch makes both, and a level may differ by two, never by
three, where a whole neighbourhood is off the same way: in patterns drawn by a computer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image

from connectors.tokens import Grid
from vlm_encoders.preprocess.exact import FILTERS, Colour
from vlm_encoders.preprocess.sizes import MAX_PIXELS, Placement
from vlm_encoders.spec import Interpolation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["fast_view", "is_close"]

_Resize: TypeAlias = "Callable[[Tensor, tuple[int, int], Interpolation], Tensor]"

_LEAST_SHRINK = 2
"""How many px become one, in each of two bicubic passes, so that two levels of difference stay rare."""
_STRIP = 1 << 20
"""Bytes of the canvas that are filled at once (64 lines at least), to stay in the processor's cache."""


def is_close(placement: Placement, interpolation: Interpolation) -> bool:
    """Say by sizes and filter whether the fast path is taken, as it comes close to the exact one.

    It is for bilinear, and for bicubic where one axis alone is resized or both shrink by 2 or
    more. Where one axis alone is resized no level differs by more than one of 255; nor was
    one met under bilinear, which would need an error that is the same under the whole filter
    and a result within 10^-5 of the border of two levels.

    Where both axes shrink under bicubic this is measured. Of photographs and of noise, of
    levels and of black and white, no level differed by two in 10^8; below a shrink of 2 a few
    did. The worst met are images that are the sum of a pattern of rows and one of columns: 4
    levels in a million differ by two, and in the worst of a thousand such images 3 in ten thousand.
    """
    rows, columns = placement.resized
    if interpolation not in {"bilinear", "bicubic"} or max(rows, placement.canvas[0]) * columns > MAX_PIXELS:
        return False
    pairs = [(old, new) for old, new in zip(placement.canvas, placement.resized, strict=True) if old != new]
    return interpolation == "bilinear" or len(pairs) < 2 or all(old >= new * _LEAST_SHRINK for old, new in pairs)


def fast_view(levels: Tensor, placement: Placement, interpolation: Interpolation, fill: Colour) -> Tensor:
    """Make the shown part of a view, (rows, columns, 3) levels, of an RGB image (H, W, 3).

    Source: the order of passes is that of `ImagingResampleInner` in Pillow; the canvas is
    that of LLaVA's `expand2square`, of which only a strip is ever made.
    """
    order = (1, 0) if _columns_first(placement.canvas, placement.resized) else (0, 1)
    resize: _Resize = _by_torch
    for axis in order:
        made = _pass(levels, axis, placement, fill, functools.partial(_resize, axis, placement, interpolation, resize))
        # Of what a pass gave, the part that is not shown is cut away at once.
        levels = made.narrow(axis, placement.start[axis], placement.shown[axis])
        if interpolation == "bilinear" and placement.canvas[axis] != placement.resized[axis]:
            resize = _by_pillow
    return levels


def _pass(levels: Tensor, axis: int, placement: Placement, fill: Colour, resize: Callable[[Tensor], Tensor]) -> Tensor:
    """Fill one axis up to the canvas and resize it."""
    import torch

    length, goal = placement.canvas[axis], placement.resized[axis]
    own, margin, others = levels.shape[axis], placement.margin[axis], levels.shape[1 - axis]
    if own == length:
        return resize(levels)
    # A strip across the other axis is filled, resized and used again for the next.
    chunked = axis == 1 and length != goal
    depth = min(others, max(64, _STRIP // (3 * length))) if chunked else others
    rows, columns = (depth, length) if axis == 1 else (length, depth)
    line = torch.tensor(fill, dtype=torch.uint8).repeat(columns)
    strip = line.expand(rows, 3 * columns).contiguous().view(rows, columns, 3)
    resized = []
    for begin in range(0, others, depth):
        part = levels.narrow(1 - axis, begin, min(depth, others - begin))
        filled = strip.narrow(1 - axis, 0, part.shape[1 - axis])
        filled.narrow(axis, margin, own).copy_(part)
        resized.append(resize(filled))
    return torch.cat(resized, 1 - axis)


def _resize(axis: int, placement: Placement, interpolation: Interpolation, resize: _Resize, levels: Tensor) -> Tensor:
    goal = placement.resized[axis]
    if levels.shape[axis] == goal:
        return levels
    return resize(levels, (levels.shape[0], goal) if axis == 1 else (goal, levels.shape[1]), interpolation)


def _by_pillow(levels: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    import torch

    resized = Image.fromarray(levels.numpy()).resize((size[1], size[0]), FILTERS[interpolation])
    return torch.from_numpy(np.array(resized))


def _by_torch(levels: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    import torch
    from torch.nn.functional import interpolate

    # Colours side by side in memory: torch's kernel for them is several times faster.
    mapped = levels[None].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return interpolate(mapped, size=size, mode=interpolation, antialias=True).permute(0, 2, 3, 1)[0]


def _columns_first(old: Grid, new: Grid) -> bool:
    shrink = (old[0] - new[0], old[1] - new[1])
    return not (_shrinks_rows_first() and shrink[0] > 0 and shrink[0] > 2 * shrink[1])


@functools.cache
def _shrinks_rows_first() -> bool:
    """Find out whether this Pillow takes the rows first where they shrink far more: 13 does, 12 does not."""
    stripes = np.random.default_rng(0).integers(0, 2, (40, 8), dtype=np.uint8) * 255
    image, bicubic = Image.fromarray(stripes), Image.Resampling.BICUBIC
    rows_first = image.resize((8, 10), bicubic).resize((12, 10), bicubic)
    return image.resize((12, 10), bicubic).tobytes() == rows_first.tobytes()
