"""SAM's global attention with its position bias made a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

__all__ = ["RowAttention", "attend_by_rows", "resample_offsets"]

_QUERIES = 64
"""Queries of one call: a bias of 64 x 4096 a head stays in the processor's cache."""


class RowAttention(nn.Module):
    """The attention of a global block of `SamVisionModel`, with the same parameters and keys.

    The library adds a bias of (B, heads, N, N) that it computes from the queries and two
    tables; 1583 MB in SAM-B at 1024 px. Here each group of query rows makes its own part.

    Source: transformers' `SamVisionSdpaAttention`.

    Args:
        attention: the library's module, whose parameters are taken over.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads: int = attention.num_attention_heads
        self.qkv: nn.Linear = attention.qkv
        self.proj: nn.Linear = attention.proj
        self.rel_pos_h: nn.Parameter = attention.rel_pos_h
        self.rel_pos_w: nn.Parameter = attention.rel_pos_w

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = None) -> tuple[Tensor, None]:  # noqa: FBT001
        """Attend over a map (B, R, C, D); the second value stands for weights that are not made."""
        # Everything but the result is freed before the projection.
        return self.proj(self._attend(hidden_states)), None

    def _attend(self, hidden_states: Tensor) -> Tensor:
        batch, rows, columns, width = hidden_states.shape
        shape = (batch, rows * columns, 3, self.heads, width // self.heads)
        # Copied once, as the library does: every part reads all keys and values.
        query, key, value = self.qkv(hidden_states).reshape(shape).permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        vertical, horizontal = _offsets(self.rel_pos_h, rows), _offsets(self.rel_pos_w, columns)
        step = max(_QUERIES // columns, 1)
        groups = zip(query.unflatten(2, (rows, columns)).split(step, dim=2), vertical.split(step), strict=True)
        if torch.is_grad_enabled() and (query.requires_grad or vertical.requires_grad):
            # Autograd would keep every part of the bias: as much as the whole.
            parts = [
                checkpoint(
                    _attend_part, part, key, value, near, horizontal, use_reentrant=False, preserve_rng_state=False
                )
                for part, near in groups
            ]
            return torch.cat(parts, dim=2).transpose(1, 2).reshape(hidden_states.shape)
        joined = hidden_states.new_empty(batch, rows * columns, self.heads, width // self.heads)
        # One buffer for all parts: freshly taken ones leave holes in the process's memory.
        buffer = key.new_empty(batch, self.heads, step, columns, rows, columns)
        for place, (part, near) in zip(joined.split(step * columns, dim=1), groups, strict=True):
            place.copy_(_attend_part(part, key, value, near, horizontal, buffer).transpose(1, 2))
        return joined.reshape(hidden_states.shape)


def attend_by_rows(layers: Iterable[Any]) -> None:
    """Replace the attention of the global blocks among these layers of SAM's encoder."""
    for layer in layers:
        if layer.window_size == 0 and layer.attn.use_rel_pos:
            layer.attn = RowAttention(layer.attn)


def _attend_part(
    query: Tensor, key: Tensor, value: Tensor, vertical: Tensor, horizontal: Tensor, buffer: Tensor | None = None
) -> Tensor:
    """Attend from a few rows, (B, heads, r, C, D), to all places, with the bias that their queries make."""
    along_rows = torch.einsum("bnrcd,rkd->bnrck", query, vertical)
    along_columns = torch.einsum("bnrcd,ckd->bnrck", query, horizontal)
    if buffer is not None and query.shape[2] != buffer.shape[2]:
        buffer = None
    bias = torch.add(along_rows[..., :, None], along_columns[..., None, :], out=buffer).flatten(-2).flatten(2, 3)
    return scaled_dot_product_attention(query.flatten(2, 3), key, value, attn_mask=bias)


def resample_offsets(table: Tensor, side: int) -> Tensor:
    """Bring a table of offsets on one axis to a side, (2 * side - 1, D), linearly as the library, in float32."""
    if len(table) == 2 * side - 1:
        return table
    resized = nn.functional.interpolate(table.float().T[None], size=2 * side - 1, mode="linear")
    return resized[0].T.to(table.dtype).contiguous()


def _offsets(table: Tensor, side: int) -> Tensor:
    """Give the table's entry for each pair of places on an axis, (side, side, D)."""
    places = torch.arange(side, device=table.device)
    return resample_offsets(table, side)[places[:, None] - places[None, :] + side - 1]
