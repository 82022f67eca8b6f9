"""The perceiver resampler: learned queries that read the image and each other.

Source: Idefics2, https://arxiv.org/abs/2405.02246, section 3; after Flamingo,
https://arxiv.org/abs/2204.14198, section 3.1; `Idefics2PerceiverResampler` of
transformers.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from connectors.attention import Attention, RMSNorm, init_transformer
from connectors.base import Connector, Option, register_connector, require_positive
from connectors.tokens import TokenSpec, VisualTokens

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
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(tokens)) * self.up_proj(tokens))
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

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Map (B, Q, D) to (B, Q, D)."""
        normed = self.query_norm(queries)
        both = torch.cat([self.context_norm(context), normed], dim=1)
        queries = queries + self.attention(normed, both)
        out: Tensor = queries + self.ffn(self.ffn_norm(queries))
        return out


@register_connector("perceiver")
class PerceiverResampler(Connector):
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

    def __init__(
        self, in_dim: int, queries: int = 64, depth: int = 3, heads: int = 16, head_dim: int = 96, kv_heads: int = 4
    ) -> None:
        super().__init__()
        sizes = {"queries": queries, "depth": depth, "heads": heads, "head_dim": head_dim, "kv_heads": kv_heads}
        require_positive("perceiver", in_dim=in_dim, **sizes)
        self._options: dict[str, Option] = dict(sizes)
        self.queries = nn.Parameter(torch.empty(queries, in_dim))
        self.blocks = nn.ModuleList(PerceiverBlock(in_dim, heads, head_dim, kv_heads) for _ in range(depth))
        self.norm = RMSNorm(in_dim)
        self.apply(init_transformer)
        # Flamingo's start: transformers' class starts all at one, where every query gives the same token.
        nn.init.normal_(self.queries)

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, N, in_dim) to (B, queries, in_dim)."""
        self.out_spec(visual.spec)
        tokens = self.queries.expand(visual.tokens.shape[0], -1, -1)
        for block in self.blocks:
            tokens = block(tokens, visual.tokens)
        return VisualTokens(self.norm(tokens), prefix=visual.prefix)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Give the queries, whatever the number of image tokens."""
        num_queries, dim = self.queries.shape
        self.require_dim(spec, dim)
        return TokenSpec(num_queries, dim, num_prefix=spec.num_prefix)

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
