"""The Q-Former: learned queries that read the image by cross-attention.

Source: BLIP-2, https://arxiv.org/abs/2301.12597, section 3.1; `Blip2QFormerModel`
of transformers, the path of the queries. A fresh Q-Former needs far more data than
an MLP: BLIP-2 trained its own on 129M pairs before any language model was there.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from connectors.attention import Attention
from connectors.base import Option, register_connector, require_positive
from connectors.errors import VlmError
from connectors.init import Draw, linear
from connectors.kinds import Resampler
from connectors.tokens import TokenSpec

__all__ = ["BERT_EPS", "QFormer", "QFormerLayer", "require_dropout"]

BERT_EPS = 1e-12
"""Added under the root of BERT's norms, from whose weights BLIP-2 starts its Q-Former."""


class QFormerLayer(nn.Module):
    """One layer: self-attention, cross-attention where asked, feed-forward, norms last.

    Args:
        dim: width of the queries.
        heads: attention heads.
        ffn: hidden width of the feed-forward part.
        context_dim: width of the image tokens; None for a layer that does not read them.
        dropout: probability in training, after each part and on attention weights.

    Shape: (B, Q, dim), context (B, N, context_dim) -> (B, Q, dim), Q the queries.
    """

    def __init__(self, dim: int, heads: int, ffn: int, context_dim: int | None, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(dim, heads, dropout=dropout)
        self.self_norm = nn.LayerNorm(dim, eps=BERT_EPS)
        self.has_cross_attention = context_dim is not None
        if self.has_cross_attention:
            self.cross_attention = Attention(dim, heads, context_dim=context_dim, dropout=dropout)
            self.cross_norm = nn.LayerNorm(dim, eps=BERT_EPS)
        self.ffn = nn.Sequential(linear(dim, ffn), nn.GELU(), linear(ffn, dim))
        self.ffn_norm = nn.LayerNorm(dim, eps=BERT_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, context: Tensor, real: Tensor | None = None) -> Tensor:
        """Map (B, Q, dim) to (B, Q, dim); `real` (B, N) is False where a token of the context only fills up."""
        return self.read(self.exchange(queries), context, real)

    def exchange(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        """Let tokens attend to each other: (B, Q, dim) to (B, Q, dim)."""
        out: Tensor = self.self_norm(tokens + self.dropout(self.self_attention(tokens, real=real)))
        return out

    def read(self, queries: Tensor, context: Tensor, real: Tensor | None) -> Tensor:
        """Let queries read the image, where the layer does, and map each alone: (B, Q, dim) to (B, Q, dim)."""
        if self.has_cross_attention:
            queries = self.cross_norm(queries + self.dropout(self.cross_attention(queries, context, real)))
        out: Tensor = self.ffn_norm(queries + self.dropout(self.ffn(queries)))
        return out


@register_connector("qformer")
class QFormer(Resampler):
    """Read the image with a fixed number of learned queries.

    It ends at width `dim`, so a recipe goes on: `qformer+linear`. BLIP-2 shows it
    CLS as well: `keep_prefix+qformer+linear`.

    Args:
        in_dim: D, width of the image tokens.
        queries: number of tokens that go out.
        dim: width of the queries.
        layers: number of layers.
        heads: attention heads; they divide `dim`.
        cross_every: layers 0, cross_every, 2*cross_every, ... read the image.
        ffn: hidden width of the feed-forward parts.
        dropout: 0 and not the published 0.1, because the one short pass that trains a
            connector under-fits, and a connector that is not trained stays the same
            in `train()`.

    Shape: (B, N, in_dim) -> (B, queries, dim) without grid; prefix dropped.

    Raises:
        VlmError: an option is not positive, the heads do not divide the width, or the
            dropout is no probability.
    """

    source = "BLIP-2, https://arxiv.org/abs/2301.12597"
    used_by = "BLIP-2"
    choose = "for few tokens a view where its pretrained weights are loaded, or there is much data to train it"

    def __init__(
        self,
        in_dim: int,
        queries: int = 32,
        dim: int = 768,
        layers: int = 12,
        heads: int = 12,
        cross_every: int = 2,
        ffn: int = 3072,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"queries": queries, "dim": dim, "layers": layers, "heads": heads}
        sizes |= {"cross_every": cross_every, "ffn": ffn}
        require_positive("qformer", in_dim=in_dim, **sizes)
        require_dropout("qformer", dropout)
        self.in_dim, self.num_queries, self.out_dim = in_dim, queries, dim
        self._options: dict[str, Option] = {**sizes, "dropout": dropout}
        self.queries = nn.Parameter(torch.empty(queries, dim))
        self.norm = nn.LayerNorm(dim, eps=BERT_EPS)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            QFormerLayer(dim, heads, ffn, None if index % cross_every else in_dim, dropout) for index in range(layers)
        )
        self.reset_parameters()

    def init_weights(self, draw: Draw) -> None:
        """Start as BERT; the queries at N(0, 0.02), as LAVIS does."""
        draw.modules(self, std=0.02)
        draw.normal(self.queries, 0.02)

    def read(self, tokens: Tensor, real: Tensor | None = None, **extra: Any) -> Tensor:
        """Map (B, N, in_dim) to (B, queries, dim)."""
        queries: Tensor = self.dropout(self.norm(self.queries.expand(tokens.shape[0], -1, -1)))
        for layer in self.layers:
            queries = layer(queries, tokens, real)
        return queries

    @classmethod
    def build(
        cls,
        in_spec: TokenSpec,
        out_dim: int,
        *,
        queries: int = 32,
        dim: int = 768,
        layers: int = 12,
        heads: int = 12,
        cross_every: int = 2,
        ffn: int = 3072,
        dropout: float = 0.0,
    ) -> Self:
        """Make the Q-Former for the encoder's width."""
        return cls(in_spec.dim, queries, dim, layers, heads, cross_every, ffn, dropout)

    def options(self) -> dict[str, Option]:
        """Give all options but the encoder's width."""
        return dict(self._options)


def require_dropout(name: str, dropout: float) -> None:
    """Refuse a dropout that is no probability below 1.

    Raises:
        VlmError: it is not.
    """
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise VlmError(f"'{name}' has dropout={dropout}; give a probability from 0 to below 1, for example 0.1")
