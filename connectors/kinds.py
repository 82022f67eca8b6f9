"""Two kinds of connector: those that map each token alone, and those that read the image with queries."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from connectors.base import Connector
from connectors.errors import TokenShapeError, VlmError
from connectors.tokens import PackedTokens, TokenSpec, VisualTokens

__all__ = ["Resampler", "TokenWise"]


class TokenWise(Connector):
    """A connector that maps each token alone, so that packed images need one pass.

    A subclass sets `in_dim` and `out_dim` and writes `change`.

    Shape: (B, N, in_dim) -> (B, N, out_dim); grid kept, prefix dropped, or mapped too
    where `maps_prefix` says so.
    """

    maps_prefix: ClassVar[bool] = False
    in_dim: int
    out_dim: int

    @abstractmethod
    def change(self, tokens: Tensor) -> Tensor:
        """Map (..., in_dim) to (..., out_dim)."""

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, N, in_dim) to (B, N, out_dim)."""
        self.out_spec(visual.spec)
        prefix = None if visual.prefix is None or not self.maps_prefix else self.change(visual.prefix)
        return VisualTokens(self.change(visual.tokens), visual.grid, prefix)

    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        """Map (M, in_dim) to (M, out_dim) at once."""
        self.require_dim(TokenSpec(1, packed.tokens.shape[1]), self.in_dim)
        prefix = None if packed.prefix is None or not self.maps_prefix else self.change(packed.prefix)
        return packed.with_tokens(self.change(packed.tokens), prefix)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Keep the tokens and their grid, change the width."""
        self.require_dim(spec, self.in_dim)
        return TokenSpec(spec.num_tokens, self.out_dim, spec.grid, spec.num_prefix if self.maps_prefix else 0)


class Resampler(Connector):
    """A connector that reads any number of tokens with a fixed number of queries.

    A subclass sets `in_dim`, `num_queries` and `out_dim` and writes `read`. Packed images
    are read side by side, filled up to the longest, with a mask.

    Shape: (B, N, in_dim) -> (B, num_queries, out_dim) without grid; prefix dropped, or
    kept where `hands_prefix` says so, which needs in_dim = out_dim.
    """

    hands_prefix: ClassVar[bool] = False
    in_dim: int
    num_queries: int
    out_dim: int

    @abstractmethod
    def read(self, tokens: Tensor, real: Tensor | None = None, **extra: Any) -> Tensor:
        """Map (B, N, in_dim) to (B, num_queries, out_dim).

        Args:
            tokens: of the images.
            real: (B, N), False where a token only fills up; None where all are real.
            **extra: what the class names in `extra_inputs`.
        """

    def forward(self, visual: VisualTokens, **extra: Any) -> VisualTokens:
        """Map (B, N, in_dim) to (B, num_queries, out_dim)."""
        self.out_spec(visual.spec)
        if unknown := extra.keys() - set(self.extra_inputs):
            known = ", ".join(self.extra_inputs) or "none"
            raise VlmError(f"'{self.name}' takes no input '{min(unknown)}'; it takes beside the tokens: {known}")
        return VisualTokens(self.read(visual.tokens, **extra), prefix=visual.prefix if self.hands_prefix else None)

    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        """Read all images at once."""
        self.require_dim(TokenSpec(1, packed.tokens.shape[1]), self.in_dim)
        if not packed.grids:
            raise TokenShapeError("there is no image among the packed tokens; leave empty packs out")
        tokens, real = packed.padded()
        out = self.read(tokens, None if len(set(packed.lengths)) == 1 else real)
        images = len(packed.grids)
        prefix = packed.prefix if self.hands_prefix else None
        return PackedTokens(out.flatten(0, 1), [None] * images, [self.num_queries] * images, prefix)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Give the queries, whatever the number of image tokens."""
        self.require_dim(spec, self.in_dim)
        return TokenSpec(self.num_queries, self.out_dim, num_prefix=spec.num_prefix if self.hands_prefix else 0)
