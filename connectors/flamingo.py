"""Flamingo's perceiver resampler: learned queries that read the image and each other.

Embeddings of time, for the frames of a video, are left out: each image is read alone.

Source: Flamingo, https://arxiv.org/abs/2204.14198, section 3.1; `PerceiverResampler` of
open_flamingo, whose one map to keys and values is both of ours; `IdeficsPerceiverResampler`
of transformers, with ReLU and norms of queries and keys.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from connectors.activations import make_activation
from connectors.attention import Attention
from connectors.base import Option, register_connector, require_positive
from connectors.init import Draw, linear
from connectors.kinds import Resampler
from connectors.tokens import TokenSpec

__all__ = ["FlamingoBlock", "FlamingoResampler"]


class FlamingoBlock(nn.Module):
    """One layer: queries attend to the image and to themselves at once, then a feed-forward part.

    Args:
        dim: D, width of the image tokens and of the queries.
        heads: attention heads.
        head_dim: width of a head.
        ffn: hidden width of the feed-forward part.
        activation: a key of `ACTIVATIONS`.
        qk_norm: whether queries and keys are normalised over the width of a head.

    Shape: (B, Q, D), context (B, N, D) -> (B, Q, D), Q the queries.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, ffn: int, activation: str, *, qk_norm: bool) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim)
        self.context_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, head_dim=head_dim, bias=False, qk_norm=qk_norm)
        self.ffn_norm = nn.LayerNorm(dim)
        middle = make_activation("flamingo", activation)
        self.ffn = nn.Sequential(linear(dim, ffn, bias=False), middle, linear(ffn, dim, bias=False))

    def forward(self, queries: Tensor, context: Tensor, real: Tensor | None = None) -> Tensor:
        """Map (B, Q, D) to (B, Q, D); `real` (B, N + Q) is False where what is read only fills up."""
        normed = self.query_norm(queries)
        queries = queries + self.attention(normed, torch.cat([self.context_norm(context), normed], dim=1), real)
        out: Tensor = queries + self.ffn(self.ffn_norm(queries))
        return out


@register_connector("flamingo")
class FlamingoResampler(Resampler):
    """Read the image with a fixed number of learned queries, at its own width.

    It keeps the width, so a recipe goes on: `flamingo+linear`. Flamingo itself goes on to
    cross-attention in the language model.

    Args:
        in_dim: D, width of the image tokens and of the queries.
        queries: number of tokens that go out.
        depth: number of layers.
        heads: attention heads; they need not divide `in_dim`.
        head_dim: width of a head.
        activation: a key of `ACTIVATIONS`.
        ffn_ratio: hidden width of the feed-forward parts, in widths of a token.
        ffn: the same in channels, in place of the ratio.
        qk_norm: whether queries and keys are normalised over the width of a head.

    Shape: (B, N, in_dim) -> (B, queries, in_dim) without grid; prefix kept.

    Raises:
        VlmError: an option is not positive.
        UnknownNameError: the activation is unknown.
    """

    hands_prefix = True
    source = "Flamingo, https://arxiv.org/abs/2204.14198"
    used_by = "OpenFlamingo and IDEFICS"
    choose = "to compare with Flamingo; perceiver is its later form"

    def __init__(
        self,
        in_dim: int,
        queries: int = 64,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        activation: str = "gelu",
        ffn_ratio: int = 4,
        *,
        ffn: int | None = None,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"queries": queries, "depth": depth, "heads": heads, "head_dim": head_dim, "ffn_ratio": ffn_ratio}
        width = ffn_ratio * in_dim if ffn is None else ffn
        require_positive("flamingo", in_dim=in_dim, **sizes, ffn=width)
        self._options: dict[str, Option] = {**sizes, "activation": activation, "qk_norm": qk_norm}
        if ffn is not None:
            self._options["ffn"] = ffn
        self.in_dim, self.out_dim, self.num_queries = in_dim, in_dim, queries
        self.queries = nn.Parameter(torch.empty(queries, in_dim))
        self.blocks = nn.ModuleList(
            FlamingoBlock(in_dim, heads, head_dim, width, activation, qk_norm=qk_norm) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(in_dim)
        self.reset_parameters()

    def init_weights(self, draw: Draw) -> None:
        """Start maps as PyTorch does and queries at N(0, 1), as open_flamingo."""
        draw.modules(self)
        draw.normal(self.queries)

    def read(self, tokens: Tensor, real: Tensor | None = None, **extra: Any) -> Tensor:
        """Map (B, N, in_dim) to (B, queries, in_dim)."""
        queries = self.queries.expand(tokens.shape[0], -1, -1)
        if real is not None:
            real = torch.cat([real, real.new_ones(queries.shape[:2])], dim=1)
        for block in self.blocks:
            queries = block(queries, tokens, real)
        out: Tensor = self.norm(queries)
        return out

    @classmethod
    def build(
        cls,
        in_spec: TokenSpec,
        out_dim: int,
        *,
        queries: int = 64,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        activation: str = "gelu",
        ffn_ratio: int = 4,
        ffn: int | None = None,
        qk_norm: bool = False,
    ) -> Self:
        """Make the resampler for the width that comes in."""
        return cls(in_spec.dim, queries, depth, heads, head_dim, activation, ffn_ratio, ffn=ffn, qk_norm=qk_norm)

    def options(self) -> dict[str, Option]:
        """Give all options but the width, and `ffn` where it was given."""
        return dict(self._options)
