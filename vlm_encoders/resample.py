"""Grids brought to another size, and token maps joined channel by channel."""

from __future__ import annotations

from collections.abc import Sequence

from connectors.errors import TokenShapeError, VlmError
from connectors.tokens import Grid, VisualTokens, require_grid

__all__ = ["RESAMPLINGS", "join_channels", "resample"]

RESAMPLINGS = ("area", "bilinear", "nearest")


def resample(visual: VisualTokens, grid: Grid, method: str | None = None) -> VisualTokens:
    """Bring tokens to another grid, computed in float32 at least; the prefix stays.

    Args:
        visual: tokens (B, N, D) with a grid.
        grid: (rows, columns) wanted; the tokens' own changes nothing.
        method: "area" averages, "bilinear" (corners not aligned) and "nearest" are torch's; None
            takes "area" where no side grows, "bilinear" otherwise.

    Raises:
        TokenShapeError: the tokens have no grid.
        VlmError: there is no such method.
    """
    # The names of the methods serve specs too, which are read without torch.
    import torch
    from torch.nn.functional import interpolate

    rows, columns = require_grid(visual.grid)
    if method not in {None, *RESAMPLINGS}:
        raise VlmError(f"no resampling '{method}'; use {', '.join(RESAMPLINGS)}")
    if (rows, columns) == tuple(grid):
        return visual
    if method is None:
        method = "area" if grid[0] <= rows and grid[1] <= columns else "bilinear"
    dtype = visual.tokens.dtype
    wide = visual.as_map().to(torch.promote_types(dtype, torch.float32))
    corners = False if method == "bilinear" else None
    resampled = interpolate(wide, size=tuple(grid), mode=method, align_corners=corners)
    return VisualTokens.from_map(resampled.to(dtype), visual.prefix)


def join_channels(parts: Sequence[VisualTokens], grid: Grid | None = None, method: str | None = None) -> VisualTokens:
    """Join tokens of the same views channel by channel: (B, N, D1 + D2 + ...).

    Args:
        parts: what is joined, in order.
        grid: (rows, columns) that all are brought to; None for that of the first.
        method: as in `resample`.

    Returns:
        The joint, its prefix tokens (B, P, D1 + D2 + ...) joined in the same way.

    Raises:
        TokenShapeError: there is no part, a part has no grid, or the numbers of prefix tokens differ.
    """
    import torch

    if not parts:
        raise TokenShapeError("there are no tokens to join; pass one part or more")
    counts = {part.spec.num_prefix for part in parts}
    if len(counts) > 1:
        raise TokenShapeError(f"parts with {sorted(counts)} prefix tokens cannot be joined; drop the prefix first")
    goal = require_grid(parts[0].grid) if grid is None else grid
    brought = [resample(part, goal, method) for part in parts]
    prefixes = [part.prefix for part in parts if part.prefix is not None]
    prefix = torch.cat(prefixes, dim=2) if prefixes else None
    return VisualTokens(torch.cat([part.tokens for part in brought], dim=2), (goal[0], goal[1]), prefix)
