"""Attention within each image of a pack, for any network that attends by torch's own function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from connectors.errors import TokenShapeError, VlmError

__all__ = ["PackAttention"]


class PackAttention(TorchFunctionMode):
    """While it is entered, each image of a pack attends to itself alone.

    Within `with PackAttention(lengths, owner):` this thread's calls of `scaled_dot_product_attention`
    on a sequence of all images are made for each image by itself, without a mask, so that
    what an image costs is what its own tokens cost. Images of one length that stand side by side
    share a call. Gradients flow, under autocast too.

    What is computed again in the backward pass, as gradient checkpointing does, is computed outside
    of it, and torch.compile does not see it: neither goes with packs.

    Args:
        lengths: tokens of each image, in the order of the sequence.
        owner: the encoder's name, for messages.
    """

    def __init__(self, lengths: Sequence[int], owner: str) -> None:
        super().__init__()
        self._runs = [(length, len(list(run))) for length, run in groupby(lengths)]
        self._total = sum(lengths)
        self._owner = owner
        self._calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Let every function through but attention."""
        if func is scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def check(self, layers: int) -> None:
        """Refuse a network that attended otherwise: its images have seen each other.

        Args:
            layers: how many blocks have run.

        Raises:
            VlmError: there were fewer calls than blocks.
        """
        if self._calls < layers:
            raise VlmError(
                f"{self._owner}: {layers} of its blocks ran and {self._calls} of them attended by torch's "
                "scaled_dot_product_attention, which packs rely on; build it with attn_implementation='sdpa'"
            )

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002
        **options: Any,
    ) -> Tensor:
        """Attend within each image: (1, heads, M, d) of all images in, the same shape out."""
        shapes = [tuple(part.shape) for part in (query, key, value)]
        if attn_mask is not None or any((shape[0], shape[2]) != (1, self._total) for shape in shapes):
            masked = "" if attn_mask is None else "under a mask "
            raise TokenShapeError(
                f"{self._owner}: a pack of {self._total} tokens is one sequence without a mask, its network attends "
                f"{masked}by a query, key and value of shapes {shapes}; encode views one by one"
            )
        self._calls += 1
        parts, start = [], 0
        for length, count in self._runs:
            end = start + length * count
            # (1, heads, M, d) to (count, heads, length, d) of this run alone: views, nothing is copied.
            each = [part[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1) for part in (query, key, value)]
            found = scaled_dot_product_attention(
                each[0], each[1], each[2], dropout_p=dropout_p, is_causal=is_causal, **options
            )
            # Heads last, as every network has them next: then nothing is copied a second time.
            parts.append(found.transpose(1, 2).flatten(0, 1))
            start = end
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined[None].transpose(1, 2)
