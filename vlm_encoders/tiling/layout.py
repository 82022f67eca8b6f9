"""Tokens by plan: the views of an image become one sequence for the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from connectors.errors import TokenShapeError
from connectors.tokens import Grid, TokenSpec, VisualTokens
from vlm_encoders.tiling.plan import Size, TilePlan

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TileLayout"]


@dataclass(frozen=True)
class TileLayout:
    """How the tokens of thumbnail and tiles become one sequence.

    With `unpad` or `newline`, the tiles are joined to one map of the image that is
    read row by row; with neither, the views follow one another. Prefix tokens are
    left out: the connector `keep_prefix` makes them tokens.

    Attributes:
        unpad: drop the rows or columns of tokens that show padding.
        newline: end each row of the joined map, and a whole image, with the
            learned newline vector.

    Source: LLaVA-NeXT's `spatial_unpad` (both), and `flat`, InternVL (neither).
    """

    unpad: bool
    newline: bool

    def check(self, spec: TokenSpec) -> None:
        """Refuse tokens without a grid where rows are needed.

        Raises:
            TokenShapeError: the connector gives queries, and the layout wants rows.
        """
        if spec.grid is None and (self.unpad or self.newline):
            raise TokenShapeError(
                f"{self} needs rows, but the connector gives {spec.num_tokens} queries without a grid; "
                "use TileLayout(unpad=False, newline=False), which puts tile after tile"
            )

    def num_tokens(self, plan: TilePlan, spec: TokenSpec) -> int:
        """Count the tokens that one image costs the LLM, without computing any.

        Args:
            plan: the image's views.
            spec: the tokens of one view as the connector gives them.

        Raises:
            TokenShapeError: the tokens have no grid, and the layout wants rows.
        """
        self.check(spec)
        if plan.grid is None:
            return spec.num_tokens + self.newline
        if spec.grid is None or not (self.unpad or self.newline):
            return spec.num_tokens * plan.num_views
        _, _, rows, columns = self._window(plan, spec.grid)
        thumbnail = 0 if plan.thumbnail is None else spec.num_tokens
        return thumbnail + rows * (columns + self.newline)

    def arrange(self, visual: VisualTokens, plans: Sequence[TilePlan], newline: Tensor | None = None) -> list[Tensor]:
        """Make one sequence (n_i, H) for each image, n_i as `num_tokens` counts.

        Args:
            visual: (V, N, H), the views of all images, image by image.
            plans: the plan of each image.
            newline: (H,), the learned vector, where the layout has newlines.

        Raises:
            TokenShapeError: the views are not those of the plans, or the newline
                vector is missing or of another width.

        Source: transformers `LlavaNextModel.pack_image_features`.
        """
        self.check(visual.spec)
        num_views = sum(plan.num_views for plan in plans)
        if visual.tokens.shape[0] != num_views:
            raise TokenShapeError(
                f"{len(plans)} plans have {num_views} views, got tokens of {visual.tokens.shape[0]}; "
                "pass the plans that the pixels were cut with"
            )
        end = self._row_end(visual, newline)
        views = visual.tokens.split([plan.num_views for plan in plans])
        return [self._sequence(tokens, visual.grid, plan, end) for tokens, plan in zip(views, plans, strict=True)]

    def _row_end(self, visual: VisualTokens, newline: Tensor | None) -> Tensor | None:
        if not self.newline:
            return None
        width = visual.tokens.shape[2]
        if newline is None or newline.shape != (width,):
            came = "none" if newline is None else f"shape {tuple(newline.shape)}"
            raise TokenShapeError(f"{self} needs a newline vector of shape ({width},), got {came}")
        return newline.to(visual.tokens)

    def _sequence(self, views: Tensor, grid: Grid | None, plan: TilePlan, end: Tensor | None) -> Tensor:
        import torch

        if plan.grid is None:
            return views[0] if end is None else torch.cat([views[0], end[None]])
        if grid is None or not (self.unpad or self.newline):
            return views.flatten(0, 1)
        first = plan.thumbnail == "first"
        tiles, thumbnails = (views[1:], views[:1]) if first else (views[: plan.num_tiles], views[plan.num_tiles :])
        top, left, rows, columns = self._window(plan, grid)
        joined = _join(tiles, plan.grid, grid)[top : top + rows, left : left + columns]
        if end is not None:
            joined = torch.cat([joined, end.expand(rows, 1, -1)], dim=1)
        parts = [thumbnails.flatten(0, 1), joined.flatten(0, 1)]
        return torch.cat(parts if first else parts[::-1])

    def _window(self, plan: TilePlan, grid: Grid) -> tuple[int, int, int, int]:
        tile_rows, tile_columns = plan.grid or (1, 1)
        rows, columns = tile_rows * grid[0], tile_columns * grid[1]
        if not (self.unpad and plan.padded):
            return 0, 0, rows, columns
        return _without_padding(plan.image_size, rows, columns)


def _join(tiles: Tensor, tile_grid: Grid, grid: Grid) -> Tensor:
    rows, columns = tile_grid
    joined = tiles.reshape(rows, columns, grid[0], grid[1], -1).transpose(1, 2)
    return joined.reshape(rows * grid[0], columns * grid[1], -1)


def _without_padding(image_size: Size, rows: int, columns: int) -> tuple[int, int, int, int]:
    """Give (top, left, rows, columns) of the tokens that show the image.

    Source: transformers `unpad_image`. Its rounding is kept, so an odd number of
    padding rows leaves one in, and an image far thinner than a token leaves none.
    """
    height, width = image_size
    if width / height > columns / rows:
        # Seven places mend the float error of 836 * 24 / 352, which is 57 and not 56.999...
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return padding, 0, rows - 2 * padding, columns
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, padding, rows, columns - 2 * padding
