"""The MLP projector, the connector that most models use.

Source: LLaVA-1.5, https://arxiv.org/abs/2310.03744, section 3.3 (`mlp2x_gelu`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from connectors.base import Connector, Option, register_connector, require_positive
from connectors.errors import UnknownNameError
from connectors.registry import nearest
from connectors.tokens import TokenSpec, VisualTokens

__all__ = ["ACTIVATIONS", "MLP", "QuickGELU"]


class QuickGELU(nn.Module):
    """Give the sigmoid approximation of GELU that CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Map each value alone."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


@register_connector("mlp")
class MLP(Connector):
    """Map each token to another width by linear maps with activations between.

    Args:
        in_dim: D, width of the tokens that come in.
        out_dim: width of the tokens that go out, and of the hidden layers.
        depth: number of linear maps; 1 has no activation.
        activation: one of `ACTIVATIONS`.

    Shape: (B, N, in_dim) -> (B, N, out_dim); grid kept, prefix dropped.

    Raises:
        VlmError: a width or the depth is not positive.
        UnknownNameError: the activation is unknown.
    """

    def __init__(self, in_dim: int, out_dim: int, depth: int = 2, activation: str = "gelu") -> None:
        super().__init__()
        require_positive("mlp", in_dim=in_dim, dim=out_dim, depth=depth)
        if activation not in ACTIVATIONS:
            raise UnknownNameError(f"'mlp' has no activation '{activation}'; {nearest(activation, list(ACTIVATIONS))}")
        self.in_dim, self.out_dim = in_dim, out_dim
        self.depth, self.activation = depth, activation
        layers: list[nn.Module] = [nn.Linear(in_dim, out_dim)]
        for _ in range(depth - 1):
            layers += [ACTIVATIONS[activation](), nn.Linear(out_dim, out_dim)]
        self.layers = nn.Sequential(*layers)

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, N, in_dim) to (B, N, out_dim)."""
        out = self.out_spec(visual.spec)
        return VisualTokens(self.layers(visual.tokens), out.grid)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Keep the tokens and their grid, change the width."""
        self.require_dim(spec, self.in_dim)
        return TokenSpec(spec.num_tokens, self.out_dim, spec.grid)

    @classmethod
    def build(
        cls, in_spec: TokenSpec, out_dim: int, *, depth: int = 2, activation: str = "gelu", dim: int | None = None
    ) -> Self:
        """Make the MLP from the encoder's width to `dim`, by default `out_dim`."""
        return cls(in_spec.dim, out_dim if dim is None else dim, depth, activation)

    def options(self) -> dict[str, Option]:
        """Give depth, activation and the width."""
        return {"depth": self.depth, "activation": self.activation, "dim": self.out_dim}
