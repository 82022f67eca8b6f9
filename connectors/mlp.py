"""The MLP projector, the connector that most models use.

Source: LLaVA-1.5, https://arxiv.org/abs/2310.03744, section 3.3 (`mlp2x_gelu`);
Prismatic, https://arxiv.org/abs/2402.07865, whose code widens the first hidden layer
for fused encoders; InternVL 1.5, https://arxiv.org/abs/2404.16821, whose code norms first.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from connectors.activations import make_activation
from connectors.base import Option, register_connector, require_positive
from connectors.errors import VlmError
from connectors.init import linear
from connectors.kinds import TokenWise
from connectors.norms import make_norm
from connectors.tokens import TokenSpec

__all__ = ["MLP"]


@register_connector("mlp")
class MLP(TokenWise):
    """Map each token to another width by linear maps with activations between.

    Args:
        in_dim: D, width of the tokens that come in.
        out_dim: width of the tokens that go out.
        depth: number of linear maps; 1 has no activation.
        activation: a key of `ACTIVATIONS`.
        hidden: width behind the first map, by default `out_dim`; further hidden layers
            have `out_dim`. Prismatic's fused MLP has depth 3 and hidden 4 * in_dim.
        norm: a key of `NORMS` for a norm in front, or "none".
        bias: whether the maps have a bias.

    Shape: (B, N, in_dim) -> (B, N, out_dim); grid kept, prefix dropped.

    Raises:
        VlmError: a width or the depth is not positive, or depth 1 is given a hidden width.
        UnknownNameError: the activation or the norm is unknown.
    """

    source = "LLaVA-1.5, https://arxiv.org/abs/2310.03744"
    used_by = "LLaVA 1.5, NeXT and OneVision; Prismatic; ViP-LLaVA, norm first; InternVL, norm first behind a fold"
    choose = "first: it keeps every token, trains fast, and is what others are measured against"

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        depth: int = 2,
        activation: str = "gelu",
        *,
        hidden: int | None = None,
        norm: str = "none",
        bias: bool = True,
    ) -> None:
        super().__init__()
        width = out_dim if hidden is None else hidden
        require_positive("mlp", in_dim=in_dim, dim=out_dim, depth=depth, hidden=width)
        if depth == 1 and width != out_dim:
            raise VlmError(f"'mlp' has depth=1, so no hidden layer of width {hidden}; leave hidden out, or use depth=2")
        make_activation("mlp", activation)
        self.in_dim, self.out_dim = in_dim, out_dim
        self._options: dict[str, Option] = {
            "depth": depth,
            "activation": activation,
            "hidden": width,
            "norm": norm,
            "bias": bias,
        }
        self.norm = nn.Identity() if norm == "none" else make_norm("mlp", norm, in_dim)
        layers: list[nn.Module] = []
        before = in_dim
        for index in range(depth):
            after = width if index == 0 else out_dim
            layers += [linear(before, after, bias), make_activation("mlp", activation)]
            before = after
        self.layers = nn.Sequential(*layers[:-1])
        self.reset_parameters()

    def change(self, tokens: Tensor) -> Tensor:
        """Map (..., in_dim) to (..., out_dim)."""
        tokens = self.norm(tokens)
        # One after another, so that what a layer took is freed; nn.Sequential holds on to the first.
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens

    @classmethod
    def build(
        cls,
        in_spec: TokenSpec,
        out_dim: int,
        *,
        depth: int = 2,
        activation: str = "gelu",
        hidden: int | None = None,
        norm: str = "none",
        bias: bool = True,
        dim: int | None = None,
    ) -> Self:
        """Make the MLP from the encoder's width to `dim`, by default `out_dim`."""
        width = out_dim if dim is None else dim
        return cls(in_spec.dim, width, depth, activation, hidden=hidden, norm=norm, bias=bias)

    def options(self) -> dict[str, Option]:
        """Give all options; a hidden layer of the width that goes out is not told."""
        told = {key: value for key, value in self._options.items() if key != "hidden" or value != self.out_dim}
        return {**told, "dim": self.out_dim}
