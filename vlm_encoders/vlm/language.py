"""The LLM on embeddings: a mask only where it needs one, logits only where they are used."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from connectors.errors import VlmError
from vlm_encoders.vlm.last_layer import NotPrunedError, last_layer_at
from vlm_encoders.vlm.text_packing import logits_alone, packed_inputs, takes

__all__ = ["VLMOutput", "predict", "require_left_padding"]

_IGNORED = -100
_CHUNK = 1024
"""Logits, in tokens, that are held in fp32 at a time."""


@dataclass(frozen=True)
class VLMOutput:
    """What a forward pass gives.

    Attributes:
        loss: mean cross-entropy over the supervised tokens, fp32; None without labels.
        logits: (B, T, vocabulary) without labels; with labels only those that predict
            a supervised token, (supervised, vocabulary), in the order of the batch.
        num_supervised: supervised tokens of the batch; 0 without labels.
    """

    loss: Tensor | None
    logits: Tensor
    num_supervised: int


def predict(
    llm: nn.Module,
    embeds: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    lengths: Sequence[int] | None = None,
) -> VLMOutput:
    """Run an LLM on embeddings, to logits or to the loss on labels.

    Args:
        llm: a Hugging Face causal LM.
        embeds: (B, T, H).
        attention_mask: (B, T), 1 at real tokens; None for no padding.
        labels: (B, T), ids at supervised places and -100 elsewhere, or None.
        lengths: tokens of the samples that stand one after another in a row (1, T), each attending to itself
            alone; None where each row is a sample.

    Raises:
        VlmError: the labels are of another shape, or nothing is supervised.
    """
    own = _padding_inputs(llm, attention_mask) if lengths is None else packed_inputs(llm, embeds, lengths)
    inputs = {"inputs_embeds": embeds, **logits_alone(llm), **own}
    if labels is None:
        return VLMOutput(None, llm(**inputs).logits, 0)
    if labels.shape != embeds.shape[:2]:
        raise VlmError(f"labels are (B, T) = {tuple(embeds.shape[:2])}, got shape {tuple(labels.shape)}")
    places = torch.zeros_like(labels, dtype=torch.bool)
    places[:, :-1] = labels[:, 1:] != _IGNORED
    if lengths is not None:
        # From the end of a sample, nothing of the next is predicted.
        places[:, torch.tensor(lengths).cumsum(0) - 1] = False
    targets = labels[:, 1:][places[:, :-1]]
    if targets.numel() == 0:
        raise VlmError("the batch has no supervised token, so no loss; check that the samples hold answers")
    logits = _logits_at(llm, inputs, places, lengths)
    return VLMOutput(_mean_loss(logits, targets), logits, targets.numel())


def require_left_padding(attention_mask: Tensor) -> None:
    """Refuse a mask (B, T) behind which a generated token would follow padding.

    Raises:
        VlmError: a sample ends in padding.
    """
    padded = int((attention_mask[:, -1] == 0).sum())
    if padded:
        raise VlmError(
            f"{padded} of {attention_mask.shape[0]} prompts end in padding, so nothing can follow them; pad on the "
            "left: processor.collate(samples, padding_side='left')"
        )


def _padding_inputs(llm: nn.Module, attention_mask: Tensor | None) -> dict[str, Tensor]:
    if attention_mask is None or bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
        # Causal attention never looks at padding on the right, and without a mask takes its fast path.
        return {}
    inputs = {"attention_mask": attention_mask}
    # The models count positions from the padding; only their `generate` counts from the first real token.
    if takes(llm, "position_ids"):
        inputs["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return inputs


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Give the mean cross-entropy in fp32; of many tokens, the fp32 copies are not held all at once."""
    if len(targets) <= _CHUNK:
        return F.cross_entropy(logits.float(), targets)
    sums = [
        checkpoint(_summed_loss, *chunk, use_reentrant=False)
        for chunk in zip(logits.split(_CHUNK), targets.split(_CHUNK), strict=True)
    ]
    return torch.stack(sums).sum() / len(targets)


def _summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def _logits_at(llm: nn.Module, inputs: dict[str, Any], places: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """Give (places, vocabulary), from a last layer that runs at the places alone wherever it can."""
    try:
        return _logits_within(llm, inputs, places, last_layer_at(llm, places, lengths))
    except NotPrunedError:
        return _logits_within(llm, inputs, places, nullcontext())


def _logits_within(
    llm: nn.Module, inputs: dict[str, Any], places: Tensor, last_layer: AbstractContextManager[None]
) -> Tensor:
    head: nn.Module = llm.get_output_embeddings()  # type: ignore[operator]

    def keep_places(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # The last layer may have left the places alone.
        return args if args[0].shape[:2] != places.shape else (args[0][places][None], *args[1:])

    # The LLM's own forward calls its head, so that scaled or soft-capped logits stay its own.
    handle = head.register_forward_pre_hook(keep_places)
    try:
        with last_layer:
            logits: Tensor = llm(**inputs).logits
    finally:
        handle.remove()
    # An LLM that uses the head's weight without calling it gives all logits.
    return logits[places] if logits.shape[:2] == places.shape else logits[0]
