"""Multi-head attention and the parts that resamplers share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from connectors.errors import VlmError

__all__ = ["Attention", "RMSNorm", "init_transformer"]


class Attention(nn.Module):
    """Attend from tokens to themselves or to a context.

    Args:
        dim: D, width of the tokens that ask, and of the result.
        heads: number of query heads.
        context_dim: width of the context, by default `dim`.
        head_dim: width of a head, by default `dim / heads`.
        kv_heads: number of key and value heads, by default `heads`; fewer is
            grouped-query attention.
        bias: whether the four linear maps have a bias.
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
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if head_dim is None:
            head_dim = _divide(dim, heads, f"{heads} heads do not divide width {dim}")
        kv_heads = heads if kv_heads is None else kv_heads
        _divide(heads, kv_heads, f"{kv_heads} kv_heads do not divide {heads} heads")
        context_dim = dim if context_dim is None else context_dim
        self.head_dim, self.grouped, self.dropout = head_dim, kv_heads != heads, dropout
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(context_dim, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(context_dim, kv_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(heads * head_dim, dim, bias=bias)

    def forward(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        """Map (B, N, dim) to (B, N, dim), attending to the context, by default to the tokens."""
        context = tokens if context is None else context
        attended = F.scaled_dot_product_attention(
            self._split(self.q_proj(tokens)),
            self._split(self.k_proj(context)),
            self._split(self.v_proj(context)),
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.grouped,
        )
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out

    def _split(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        return tokens.view(batch, length, width // self.head_dim, self.head_dim).transpose(1, 2)


class RMSNorm(nn.Module):
    """Normalise by the root mean square, in fp32.

    The square of a large fp16 value is infinite, so the norm is taken in fp32 and
    rounded to the input's dtype before the weight, as `Idefics2RMSNorm` does.

    Args:
        dim: D, width of a token.
        eps: added to the mean square.

    Shape: (B, N, D) -> (B, N, D).
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map each token alone."""
        wide = tokens.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        out: Tensor = self.weight * normed.to(tokens.dtype)
        return out


def init_transformer(module: nn.Module) -> None:
    """Start linear maps at N(0, 0.02) with zero bias, as BERT and its followers do."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _divide(whole: int, part: int, complaint: str) -> int:
    if whole % part:
        fitting = max(number for number in range(1, part) if whole % number == 0)
        raise VlmError(f"{complaint}; use a divisor of {whole}, for example {fitting}")
    return whole // part
