"""Pixel shuffle: fewer, wider tokens, and nothing lost.

Source: InternVL 1.5, https://arxiv.org/abs/2404.16821, section 3.1; Idefics3,
https://arxiv.org/abs/2408.12637, section 3.
"""

from __future__ import annotations

from typing import Self

from connectors.base import Connector, Option, register_connector, require_positive
from connectors.tokens import TokenSpec, VisualTokens, fold_grid, require_grid

__all__ = ["PixelShuffle"]


@register_connector("pixel_shuffle")
class PixelShuffle(Connector):
    """Fold each `factor` x `factor` block of tokens into one wider token.

    Channels of a folded token run (row in block, column in block, D), as in the
    released InternVL and Idefics3 weights; `torch.nn.functional.pixel_unshuffle`
    orders them otherwise.

    Args:
        factor: side of the block, tokens; it must divide the grid.

    Shape: (B, R*C, D) -> (B, (R/factor)*(C/factor), D*factor**2); prefix dropped.

    Raises:
        VlmError: factor is not positive.
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        require_positive("pixel_shuffle", factor=factor)
        self.factor = factor

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, R*C, D) to (B, (R/factor)*(C/factor), D*factor**2)."""
        out = self.out_spec(visual.spec)
        rows, columns = require_grid(out.grid)
        batch, _, dim = visual.tokens.shape
        blocks = visual.tokens.reshape(batch, rows, self.factor, columns, self.factor, dim)
        folded = blocks.permute(0, 1, 3, 2, 4, 5).reshape(batch, out.num_tokens, out.dim)
        return VisualTokens(folded, out.grid)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Shrink the grid, widen the tokens."""
        rows, columns = fold_grid(require_grid(spec.grid), self.factor)
        return TokenSpec(rows * columns, spec.dim * self.factor**2, (rows, columns))

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, *, factor: int = 2) -> Self:
        """Make the fold; it fits every width."""
        return cls(factor)

    def options(self) -> dict[str, Option]:
        """Give the factor."""
        return {"factor": self.factor}
