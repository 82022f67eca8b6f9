"""Learned position embeddings, added to the tokens.

Source: ViT, https://arxiv.org/abs/2010.11929, sections 3.1 and 3.2, for the table;
Honeybee, https://arxiv.org/abs/2312.06742, for its place in front of a connector.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from connectors.base import Connector, Option, register_connector, require_positive
from connectors.blocks import resize
from connectors.init import Draw
from connectors.targets import check_grid
from connectors.tokens import Grid, PackedTokens, TokenSpec, VisualTokens, require_grid

__all__ = ["Position"]


@register_connector("position")
class Position(Connector):
    """Add to each token a learned vector for its place in the grid.

    The table is of one grid; for others it is resized bicubically, in fp32.

    Args:
        dim: D, width of the tokens.
        grid: (rows, columns) of the table.

    Shape: (B, R*C, dim) -> (B, R*C, dim); grid kept, prefix handed on as it came.

    Raises:
        VlmError: dim or a side of the grid is not positive.
    """

    source = "ViT, https://arxiv.org/abs/2010.11929"
    used_by = "the projectors of Honeybee, as an option (`pos_emb`)"
    choose = "before pooling or queries, where the encoder's tokens say little about their places"

    def __init__(self, dim: int, grid: Grid) -> None:
        super().__init__()
        require_positive("position", dim=dim)
        grid = check_grid("position", grid)
        self.dim, self.grid = dim, grid
        self.table = nn.Parameter(torch.empty(*grid, dim))
        self.reset_parameters()

    def init_weights(self, draw: Draw) -> None:
        """Start at N(0, 0.02), as Honeybee's `build_pos_embeds`."""
        draw.trunc_normal(self.table, 0.02)

    def table_of(self, grid: Grid) -> Tensor:
        """Give the table for another grid, (R*C, dim)."""
        flat = self.table.flatten(0, 1)
        if grid == self.grid:
            return flat
        return resize(VisualTokens(flat[None], self.grid), grid, "bicubic").tokens[0]

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, R*C, dim) to (B, R*C, dim)."""
        self.out_spec(visual.spec)
        table = self.table_of(require_grid(visual.grid)).to(visual.tokens.dtype)
        return VisualTokens(visual.tokens + table, visual.grid, visual.prefix)

    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        """Map (M, dim) to (M, dim), one table for each grid among the images."""
        self.require_dim(TokenSpec(1, packed.tokens.shape[1]), self.dim)
        grids = packed.require_grids()
        tables = {grid: self.table_of(grid) for grid in set(grids)}
        added = torch.cat([tables[grid] for grid in grids]).to(packed.tokens.dtype)
        return packed.with_tokens(packed.tokens + added, packed.prefix)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Keep everything."""
        self.require_dim(spec, self.dim)
        require_grid(spec.grid)
        return spec

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, *, grid: Grid | None = None) -> Self:
        """Make the table for the width that comes in, and by default for its grid."""
        return cls(in_spec.dim, require_grid(in_spec.grid) if grid is None else grid)

    def options(self) -> dict[str, Option]:
        """Give the grid, so that a checkpoint keeps it whatever the image size."""
        return {"grid": self.grid}
