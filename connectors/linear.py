"""One linear map to the width of the language model.

Source: LLaVA, https://arxiv.org/abs/2304.08485, section 4.1.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor

from connectors.base import Option, register_connector, require_positive
from connectors.init import linear
from connectors.kinds import TokenWise
from connectors.tokens import TokenSpec

__all__ = ["Linear"]


@register_connector("linear")
class Linear(TokenWise):
    """Map each token to another width by one matrix.

    Args:
        in_dim: D, width of the tokens that come in.
        out_dim: width of the tokens that go out.
        bias: whether a bias is added.

    Shape: (B, N, in_dim) -> (B, N, out_dim); grid kept, prefix dropped.

    Raises:
        VlmError: a width is not positive.
    """

    source = "LLaVA, https://arxiv.org/abs/2304.08485"
    used_by = "LLaVA 1.0; behind a fold in Idefics3 and SmolVLM; behind the Q-Former in BLIP-2"
    choose = "as the smallest control, or to end a chain at the LLM's width"

    def __init__(self, in_dim: int, out_dim: int, bias: bool = True) -> None:  # noqa: FBT001, FBT002 - as nn.Linear
        super().__init__()
        require_positive("linear", in_dim=in_dim, dim=out_dim)
        self.in_dim, self.out_dim = in_dim, out_dim
        self.proj = linear(in_dim, out_dim, bias)
        self.reset_parameters()

    def change(self, tokens: Tensor) -> Tensor:
        """Map (..., in_dim) to (..., out_dim)."""
        out: Tensor = self.proj(tokens)
        return out

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, *, bias: bool = True, dim: int | None = None) -> Self:
        """Make the map from the encoder's width to `dim`, by default `out_dim`."""
        return cls(in_spec.dim, out_dim if dim is None else dim, bias)

    def options(self) -> dict[str, Option]:
        """Give bias and the width."""
        return {"bias": self.proj.bias is not None, "dim": self.out_dim}
