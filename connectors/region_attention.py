"""Attention from one token of each place to the tokens of a region of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from connectors.attention import divide
from connectors.base import require_positive
from connectors.init import Draw, linear

__all__ = ["RegionAttention", "attend_region", "require_heads"]


class RegionAttention(nn.Module):
    """Attend from one token to those of its region.

    Args:
        dim: D, width of the tokens.
        heads: number of heads.

    Shape: (..., D), keys and values (..., K, D) -> (..., D), K the tokens of a region.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = linear(dim, dim)
        self.k_proj = linear(dim, dim)
        self.v_proj = linear(dim, dim)
        self.out_proj = linear(dim, dim)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, real: Tensor | None = None) -> Tensor:
        """Map (..., D) to (..., D); `real` (..., K) is False where a token of the region only fills up."""
        read = attend_region(self.q_proj(query), self.k_proj(keys), self.v_proj(values), self.heads, real)
        out: Tensor = self.out_proj(read)
        return out

    def init_weights(self, draw: Draw) -> None:
        """Start as `nn.MultiheadAttention`, its three input maps as one of thrice the height."""
        for proj in (self.q_proj, self.k_proj, self.v_proj):
            draw.uniform(proj.weight, math.sqrt(6 / (4 * proj.in_features)))
            nn.init.zeros_(proj.bias)
        draw.trunc_normal(self.out_proj.weight, 0.02)
        nn.init.zeros_(self.out_proj.bias)


def attend_region(query: Tensor, keys: Tensor, values: Tensor, heads: int, real: Tensor | None = None) -> Tensor:
    """Attend from one query (..., D) to keys and values (..., K, D) of its own, where `real`; gives (..., D).

    Written out, since every place is a row of the batch here: fused kernels are made for few
    rows of many keys, and those of CUDA have refused batches above 65535 rows.
    """
    head_dim = query.shape[-1] // heads
    wide = torch.promote_types(query.dtype, torch.float32)
    scaled = (query * head_dim**-0.5).unsqueeze(-2)
    scores = (scaled * keys).unflatten(-1, (heads, head_dim)).sum(-1, dtype=wide)
    if real is not None:
        scores = scores.masked_fill(~real.unsqueeze(-1), torch.finfo(wide).min)
    weights = scores.softmax(-2).to(values.dtype).unsqueeze(-1)
    read: Tensor = (weights * values.unflatten(-1, (heads, head_dim))).sum(-3)
    return read.flatten(-2)


def require_heads(name: str, hidden: int, heads: int) -> None:
    """Refuse heads that do not divide the width of the attention.

    Raises:
        VlmError: they do not, or are not positive.
    """
    require_positive(name, heads=heads)
    divide(hidden, heads, f"'{name}' has heads={heads}, which do not divide hidden={hidden}")
