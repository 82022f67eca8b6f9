"""The tensor part of a layout: tokens of views, joined to one sequence for each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from connectors.errors import TokenShapeError
from connectors.tokens import Grid, PackedTokens, TokenSpec, VisualTokens
from vlm_encoders.tiling.joined_map import cap_grid, shown_window
from vlm_encoders.tiling.plan import TilePlan

if TYPE_CHECKING:
    from vlm_encoders.tiling.layout import TileLayout

__all__ = ["arrange_views"]

_View: TypeAlias = tuple[Tensor, Grid | None]


def arrange_views(
    layout: TileLayout, visual: VisualTokens | PackedTokens, plans: Sequence[TilePlan], newline: Tensor | None
) -> list[Tensor]:
    """Make one sequence (n_i, H) for each image; see `TileLayout.arrange`."""
    plans = [layout.joined(plan) for plan in plans]
    views = _views(visual)
    num_views = sum(plan.num_views for plan in plans)
    if len(views) != num_views:
        raise TokenShapeError(
            f"{len(plans)} plans have {num_views} views, got tokens of {len(views)}; "
            "pass the plans that the pixels were cut with"
        )
    end = _row_end(layout, visual, newline)
    sequences, begin = [], 0
    for plan in plans:
        sequences.append(_sequence(layout, views[begin : begin + plan.num_views], plan, end))
        begin += plan.num_views
    return sequences


def _views(visual: VisualTokens | PackedTokens) -> list[_View]:
    if isinstance(visual, VisualTokens):
        return [(tokens, visual.grid) for tokens in visual.tokens]
    return list(zip(visual.tokens.split(list(visual.lengths)), visual.grids, strict=True))


def _row_end(layout: TileLayout, visual: VisualTokens | PackedTokens, newline: Tensor | None) -> Tensor | None:
    if not layout.newline:
        return None
    width = visual.tokens.shape[-1]
    if newline is None or newline.shape != (width,):
        came = "none" if newline is None else f"shape {tuple(newline.shape)}"
        raise TokenShapeError(f"a layout with newlines needs a vector of shape ({width},), got {came}")
    return newline.to(visual.tokens)


def _sequence(layout: TileLayout, views: Sequence[_View], plan: TilePlan, end: Tensor | None) -> Tensor:
    if plan.grid is None:
        ((tokens, grid),) = views
        layout.check(TokenSpec(tokens.shape[0], tokens.shape[1], grid))
        return tokens if end is None else torch.cat([tokens, end[None]])
    parts, begin = [], 0
    for place, page in enumerate(plan.pages):
        own = views[begin : begin + page.num_views]
        grid = own[0][1]
        tokens = torch.stack([each for each, _ in own])
        layout.check(TokenSpec(tokens.shape[1], tokens.shape[2], grid))
        if place != plan.main_place or grid is None or not layout.by_rows:
            parts.append(tokens.flatten(0, 1))
        else:
            parts.append(_rows(layout, tokens, grid, plan, end))
        begin += page.num_views
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _rows(layout: TileLayout, tiles: Tensor, grid: Grid, plan: TilePlan, end: Tensor | None) -> Tensor:
    """Join tiles (V, N, H) to one map, and read what of it stays row by row."""
    top, left, rows, columns = shown_window(plan, grid, unpad=layout.unpad)
    tile_rows, tile_columns = plan.main.grid
    joined = tiles.reshape(tile_rows, tile_columns, grid[0], grid[1], -1).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    joined = joined[top : top + rows, left : left + columns]
    goal = cap_grid(rows, columns, layout.most_tokens(grid[0] * grid[1]))
    if goal != (rows, columns):
        joined = interpolate(joined.permute(2, 0, 1)[None], size=goal, mode="bilinear")[0].permute(1, 2, 0)
    if end is not None:
        joined = torch.cat([joined, end.expand(joined.shape[0], 1, -1)], dim=1)
    return joined.flatten(0, 1)
