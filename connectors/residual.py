"""A residual link: what a chain makes of the tokens is added to them.

Source: He et al., https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from connectors.activations import saturate
from connectors.base import Option, register_connector
from connectors.chain import Chain, Wrapper
from connectors.errors import TokenShapeError
from connectors.tokens import PackedTokens, TokenSpec, VisualTokens

__all__ = ["Residual"]


@register_connector("residual")
class Residual(Wrapper):
    """Add to the tokens what a chain makes of them: `residual(norm+mlp)`.

    Args:
        inner: a chain that keeps the number of tokens, their grid and their width.

    Shape: (B, N, D) -> (B, N, D); grid and prefix kept, the prefix as it came.
    """

    source = "He et al., https://arxiv.org/abs/1512.03385"
    used_by = "the positional convolution of MobileVLM V2"
    choose = "around links that refine tokens at their own width, so that training starts near what the encoder gave"

    def __init__(self, inner: Chain) -> None:
        super().__init__(inner)

    def forward(self, visual: VisualTokens, **extra: Any) -> VisualTokens:
        """Map (B, N, D) to (B, N, D)."""
        self.out_spec(visual.spec)
        added = _add(visual.tokens, self.inner(visual, **extra).tokens)
        return VisualTokens(added, visual.grid, visual.prefix)

    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        """Map (M, D) to (M, D).

        Raises:
            TokenShapeError: the chain changes the number, the grid or the width of the tokens.
        """
        out = self.inner.forward_packed(packed)
        for came, went in zip(packed.specs, out.specs, strict=True):
            _require_same(came, went)
        return packed.with_tokens(_add(packed.tokens, out.tokens), packed.prefix)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Keep everything.

        Raises:
            TokenShapeError: the chain changes the number, the grid or the width of the tokens.
        """
        _require_same(spec, self.inner.out_spec(spec))
        return spec

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, *, inner: Chain) -> Self:
        """Make the link around a chain built for `in_spec`."""
        return cls(inner)

    def options(self) -> dict[str, Option]:
        """Give none: the chain has its own."""
        return {}


def _add(came: Tensor, made: Tensor) -> Tensor:
    """Add; in fp16 what would be infinite is the largest number."""
    total = came + made
    return saturate(total) if total.dtype is torch.float16 else total


def _require_same(came: TokenSpec, went: TokenSpec) -> None:
    if (went.num_tokens, went.dim, went.grid) != (came.num_tokens, came.dim, came.grid):
        raise TokenShapeError(
            f"'residual' adds what its chain gives, {_words(went)}, to what comes in, {_words(came)}; "
            "wrap only links that keep number, grid and width"
        )


def _words(spec: TokenSpec) -> str:
    place = "without grid" if spec.grid is None else f"on {spec.grid[0]}x{spec.grid[1]}"
    return f"{spec.num_tokens} tokens {place} of width {spec.dim}"
