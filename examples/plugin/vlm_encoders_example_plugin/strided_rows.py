"""A connector that keeps every second row of tokens."""

from typing import Self

from connectors import Connector, TokenSpec, VisualTokens, register_connector
from connectors.base import Option
from connectors.tokens import require_grid

__all__ = ["StridedRows"]


@register_connector("strided_rows")
class StridedRows(Connector):
    """Keep every `step`-th row of the grid.

    Args:
        step: rows from one that is kept to the next.
    """

    def __init__(self, step: int = 2) -> None:
        super().__init__()
        self.step = step

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Keep rows 0, step, 2 step, ..."""
        return VisualTokens.from_map(visual.as_map()[:, :, :: self.step], visual.prefix)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """State the rows that stay."""
        rows, columns = require_grid(spec.grid)
        kept = -(-rows // self.step)
        return TokenSpec(kept * columns, spec.dim, (kept, columns), spec.num_prefix)

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, *, step: int = 2) -> Self:
        """Make it from a recipe: `strided_rows:step=2+mlp`."""
        return cls(step)

    def options(self) -> dict[str, Option]:
        """Give the step."""
        return {"step": self.step}
