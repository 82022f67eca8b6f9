"""Scales of an image joined channel by channel, between encoder and connector: the tensor part of S2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from connectors.errors import TokenShapeError
from connectors.tokens import Grid, VisualTokens, require_grid
from vlm_encoders.resample import join_channels
from vlm_encoders.tiling.plan import Page, TilePlan

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["join_scales"]


def join_scales(
    visual: VisualTokens, plans: Sequence[TilePlan], scales: int, joined_on: Literal["first", "last"]
) -> VisualTokens:
    """Join the pages of each image channel by channel on the grid of one of them, and cut that into views again.

    The views of a page are laid side by side to one map, which is averaged ("area", in float32 at
    least) to the grid of the page that is joined on, or spread where it is the smaller one. An image
    of one page is seen at one scale alone: its tokens are repeated for each scale.

    Args:
        visual: (V, N, D), the views of all images, page by page; their prefix is dropped.
        plans: of the images; each has one page or `scales` pages.
        scales: how many pages are joined.
        joined_on: which page gives the grid.

    Returns:
        (V', N, D * scales), the views of the pages that are joined on, row by row.

    Raises:
        TokenShapeError: the tokens have no grid, the views are not those of the plans, or a plan has
            another number of pages.

    Source: S2, arXiv 2403.13043 ("first"); dynamic S2 of NVILA, arXiv 2412.04468 ("last"), whose code
    repeats an image of one view in the same way.
    """
    from torch import cat

    grid = require_grid(visual.grid)
    num_views = sum(plan.num_views for plan in plans)
    if len(visual.tokens) != num_views:
        raise TokenShapeError(
            f"{len(plans)} plans have {num_views} views, got tokens of {len(visual.tokens)}; "
            "pass the plans that the pixels were cut with"
        )
    views = visual.tokens.split([page.num_views for plan in plans for page in plan.pages])
    joined, begin = [], 0
    for plan in plans:
        pages = plan.pages * scales if len(plan.pages) == 1 else plan.pages
        if len(pages) != scales:
            raise TokenShapeError(
                f"a plan has {len(pages)} pages, {scales} scales are joined; plan with the tiler of this layout"
            )
        own = views[begin : begin + len(plan.pages)] * (scales // len(plan.pages))
        maps = [_laid(VisualTokens(tokens, grid), page) for tokens, page in zip(own, pages, strict=True)]
        page = pages[0 if joined_on == "first" else -1]
        goal = (page.grid[0] * grid[0], page.grid[1] * grid[1])
        joined.append(_cut(join_channels(maps, goal, "area"), page, grid))
        begin += len(plan.pages)
    return VisualTokens(cat(joined), grid)


def _laid(views: VisualTokens, page: Page) -> VisualTokens:
    """Lay views (V, N, D) side by side to one map (1, V N, D)."""
    rows, columns = page.grid
    maps = views.as_map().unflatten(0, (1, rows, columns))
    return VisualTokens.from_map(maps.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3))


def _cut(whole: VisualTokens, page: Page, grid: Grid) -> Tensor:
    """Cut one map (1, V N, D) into views (V, N, D), row by row."""
    rows, columns = page.grid
    maps = whole.tokens.reshape(rows, grid[0], columns, grid[1], -1)
    return maps.transpose(1, 2).reshape(rows * columns, grid[0] * grid[1], -1)
