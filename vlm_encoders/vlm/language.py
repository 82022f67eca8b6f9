"""The LLM on embeddings: a mask only where it needs one, logits only where they are used."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from connectors.errors import VlmError
from vlm_encoders.vlm.stages import has_adapter

__all__ = ["VLMOutput", "predict", "require_left_padding"]

_IGNORED = -100


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


def predict(llm: nn.Module, embeds: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> VLMOutput:
    """Run an LLM on embeddings, to logits or to the loss on labels.

    Args:
        llm: a Hugging Face causal LM.
        embeds: (B, T, H).
        attention_mask: (B, T), 1 at real tokens; None for no padding.
        labels: (B, T), ids at supervised places and -100 elsewhere, or None.

    Raises:
        VlmError: the labels are of another shape, or nothing is supervised.
    """
    inputs = {"inputs_embeds": embeds, "use_cache": False, **_padding_inputs(llm, attention_mask)}
    if labels is None:
        return VLMOutput(None, llm(**inputs).logits, 0)
    if labels.shape != embeds.shape[:2]:
        raise VlmError(f"labels are (B, T) = {tuple(embeds.shape[:2])}, got shape {tuple(labels.shape)}")
    places = torch.zeros_like(labels, dtype=torch.bool)
    places[:, :-1] = labels[:, 1:] != _IGNORED
    targets = labels[:, 1:][places[:, :-1]]
    if targets.numel() == 0:
        raise VlmError("the batch has no supervised token, so no loss; check that the samples hold answers")
    logits = _logits_at(llm, inputs, places)
    return VLMOutput(F.cross_entropy(logits.float(), targets), logits, targets.numel())


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
    if "position_ids" in inspect.signature(_unwrapped(llm).forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return inputs


def _unwrapped(llm: nn.Module) -> nn.Module:
    # peft's wrapper takes any keyword; what the LLM takes is said by the LLM.
    inner: nn.Module = llm.get_base_model() if has_adapter(llm) else llm  # type: ignore[operator]
    return inner


def _logits_at(llm: nn.Module, inputs: dict[str, Any], places: Tensor) -> Tensor:
    head: nn.Module = llm.get_output_embeddings()  # type: ignore[operator]

    def keep_places(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][places][None], *args[1:])

    # The LLM's own forward calls its head, so that scaled or soft-capped logits stay its own.
    handle = head.register_forward_pre_hook(keep_places)
    try:
        logits: Tensor = llm(**inputs).logits
    finally:
        handle.remove()
    # An LLM that uses the head's weight without calling it gives all logits.
    return logits[places] if logits.shape[:2] == places.shape else logits[0]
