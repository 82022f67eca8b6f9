"""Causal attention from some places of a batch to all that they see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from connectors.errors import VlmError
from vlm_encoders.vlm.text_packing import SampleMask

__all__ = ["AttentionCalls", "Places", "ReachedError", "attend_at"]


@dataclass(frozen=True)
class AttentionCall:
    """What torch's `scaled_dot_product_attention` is called with, by its names."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class ReachedError(Exception):
    """The layer has come to its attention."""

    def __init__(self, call: AttentionCall) -> None:
        super().__init__()
        self.call = call


class AttentionCalls(TorchFunctionMode):
    """Answers the calls of torch's attention in a layer, or stops the layer at the first of them.

    Args:
        answer: what attention gives; None to stop.
    """

    def __init__(self, answer: Tensor | None = None) -> None:
        super().__init__()
        self.answer = answer
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Let every function through but attention."""
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        if self.answer is None:
            raise ReachedError(AttentionCall(*args, **(kwargs or {})))
        return self.answer


@dataclass(frozen=True)
class Places:
    """Some places of a batch.

    Attributes:
        shape: (B, T) of the batch.
        mask: (B, T), true at the places.
        lengths: tokens of the samples of each row: T alone where a row is a sample.
        columns: of each sample, row by row, the places counted from its start.
    """

    shape: tuple[int, int]
    mask: Tensor
    lengths: list[int]
    columns: list[Tensor]

    @classmethod
    def of(cls, mask: Tensor, lengths: Sequence[int] | None) -> Self:
        """Read the places (B, T) of a batch, whose samples may stand one after another in a row (1, T)."""
        rows, length = mask.shape
        own = list(lengths or [length])
        held = mask.cpu()
        columns = [part.nonzero().flatten().to(mask.device) for row in held for part in row.split(own)]
        return cls((rows, length), mask, own, columns)

    def take(self, values: Tensor) -> Tensor:
        """Give (1, places, ...) of (B, T, ...), or of (1, T, ...) that stands for all rows."""
        return values.expand(self.shape[0], *values.shape[1:])[self.mask][None]

    def put(self, values: Tensor) -> Tensor:
        """Give (B, T, ...) with (1, places, ...) in it, zeros elsewhere."""
        return values.new_zeros(*self.shape, *values.shape[2:]).index_put_((self.mask,), values[0])

    def take_all(self, values: Any) -> Any:
        """Give arguments of a layer with all that has a token at each place taken at the places."""
        if isinstance(values, Tensor):
            if values.ndim > 1 and values.shape[0] in {1, self.shape[0]} and values.shape[1] == self.shape[1]:
                return self.take(values)
            return values
        if isinstance(values, tuple):
            return tuple(self.take_all(value) for value in values)
        if isinstance(values, Mapping):
            return {name: self.take_all(value) for name, value in values.items()}
        return values


def attend_at(call: AttentionCall, places: Places) -> Tensor:
    """Attend as a call would, from the places alone.

    Args:
        call: of a batch's attention: (B, heads, T, d), with a mask (B or 1, heads or 1, T, T) or causal.
        places: of the batch.

    Returns:
        (1, heads, places, d).

    Raises:
        VlmError: the call is neither causal nor masked.
    """
    mask = call.attn_mask
    if mask is None and not call.is_causal:
        raise VlmError("attention without a mask that is not causal; run the last layer in full")
    if isinstance(mask, SampleMask):
        mask = None
    rows, groups = call.query.shape[0], call.query.shape[1] // call.key.shape[1]
    # A masked call is answered row by row, as its mask says of all tokens what they see.
    lengths = places.lengths if mask is None else [places.shape[1]]
    columns = places.columns if mask is None else Places.of(places.mask, None).columns
    # One index and one split each, since a cut of its own for each sample would be as many sums in the backward pass.
    queries = call.query.transpose(1, 2)[places.mask].split([len(each) for each in columns])
    spans = zip(
        *([part for row in each.unbind() for part in row.split(lengths, dim=1)] for each in (call.key, call.value)),
        strict=True,
    )
    found = []
    for number, ((key, value), query, seen) in enumerate(zip(spans, queries, columns, strict=True)):
        if not len(seen):
            continue
        end = int(seen[-1]) + 1 if mask is None else key.shape[1]
        # Heads that share a key are further queries of it: (places, heads, d) to (1, key heads, group * places, d).
        several = query.transpose(0, 1).unflatten(0, (-1, groups)).flatten(1, 2)
        own = _causal(seen, end) if mask is None else mask.expand(rows, -1, -1, -1)[number][:, seen]
        own = (
            own.expand(groups, *own.shape[1:]).flatten(0, 1)
            if own.shape[0] == 1
            else own.unflatten(0, (-1, groups)).flatten(1, 2)
        )
        made = scaled_dot_product_attention(
            several[None], key[None, :, :end], value[None, :, :end], own, call.dropout_p, scale=call.scale
        )
        found.append(made[0].unflatten(1, (groups, -1)).flatten(0, 1))
    return torch.cat(found, dim=1)[None]


def _causal(columns: Tensor, end: int) -> Tensor:
    return (columns[:, None] >= torch.arange(end, device=columns.device))[None]
