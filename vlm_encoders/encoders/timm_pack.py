"""Models of timm on views of many sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from connectors.errors import VlmError
from connectors.tokens import PackedTokens, VisualTokens
from vlm_encoders.encoders.pack_attention import PackAttention
from vlm_encoders.encoders.pack_views import Places, ViewTokens, by_size, join_sizes, pack_views
from vlm_encoders.spec import EncoderSpec

__all__ = ["packs", "read_by_size", "read_packed", "reads_sequences"]


def packs(network: Any) -> bool:
    """Say whether a model takes views of many sizes at once."""
    return type(network).__name__ == "ConvNeXt" or (reads_sequences(network) and network.rope is None)


def reads_sequences(network: Any) -> bool:
    """Say whether a model's blocks run over one sequence of all views."""
    return type(network).__name__ == "NaFlexVit"


def read_packed(
    network: Any, views: Sequence[Tensor], kept: Places, layers: Sequence[int], spec: EncoderSpec
) -> PackedTokens:
    """Run NaFlexViT once over views of many sizes: each attends to itself, all else runs over all.

    Stochastic depth, where an option asks for it in training, leaves a block out for a whole pack.

    Args:
        network: cut behind its last layer that is read.
        views: pixels (3, H, W) of each.
        kept: as in `Encoder.forward_packed`.
        layers: counted from 0, in the order in which they are joined.
        spec: the encoder's.

    Raises:
        VlmError: the model turns queries by rotary angles, drops patches by itself, or attends by other means
            than torch's own function.
    """
    _check(network, spec)
    groups = [(indices, _embed(network, pixels)) for indices, pixels in by_size(views)]
    pack = pack_views(groups, kept, spec.num_prefix)
    found: dict[int, Tensor] = {}
    with PackAttention(pack.lengths, spec.name) as attention:
        hidden = network.norm_pre(pack.hidden)
        for place, block in enumerate(network.blocks):
            hidden = block(hidden)
            if place in layers:
                found[place] = network.norm(hidden) if spec.final_norm else hidden
    attention.check(len(network.blocks))
    parts = [found[place] for place in layers]
    return pack.unpack(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))


def read_by_size(
    encode: Callable[[Tensor], VisualTokens], views: Sequence[Tensor], kept: Places, spec: EncoderSpec
) -> PackedTokens:
    """Run a model that reads whole maps on the views of each size.

    Args:
        encode: pixels (B, 3, H, W) of any size to tokens.
        views: pixels (3, H, W) of each.
        kept: None: whole maps lose no token.
        spec: the encoder's.

    Raises:
        VlmError: tokens are to be dropped.
    """
    return join_sizes(((indices, encode(pixels)) for indices, pixels in by_size(views)), kept, spec.name)


def _embed(network: Any, pixels: Tensor) -> ViewTokens:
    hidden, (rows, columns) = network.embeds(pixels)
    return ViewTokens(hidden, (rows, columns))


def _check(network: Any, spec: EncoderSpec) -> None:
    if network.rope is not None:
        raise VlmError(f"{spec.name}: its rotary angles are those of one grid; leave rope_type out for packs")
    if network.patch_drop is not None and network.training:
        raise VlmError(f"{spec.name}: it drops patches by itself; leave patch_drop_rate out and say which are kept")
