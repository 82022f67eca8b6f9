"""The gated MLP: one map gates another.

Source: Shazeer, https://arxiv.org/abs/2002.05202 (SwiGLU); Idefics2,
https://arxiv.org/abs/2405.02246, whose modality projection `Idefics2MLP` of transformers is.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from connectors.activations import gated, make_activation, saturate
from connectors.base import Option, register_connector, require_positive
from connectors.init import Draw, linear
from connectors.kinds import TokenWise
from connectors.norms import make_norm
from connectors.tokens import TokenSpec

__all__ = ["GatedMLP"]


@register_connector("gated_mlp")
class GatedMLP(TokenWise):
    """Map each token to another width by down(activation(gate(x)) * up(x)).

    Idefics2 is `gated_mlp:hidden=14336+perceiver`. Aya Vision and Command A Vision keep
    up and gate in one matrix, `linear_1`, whose first half of rows is up and second the
    gate; behind `pixel_shuffle` they are this with `bias=true`.

    Args:
        in_dim: D, width of the tokens that come in.
        out_dim: width of the tokens that go out.
        hidden: width between, by default `out_dim`.
        activation: a key of `ACTIVATIONS`, for the gate.
        bias: whether the maps have a bias.
        norm: a key of `NORMS` for a norm in front, or "none".

    Shape: (B, N, in_dim) -> (B, N, out_dim); grid kept, prefix dropped.

    Raises:
        VlmError: a width is not positive.
        UnknownNameError: the activation or the norm is unknown.
    """

    source = "Shazeer, https://arxiv.org/abs/2002.05202"
    used_by = "Idefics2, in front of its perceiver; Aya Vision and Command A Vision, behind a fold"
    choose = "in place of mlp where the LLM's own layers are gated and a third matrix is no burden"

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden: int | None = None,
        activation: str = "silu",
        *,
        bias: bool = False,
        norm: str = "none",
    ) -> None:
        super().__init__()
        width = out_dim if hidden is None else hidden
        require_positive("gated_mlp", in_dim=in_dim, dim=out_dim, hidden=width)
        self.in_dim, self.out_dim = in_dim, out_dim
        self._options: dict[str, Option] = {"hidden": width, "activation": activation, "bias": bias, "norm": norm}
        self.activation = make_activation("gated_mlp", activation)
        self.norm = nn.Identity() if norm == "none" else make_norm("gated_mlp", norm, in_dim)
        self.gate_proj = linear(in_dim, width, bias)
        self.up_proj = linear(in_dim, width, bias)
        self.down_proj = linear(width, out_dim, bias)
        self.reset_parameters()

    def init_weights(self, draw: Draw) -> None:
        """Start maps at N(0, 0.02) with zero biases, as transformers starts Idefics2 and Aya Vision."""
        draw.modules(self, std=0.02)

    def change(self, tokens: Tensor) -> Tensor:
        """Map (..., in_dim) to (..., out_dim); in fp16 what would be infinite is the largest number."""
        normed = self.norm(tokens)
        out: Tensor = self.down_proj(gated(self.activation(self.gate_proj(normed)), self.up_proj(normed)))
        return saturate(out) if out.dtype is torch.float16 else out

    @classmethod
    def build(
        cls,
        in_spec: TokenSpec,
        out_dim: int,
        *,
        hidden: int | None = None,
        activation: str = "silu",
        bias: bool = False,
        norm: str = "none",
        dim: int | None = None,
    ) -> Self:
        """Make the MLP from the encoder's width to `dim`, by default `out_dim`."""
        return cls(in_spec.dim, out_dim if dim is None else dim, hidden, activation, bias=bias, norm=norm)

    def options(self) -> dict[str, Option]:
        """Give all options; a hidden layer of the width that goes out is not told."""
        told = {key: value for key, value in self._options.items() if key != "hidden" or value != self.out_dim}
        return {**told, "dim": self.out_dim}
