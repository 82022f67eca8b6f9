"""The perceiver resampler: learned queries that read the image and each other.

Source: Idefics2, https://arxiv.org/abs/2405.02246, section 3; after Flamingo,
https://arxiv.org/abs/2204.14198, section 3.1; `Idefics2PerceiverResampler` of
transformers.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from connectors.activations import gated
from connectors.attention import Attention
from connectors.base import Option, register_connector, require_positive
from connectors.init import Draw, linear
from connectors.kinds import Resampler
from connectors.norms import RMSNorm
from connectors.tokens import TokenSpec

__all__ = ["PerceiverBlock", "PerceiverResampler", "SwiGLU"]


class SwiGLU(nn.Module):
    """Map each token alone, one half gating the other.

    Args:
        dim: D, width of a token.
        hidden: width between.

    Shape: (B, N, D) -> (B, N, D).
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = linear(dim, hidden, bias=False)
        self.up_proj = linear(dim, hidden, bias=False)
        self.down_proj = linear(hidden, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        out: Tensor = self.down_proj(gated(F.silu(self.gate_proj(tokens)), self.up_proj(tokens)))
        return out


class PerceiverBlock(nn.Module):
    """One layer: queries attend to the image and to themselves at once, then SwiGLU.

    Args:
        dim: D, width of the image tokens and of the queries.
        heads: query heads.
        head_dim: width of a head.
        kv_heads: key and value heads.

    Shape: (B, Q, D), context (B, N, D) -> (B, Q, D), Q the queries.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, kv_heads: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.context_norm = RMSNorm(dim)
        self.attention = Attention(dim, heads, head_dim=head_dim, kv_heads=kv_heads, bias=False)
        self.ffn_norm = RMSNorm(dim)
        self.ffn = SwiGLU(dim, 4 * dim)

    def forward(self, queries: Tensor, context: Tensor, real: Tensor | None = None) -> Tensor:
        """Map (B, Q, D) to (B, Q, D); `real` (B, N + Q) is False where what is read only fills up."""
        normed = self.query_norm(queries)
        queries = queries + self.attention(normed, torch.cat([self.context_norm(context), normed], dim=1), real)
        out: Tensor = queries + self.ffn(self.ffn_norm(queries))
        return out


@register_connector("perceiver")
class PerceiverResampler(Resampler):
    """Read the image with a fixed number of learned queries, at its own width.

    It keeps the width, so a recipe projects before or after it. Idefics2 projects
    before: `mlp+perceiver`.

    Args:
        in_dim: D, width of the image tokens and of the queries.
        queries: number of tokens that go out.
        depth: number of layers.
        heads: query heads; they need not divide `in_dim`.
        head_dim: width of a head.
        kv_heads: key and value heads; they divide `heads`.

    Shape: (B, N, in_dim) -> (B, queries, in_dim) without grid; prefix kept.

    Raises:
        VlmError: an option is not positive, or kv_heads do not divide the heads.
    """

    hands_prefix = True
    source = "Idefics2, https://arxiv.org/abs/2405.02246"
    used_by = "Idefics2"
    choose = "for few tokens a view whatever its grid, with much data to train it"

    def __init__(
        self, in_dim: int, queries: int = 64, depth: int = 3, heads: int = 16, head_dim: int = 96, kv_heads: int = 4
    ) -> None:
        super().__init__()
        sizes = {"queries": queries, "depth": depth, "heads": heads, "head_dim": head_dim, "kv_heads": kv_heads}
        require_positive("perceiver", in_dim=in_dim, **sizes)
        self._options: dict[str, Option] = dict(sizes)
        self.in_dim, self.out_dim, self.num_queries = in_dim, in_dim, queries
        self.queries = nn.Parameter(torch.empty(queries, in_dim))
        self.blocks = nn.ModuleList(PerceiverBlock(in_dim, heads, head_dim, kv_heads) for _ in range(depth))
        self.norm = RMSNorm(in_dim)
        self.reset_parameters()

    def init_weights(self, draw: Draw) -> None:
        """Start maps at N(0, 0.02) and queries at N(0, 1)."""
        draw.modules(self, std=0.02)
        # Flamingo's start: transformers' class starts all at one, where every query gives the same token.
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
        depth: int = 3,
        heads: int = 16,
        head_dim: int = 96,
        kv_heads: int = 4,
    ) -> Self:
        """Make the resampler for the width that comes in."""
        return cls(in_spec.dim, queries, depth, heads, head_dim, kv_heads)

    def options(self) -> dict[str, Option]:
        """Give all options but the width."""
        return dict(self._options)
