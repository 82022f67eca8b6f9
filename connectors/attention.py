"""Multi-head attention over tokens, or from queries to a context."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from connectors.errors import VlmError
from connectors.init import linear

__all__ = ["Attention", "divide"]

# Rows of a product on the CPU: fewer starve it, and more take more memory than keys and values would.
_ROWS = 96


class Attention(nn.Module):
    """Attend from tokens to themselves or to a context.

    Softmax is taken in fp32 whatever the dtype. A token of the context that is not real gets
    no weight; one that asks with nothing real to read gets some finite result.

    Args:
        dim: D, width of the tokens that ask, and of the result.
        heads: number of query heads.
        context_dim: width of the context, by default `dim`.
        head_dim: width of a head, by default `dim / heads`.
        kv_heads: number of key and value heads, by default `heads`; fewer is
            grouped-query attention.
        bias: whether the four linear maps have a bias.
        qk_norm: whether queries and keys are normalised over the width of a head.
        dropout: probability with which an attention weight is dropped in training.

    Shape: (B, N, dim), context (B, M, context_dim) -> (B, N, dim).

    Raises:
        VlmError: the heads do not divide the width, or kv_heads not the heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        context_dim: int | None = None,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if head_dim is None:
            head_dim = divide(dim, heads, f"{heads} heads do not divide width {dim}")
        kv_heads = heads if kv_heads is None else kv_heads
        divide(heads, kv_heads, f"{kv_heads} kv_heads do not divide {heads} heads")
        context_dim = dim if context_dim is None else context_dim
        self.head_dim, self.grouped, self.dropout = head_dim, kv_heads != heads, dropout
        self.q_proj = linear(dim, heads * head_dim, bias)
        self.k_proj = linear(context_dim, kv_heads * head_dim, bias)
        self.v_proj = linear(context_dim, kv_heads * head_dim, bias)
        self.out_proj = linear(heads * head_dim, dim, bias)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm, self.k_norm = nn.LayerNorm(head_dim), nn.LayerNorm(head_dim)

    def forward(self, tokens: Tensor, context: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """Map (B, N, dim) to (B, N, dim).

        Args:
            tokens: that ask.
            context: (B, M, context_dim) that they read, by default the tokens themselves.
            real: (B, M), False where a token of the context is not to be read; None reads all.
        """
        queries = self.q_proj(tokens)
        if context is not None and self._absorbs(queries):
            attended = self._read_absorbed(queries, context, real)
        else:
            attended = self._read(queries, tokens if context is None else context, real)
        out: Tensor = self.out_proj(attended)
        return out

    def _read(self, queries: Tensor, context: Tensor, real: Tensor | None) -> Tensor:
        asked, keys = self._split(queries), self._split(self.k_proj(context))
        if self.qk_norm:
            asked, keys = self.q_norm(asked), self.k_norm(keys)
        attended = F.scaled_dot_product_attention(
            asked,
            keys,
            self._split(self.v_proj(context)),
            attn_mask=None if real is None else real[:, None, None],
            dropout_p=self._dropped,
            enable_gqa=self.grouped,
        )
        return attended.transpose(1, 2).flatten(2)

    def _absorbs(self, queries: Tensor) -> bool:
        """Say whether it is cheaper, and as exact, to make no keys and values.

        Fewer queries than a head is wide make it cheaper. In half precision the scores would
        be rounded before the softmax, dropped weights do not sum to one, and maps that are more
        than their weights (adapters, hooks, quantised ones) must be called.
        """
        plain = not (self.grouped or self.qk_norm or self._dropped)
        plain = plain and _is_plain(self.k_proj) and _is_plain(self.v_proj)
        return plain and queries.shape[1] < self.head_dim and queries.dtype in {torch.float32, torch.float64}

    def _read_absorbed(self, queries: Tensor, context: Tensor, real: Tensor | None) -> Tensor:
        """Read the context itself: (q W_k^T) x^T are the scores, and W_v maps what they sum of it.

        The bias of the keys adds the same to each score of a query, which the softmax cancels;
        it is added all the same, to be in the graph. That of the values is added at the end.
        """
        (batch, length, _), width = queries.shape, self.head_dim
        heads = queries.shape[2] // width
        asked = (queries * width**-0.5).view(batch, length, heads, width).permute(2, 0, 1, 3)
        key_maps, value_maps = (proj.weight.view(heads, width, -1) for proj in (self.k_proj, self.v_proj))
        key_bias = None if self.k_proj.bias is None else self.k_proj.bias.view(heads, width, 1)
        hidden = None if real is None else ~real[:, None]

        def by_image(rows: Tensor) -> Tensor:
            return rows.view(rows.shape[0], batch, length, rows.shape[2]).transpose(0, 1).flatten(1, 2)

        found, step = [], heads if context.device.type != "cpu" else max(1, _ROWS // length)
        for part in (slice(start, start + step) for start in range(0, heads, step)):
            rows = asked[part].flatten(1, 2)
            bias = rows.new_zeros(()) if key_bias is None else by_image(torch.bmm(rows, key_bias[part]))
            large = torch.baddbmm(bias, by_image(torch.bmm(rows, key_maps[part])), context.transpose(1, 2))
            if hidden is not None:
                large = large.masked_fill(hidden, torch.finfo(large.dtype).min)
            # One name for all that is large, so that each is freed once the next is there.
            large = large.softmax(-1)
            large = torch.bmm(large, context).view(batch, rows.shape[0], length, context.shape[2])
            large = large.transpose(0, 1).flatten(1, 2)
            found.append(torch.bmm(large, value_maps[part].transpose(1, 2)))
        out = torch.cat(found).view(heads, batch, length, width).permute(1, 2, 0, 3).flatten(2)
        return out if self.v_proj.bias is None else out + self.v_proj.bias

    @property
    def _dropped(self) -> float:
        return self.dropout if self.training else 0.0

    def _split(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        return tokens.view(batch, length, width // self.head_dim, self.head_dim).transpose(1, 2)


def _is_plain(proj: nn.Module) -> bool:
    """Say whether a map is its weight and bias, and nobody watches it."""
    # torch has no public way to ask for hooks.
    watched = proj._forward_hooks or proj._forward_pre_hooks or proj._backward_hooks or proj._backward_pre_hooks  # noqa: SLF001
    # Quantised and sharded weights are tensors that wrap others.
    return type(proj) is nn.Linear and not hasattr(proj.weight, "__tensor_flatten__") and not watched


def divide(whole: int, part: int, complaint: str) -> int:
    """Divide a width by a number of heads, or refuse a number that does not divide it.

    Args:
        whole: the width.
        part: the number, at least 1.
        complaint: begins the message, which goes on with a number that would do.

    Raises:
        VlmError: it does not.
    """
    if whole % part:
        # Small divisors and what each leaves; the bound keeps nonsense from being searched for minutes.
        small = [number for number in range(1, min(math.isqrt(whole), 4096) + 1) if whole % number == 0]
        fitting = max(number for low in small for number in (low, whole // low) if number < part)
        raise VlmError(f"{complaint}; use a divisor of {whole}, for example {fitting}")
    return whole // part
