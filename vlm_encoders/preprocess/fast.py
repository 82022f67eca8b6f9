"""The fast path: torch resizes uint8 pixels with antialiasing, one axis after the other, as Pillow does.

torch rounds its weights to 16 bits and Pillow to 32, so a pass differs by one level of 255
at the most. Pillow rounds between two passes as well, and torch in the same place, so both
must take the axes in the same order.

What the first pass is off, the second carries on: by one level at most under bilinear, whose
weights are positive and sum to 1, by 1.3 under bicubic, whose weights are partly negative.
So under bilinear Pillow makes the second pass, on what is then a small picture, and adds no
error of its own. Under bicubic torch makes both, and a level may differ by two, never by
three, where a whole neighbourhood is off the same way: in patterns drawn by a computer, and
in what is enlarged far. There Pillow makes the first pass, again on what is a small picture,
and the second is off by one at most.
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

__all__ = ["fast_view", "is_close", "is_near"]

_Resize: TypeAlias = "Callable[[Tensor, tuple[int, int], Interpolation], Tensor]"

_LEAST_SHRINK = 2
"""How many px become one, in each of two bicubic passes, so that two levels of difference stay rare."""
_MOST_GROWTH = 2
"""How many px one becomes, at the most, so that torch makes both bicubic passes."""
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


def is_near(placement: Placement, interpolation: Interpolation) -> bool:
    """Say by sizes and filter whether tiles take the fast path, at shrinks where `is_close` would not.

    Tiles are large, and nearly as large as the image, so Pillow would take most of their time. The
    rule is that torch makes all passes of bicubic, as in the torchvision-backed processors of the
    libraries, and that bilinear is as everywhere.

    What grows more than twofold has errors that are alike in a whole neighbourhood, so there Pillow
    makes the first pass: of 10^9 levels none differed by two. Elsewhere, measured under bicubic, two
    levels differ of photographs 1.4 in a million where an axis grows, 0.4 from a shrink of 1 to 1.5,
    0.05 to 1.75 and none of 7 x 10^7 above; of noise, letters and drawn shades up to 30 in a million
    at any shrink, in the worst image 9 in a hundred thousand below 2 and 3 in ten thousand above.
    Patterns that repeat are worse, as all their places are off alike: of checkerboards of black and
    white below a shrink of 2 up to one in a hundred. None ever differed by three.
    """
    if placement.resized == placement.canvas:
        return True
    rows, columns = placement.resized
    return interpolation in {"bilinear", "bicubic"} and max(rows, placement.canvas[0]) * columns <= MAX_PIXELS


def fast_view(levels: Tensor, placement: Placement, interpolation: Interpolation, fill: Colour) -> Tensor:
    """Make the shown part of a view, (rows, columns, 3) levels, of an RGB image (H, W, 3).

    Source: the order of passes is that of `ImagingResampleInner` in Pillow; the canvas is
    that of LLaVA's `expand2square`, of which only a strip is ever made.
    """
    order = (1, 0) if _columns_first(placement.canvas, placement.resized) else (0, 1)
    ways = _ways(placement, interpolation)
    for axis in order:
        # An axis that keeps its length takes no pass.
        resize = ways.pop(0) if placement.canvas[axis] != placement.resized[axis] else _by_torch
        made = _pass(levels, axis, placement, fill, functools.partial(_resize, axis, placement, interpolation, resize))
        # Of what a pass gave, the part that is not shown is cut away at once.
        levels = made.narrow(axis, placement.start[axis], placement.shown[axis])
    return levels


def _ways(placement: Placement, interpolation: Interpolation) -> list[_Resize]:
    """Say who makes the first pass and who the second, if there is one."""
    pairs = [(old, new) for old, new in zip(placement.canvas, placement.resized, strict=True) if old != new]
    if interpolation == "bilinear":
        return [_by_torch, _by_pillow]
    if len(pairs) == 2 and any(new > old * _MOST_GROWTH for old, new in pairs):
        return [_by_pillow, _by_torch]
    return [_by_torch, _by_torch]


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
