"""Learned position tables of transformers' ViTs, resampled once instead of at every call."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from vlm_encoders.spec import EncoderSpec

__all__ = ["resample_positions"]


def resample_positions(embeddings: Any, spec: EncoderSpec) -> None:
    """Resample a table by the library's own method, and let the library take it as it is.

    At every call the library would do the same, but in the dtype of the parameters,
    which moves the table by up to a percent in bfloat16.

    Args:
        embeddings: a module with `interpolate_pos_encoding`, in float32.
        spec: its view size is what the table is brought to.
    """
    rows, columns = spec.token_spec().grid or (0, 0)
    is_embedding = hasattr(embeddings, "position_embedding")
    table = embeddings.position_embedding.weight[None] if is_embedding else embeddings.position_embeddings
    prefix = table.shape[1] - (spec.native_size[0] // spec.stride) * (spec.native_size[1] // spec.stride)
    hidden = torch.empty(1, prefix + rows * columns, table.shape[2], device="meta")
    with torch.no_grad():
        resampled = embeddings.interpolate_pos_encoding(hidden, *spec.image_size).clone()
    if is_embedding:
        embeddings.position_embedding = nn.Embedding.from_pretrained(resampled[0], freeze=False)
    else:
        embeddings.position_embeddings = nn.Parameter(resampled)
    embeddings.interpolate_pos_encoding = MethodType(_whole_table, embeddings)


def _whole_table(embeddings: Any, *_asked: Any) -> Tensor:
    """Stand in for `interpolate_pos_encoding` where the table has the views' size already."""
    table: Tensor = (
        embeddings.position_embedding.weight[None]
        if hasattr(embeddings, "position_embedding")
        else embeddings.position_embeddings
    )
    return table
