"""Gemma 3's projector: pooled to a fixed grid, normalised, mapped by one matrix.

Source: Gemma 3, https://arxiv.org/abs/2503.19786, section 2.1;
`Gemma3MultiModalProjector` of transformers.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor

from connectors.base import Connector, Option, register_connector, require_positive
from connectors.init import Draw, linear
from connectors.norms import GemmaNorm, require_eps
from connectors.pooling import AvgPool
from connectors.targets import check_grid, coarser
from connectors.tokens import Grid, PackedTokens, TokenSpec, VisualTokens, require_grid

__all__ = ["PooledProjector"]


@register_connector("pooled_projector")
class PooledProjector(Connector):
    """Average the tokens to a fixed grid, normalise them, and map them by one matrix.

    `proj.weight` is (out_dim, in_dim); transformers' `mm_input_projection_weight` is its
    transpose.

    Args:
        in_dim: D, width of the tokens that come in.
        out_dim: width of the tokens that go out.
        grid: (rows, columns) that go out, from any grid that is not smaller; where it
            does not divide the grid that comes in, pooled blocks overlap.
        eps: added under the root of the norm.

    Shape: (B, R*C, in_dim) -> (B, rows*columns, out_dim); prefix dropped.

    Raises:
        VlmError: a width, a side of the grid or eps is not positive.
    """

    source = "Gemma 3, https://arxiv.org/abs/2503.19786"
    used_by = "Gemma 3, from 64x64 to 16x16"
    choose = "for a fixed number of tokens a view at the cost of one matrix"

    def __init__(self, in_dim: int, out_dim: int, grid: Grid = (16, 16), eps: float = 1e-6) -> None:
        super().__init__()
        require_positive("pooled_projector", in_dim=in_dim, dim=out_dim)
        grid = check_grid("pooled_projector", grid)
        require_eps("pooled_projector", eps)
        self.in_dim, self.out_dim, self.grid = in_dim, out_dim, grid
        self.pool = AvgPool(grid=grid)
        self.norm = GemmaNorm(in_dim, eps)
        self.proj = linear(in_dim, out_dim, bias=False)
        self.reset_parameters()

    def init_weights(self, draw: Draw) -> None:
        """Start as PyTorch does; at zero, as transformers starts the matrix, no gradient would reach the norm."""
        draw.modules(self)

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, R*C, in_dim) to (B, rows*columns, out_dim)."""
        self.out_spec(visual.spec)
        return VisualTokens(self._map(self.pool(visual).tokens), self.grid)

    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        """Map (M, in_dim) to (M', out_dim): pooled grid by grid, mapped at once."""
        for spec in set(packed.specs):
            self.out_spec(spec)
        pooled = self.pool.forward_packed(packed)
        return pooled.with_tokens(self._map(pooled.tokens))

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Give the fixed grid."""
        self.require_dim(spec, self.in_dim)
        rows, columns = coarser("pooled_projector", require_grid(spec.grid), self.grid)
        return TokenSpec(rows * columns, self.out_dim, (rows, columns))

    @classmethod
    def build(
        cls,
        in_spec: TokenSpec,
        out_dim: int,
        *,
        grid: Grid = (16, 16),
        eps: float = 1e-6,
        dim: int | None = None,
    ) -> Self:
        """Make the projector from the encoder's width to `dim`, by default `out_dim`."""
        return cls(in_spec.dim, out_dim if dim is None else dim, grid, eps)

    def options(self) -> dict[str, Option]:
        """Give the grid, eps and the width."""
        return {"grid": self.grid, "eps": self.norm.eps, "dim": self.out_dim}

    def _map(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.proj(self.norm(tokens))
        return out
