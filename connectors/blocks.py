"""Blocks of the grid: where they lie, and what is done with a grid that they do not divide."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from connectors.errors import TokenShapeError, UnknownNameError
from connectors.registry import nearest
from connectors.tokens import Grid, PackedTokens, VisualTokens, require_grid

__all__ = [
    "ON_ODD",
    "block_index",
    "check_on_odd",
    "divisible",
    "fit",
    "fit_packed",
    "fold_grid",
    "gather_blocks",
    "resize",
]

ON_ODD = ("error", "pad", "crop", "resize")
"""What is done with a grid that blocks do not divide: refused; filled up with zero tokens at
the bottom and right; cut there; resized bilinearly to the nearest grid that they divide.
Zeros are real tokens to a link behind: a norm there sees them. "resize" makes none."""


def check_on_odd(name: str, on_odd: str) -> None:
    """Refuse a word that is not one of `ON_ODD`.

    Raises:
        UnknownNameError: it is another word.
    """
    if on_odd not in ON_ODD:
        raise UnknownNameError(f"'{name}' has on_odd={on_odd}; {nearest(str(on_odd), list(ON_ODD))}")


def divisible(grid: Grid, factor: int, on_odd: str = "error") -> Grid:
    """Give the grid that is cut into `factor` x `factor` blocks: `grid` itself where they divide it.

    Args:
        grid: (rows, columns) of tokens.
        factor: side of a block, tokens.
        on_odd: one of `ON_ODD`.

    Raises:
        TokenShapeError: the blocks do not divide the grid and `on_odd` is "error", or
            "crop" would leave nothing.
    """
    if grid[0] % factor == 0 and grid[1] % factor == 0:
        return grid
    ways = {way: tuple(_side(side, factor, way) * factor for side in grid) for way in ON_ODD[1:]}
    found = ways.get(on_odd)
    if found is None or min(found) == 0:
        told = ", ".join(f"on_odd={way} gives {_count(size, factor)}" for way, size in ways.items())
        raise TokenShapeError(
            f"a {grid[0]}x{grid[1]} grid does not divide into {factor}x{factor} blocks; {told}, "
            "or choose another image size"
        )
    return found[0], found[1]


def fold_grid(grid: Grid, factor: int, on_odd: str = "error") -> Grid:
    """Give the grid of `factor` x `factor` blocks; as `divisible` where they do not divide it."""
    rows, columns = divisible(grid, factor, on_odd)
    return rows // factor, columns // factor


def fit(visual: VisualTokens, factor: int, on_odd: str = "error") -> VisualTokens:
    """Pad, crop or resize (B, R*C, D) to a grid that the blocks divide; the prefix is kept.

    Raises:
        TokenShapeError: as `divisible`, or the tokens have no grid.
    """
    grid = require_grid(visual.grid)
    rows, columns = divisible(grid, factor, on_odd)
    if (rows, columns) == grid:
        return visual
    if on_odd == "resize":
        return resize(visual, (rows, columns))
    picture = visual.tokens.unflatten(1, grid)
    if on_odd == "pad":
        picture = F.pad(picture, (0, 0, 0, columns - grid[1], 0, rows - grid[0]))
    return VisualTokens(picture[:, :rows, :columns].flatten(1, 2), (rows, columns), visual.prefix)


def fit_packed(packed: PackedTokens, factor: int, on_odd: str = "error") -> PackedTokens:
    """Pad, crop or resize each image as `fit` does, prefix kept; images that need nothing are not touched."""
    if all(divisible(grid, factor, on_odd) == grid for grid in packed.require_grids()):
        return packed
    return PackedTokens.join([fit(image, factor, on_odd) for image in packed.split()])


def resize(visual: VisualTokens, grid: Grid, mode: str = "bilinear") -> VisualTokens:
    """Resize (B, R*C, D) to another grid in fp32 at least, corners not aligned; the prefix is kept."""
    wide = visual.as_map().to(torch.promote_types(visual.tokens.dtype, torch.float32))
    corners = None if mode in {"area", "nearest", "nearest-exact"} else False
    resized = F.interpolate(wide, size=grid, mode=mode, align_corners=corners)
    return VisualTokens.from_map(resized.to(visual.tokens.dtype), visual.prefix)


def block_index(grids: Sequence[Grid], factor: int, device: torch.device | None = None) -> Tensor:
    """Say where the tokens of each block lie among packed tokens.

    Args:
        grids: (rows, columns) of each image, divided by the blocks.
        factor: side of a block, tokens.
        device: of the result.

    Returns:
        (M', factor**2) places, blocks image by image and row by row, within a block row by row.
    """
    found, start = [], 0
    for rows, columns in grids:
        places = torch.arange(start, start + rows * columns, device=device)
        blocks = places.view(rows // factor, factor, columns // factor, factor).transpose(1, 2)
        found.append(blocks.reshape(-1, factor * factor))
        start += rows * columns
    return torch.cat(found)


def gather_blocks(packed: PackedTokens, factor: int, on_odd: str = "error") -> tuple[Tensor, Tensor | None, list[Grid]]:
    """Bring the tokens of each block together, in one pass over all images.

    Args:
        packed: (M, D) tokens; their prefix is the caller's to hand on or drop.
        factor: side of a block, tokens.
        on_odd: one of `ON_ODD`; "resize" costs a pass for each image that it changes.

    Returns:
        (M', factor**2, D) tokens, zero where "pad" fills up; (M', factor**2), False there,
        or None where all are real; and the grid of blocks of each image.

    Raises:
        TokenShapeError: as `divisible`, or there is no image.
    """
    if on_odd == "resize":
        packed, on_odd = fit_packed(packed, factor, on_odd), "error"
    grids = packed.require_grids()
    whole = [divisible(grid, factor, on_odd) for grid in grids]
    out: list[Grid] = [(rows // factor, columns // factor) for rows, columns in whole]
    device = packed.tokens.device
    if whole == grids:
        return packed.tokens[block_index(grids, factor, device)], None, out
    places, start = [], 0
    for (rows, columns), size in zip(grids, whole, strict=True):
        place = torch.arange(start, start + rows * columns, device=device).view(rows, columns)
        # Padding with a negative number cuts; -1 marks what only fills up.
        place = F.pad(place, (0, size[1] - columns, 0, size[0] - rows), value=-1)
        places.append(place.flatten())
        start += rows * columns
    index = torch.cat(places)[block_index(whole, factor, device)]
    if on_odd == "crop":
        return packed.tokens[index], None, out
    real = index >= 0
    return packed.tokens[index].masked_fill(~real[..., None], 0), real, out


def _side(side: int, factor: int, way: str) -> int:
    if way == "pad":
        return -(-side // factor)
    if way == "crop":
        return side // factor
    return max(1, (2 * side + factor) // (2 * factor))


def _count(size: tuple[int, ...], factor: int) -> str:
    rows, columns = size[0] // factor, size[1] // factor
    total = rows * columns
    return f"{rows}x{columns} = {total} token{'s' * (total > 1)}" if total else "none"
