"""Average pooling: fewer tokens without a parameter.

Source: DeCo, https://arxiv.org/abs/2405.20985, section 4; PyTorch's
`avg_pool2d` and `adaptive_avg_pool2d`.
"""

from __future__ import annotations

from typing import Self

from torch.nn import functional as F

from connectors.base import Connector, Option, register_connector, require_positive
from connectors.errors import TokenShapeError, VlmError
from connectors.tokens import Grid, TokenSpec, VisualTokens, fold_grid, require_grid

__all__ = ["AvgPool"]


@register_connector("avg_pool")
class AvgPool(Connector):
    """Average the tokens of each block of the grid into one.

    Args:
        factor: side of the block, tokens; it must divide the grid.
        grid: (rows, columns) that go out, from any grid that is not smaller;
            where it does not divide the grid that comes in, blocks overlap.

    Shape: (B, R*C, D) -> (B, R'*C', D); prefix kept.

    Raises:
        VlmError: not exactly one of factor and grid is given, or it is not positive.
    """

    def __init__(self, factor: int | None = None, grid: Grid | None = None) -> None:
        super().__init__()
        if (factor is None) == (grid is None):
            given = "neither" if factor is None else "both"
            raise VlmError(
                f"'avg_pool' takes factor or grid, got {given}; write avg_pool:factor=2 or avg_pool:grid=8x8"
            )
        if factor is not None:
            require_positive("avg_pool", factor=factor)
        if grid is not None:
            try:
                rows, columns = grid
            except (TypeError, ValueError):
                raise VlmError(f"'avg_pool' has grid={grid}; give rows and columns, for example grid=8x8") from None
            require_positive("avg_pool", rows=rows, columns=columns)
        self.factor, self.grid = factor, grid

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, R*C, D) to (B, R'*C', D)."""
        rows, columns = require_grid(self.out_spec(visual.spec).grid)
        in_rows, in_columns = require_grid(visual.grid)
        feature_map = visual.as_map()
        # Whole blocks take avg_pool2d: the adaptive one has no deterministic gradient on CUDA.
        if in_rows % rows == 0 and in_columns % columns == 0:
            pooled = F.avg_pool2d(feature_map, (in_rows // rows, in_columns // columns))
        else:
            pooled = F.adaptive_avg_pool2d(feature_map, (rows, columns))
        return VisualTokens.from_map(pooled, visual.prefix)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Shrink the grid, keep the width and the prefix."""
        rows, columns = self._out_grid(require_grid(spec.grid))
        return TokenSpec(rows * columns, spec.dim, (rows, columns), spec.num_prefix)

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, *, factor: int | None = None, grid: Grid | None = None) -> Self:
        """Make the pooling; it fits every width."""
        return cls(factor, grid)

    def options(self) -> dict[str, Option]:
        """Give the factor or the grid."""
        if self.grid is not None:
            return {"grid": self.grid}
        return {} if self.factor is None else {"factor": self.factor}

    def _out_grid(self, grid: Grid) -> Grid:
        rows, columns = grid
        if self.factor is not None:
            smaller = f"{max(1, rows // self.factor)}x{max(1, columns // self.factor)}"
            return fold_grid(grid, self.factor, f"use avg_pool:grid={smaller}, or ")
        out_rows, out_columns = require_grid(self.grid)
        if out_rows > rows or out_columns > columns:
            raise TokenShapeError(
                f"avg_pool:grid={out_rows}x{out_columns} is finer than the {rows}x{columns} grid that comes in; "
                f"use at most {rows}x{columns}, or a larger image"
            )
        return out_rows, out_columns
