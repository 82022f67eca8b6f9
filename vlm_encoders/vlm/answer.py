"""Prompts to answers, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_encoders.vlm.batch import to_device

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import Sample, VLMProcessor

__all__ = ["answer"]


def answer(model: VisionLanguageModel, processor: VLMProcessor, prompts: Sequence[Sample], **options: Any) -> list[str]:
    """Generate the answers to a batch of prompts.

    Args:
        model: the model.
        processor: its processor.
        prompts: made by `processor.prompt`.
        **options: those of transformers' `generate`: max_new_tokens, do_sample, num_beams, ...
    """
    tokenizer = processor.tokenizer
    batch = processor.collate(prompts, padding_side="left")
    del batch["labels"]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ends = {"pad_token_id": pad, "eos_token_id": _end_ids(model, tokenizer.eos_token_id)}
    ids = model.generate(**to_device(batch, model.device), **(ends | options))
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _end_ids(model: VisionLanguageModel, end_of_turn: int | None) -> list[int] | None:
    # A chat model may end its turn by another token than its base model ends a text.
    own = getattr(getattr(model.llm, "generation_config", None), "eos_token_id", None)
    ids = {end_of_turn, *(own if isinstance(own, list) else [own])}
    return sorted(identity for identity in ids if identity is not None) or None
