"""A connector that keeps every second row of tokens and projects them."""

from typing import Self

from connectors import Connector, TokenSpec, VisualTokens, register_connector
from connectors.base import Option, require_positive
from connectors.init import Draw, linear
from connectors.tokens import require_grid

__all__ = ["StridedRows"]


@register_connector("strided_rows")
class StridedRows(Connector):
    """Keep every `step`-th row of the grid and map its tokens to another width.

    Args:
        in_dim: D, width of the tokens that come in.
        out_dim: width of the tokens that go out.
        step: rows from one that is kept to the next.

    Shape: (B, R*C, in_dim) -> (B, ceil(R/step)*C, out_dim); prefix dropped.

    Raises:
        VlmError: an option is not positive.
    """

    source = "this example"
    used_by = "no released model"
    choose = "to see how a connector of your own is written"

    def __init__(self, in_dim: int, out_dim: int, step: int = 2) -> None:
        super().__init__()
        require_positive("strided_rows", in_dim=in_dim, dim=out_dim, step=step)
        self.in_dim, self.out_dim, self.step = in_dim, out_dim, step
        self.proj = linear(in_dim, out_dim)
        self.reset_parameters()

    def init_weights(self, draw: Draw) -> None:
        """Start at N(0, 0.02); without this method, as PyTorch starts its layers."""
        draw.modules(self, std=0.02)

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Keep rows 0, step, 2 step, ... and project."""
        self.out_spec(visual.spec)
        kept = VisualTokens.from_map(visual.as_map()[:, :, :: self.step])
        return VisualTokens(self.proj(kept.tokens), kept.grid)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """State the rows that stay, and refuse tokens of another width."""
        self.require_dim(spec, self.in_dim)
        rows, columns = require_grid(spec.grid)
        kept = -(-rows // self.step)
        return TokenSpec(kept * columns, self.out_dim, (kept, columns))

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, *, step: int = 2) -> Self:
        """Make it from a recipe: `strided_rows:step=2`."""
        return cls(in_spec.dim, out_dim, step)

    def options(self) -> dict[str, Option]:
        """Give the step."""
        return {"step": self.step}
