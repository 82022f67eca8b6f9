"""One linear map to the width of the language model.

Source: LLaVA, https://arxiv.org/abs/2304.08485, section 4.1.
"""

from __future__ import annotations

from typing import Self

from torch import nn

from connectors.base import Connector, Option, register_connector, require_positive
from connectors.tokens import TokenSpec, VisualTokens

__all__ = ["Linear"]


@register_connector("linear")
class Linear(Connector):
    """Map each token to another width by one matrix.

    Args:
        in_dim: D, width of the tokens that come in.
        out_dim: width of the tokens that go out.
        bias: whether a bias is added.

    Shape: (B, N, in_dim) -> (B, N, out_dim); grid kept, prefix dropped.

    Raises:
        VlmError: a width is not positive.
    """

    def __init__(self, in_dim: int, out_dim: int, bias: bool = True) -> None:  # noqa: FBT001, FBT002 - as nn.Linear
        super().__init__()
        require_positive("linear", in_dim=in_dim, dim=out_dim)
        self.proj = nn.Linear(in_dim, out_dim, bias=bias)

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, N, in_dim) to (B, N, out_dim)."""
        out = self.out_spec(visual.spec)
        return VisualTokens(self.proj(visual.tokens), out.grid)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Keep the tokens and their grid, change the width."""
        self.require_dim(spec, self.proj.in_features)
        return TokenSpec(spec.num_tokens, self.proj.out_features, spec.grid)

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, *, bias: bool = True, dim: int | None = None) -> Self:
        """Make the map from the encoder's width to `dim`, by default `out_dim`."""
        return cls(in_spec.dim, out_dim if dim is None else dim, bias)

    def options(self) -> dict[str, Option]:
        """Give bias and the width."""
        return {"bias": self.proj.bias is not None, "dim": self.proj.out_features}
