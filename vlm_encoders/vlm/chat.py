"""Conversations as ids with labels: the answers are learned, all else is not.

Text that spells a special token becomes that token, in contents too, as in most
stacks: an `<|im_end|>` in a question ends the turn for the model, an `</s>` in an
answer is learned as an end of turn. Take such text out of untrusted data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from connectors.errors import VlmError
from vlm_encoders.vlm.answer_spans import answer_spans
from vlm_encoders.vlm.chat_template import VICUNA_TEMPLATE, Message, render

__all__ = ["IGNORED", "VICUNA_TEMPLATE", "Message", "answer_spans", "render", "tokenize_with_labels"]

IGNORED = -100


def tokenize_with_labels(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Give the ids of a conversation, and labels that are ids on answers and -100 elsewhere.

    A token belongs to an answer when all its characters do. An end-of-turn token that takes in
    the white space behind it, as Phi-3's, belongs to the answer that it ends.

    Raises:
        VlmError: the tokenizer is slow (no character offsets), an answer has no token of its own,
            or the chat template does not let the answers be found; see `answer_spans`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise VlmError(
            "labels by spans need a fast tokenizer, this one is slow; load it with AutoTokenizer, or convert it "
            "to a PreTrainedTokenizerFast"
        )
    text, spans = answer_spans(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = list(encoded["input_ids"])
    labels = [IGNORED] * len(ids)
    learned = set()
    number = 0
    for place, (first, last) in enumerate(encoded["offset_mapping"]):
        while number < len(spans) and first >= spans[number][1]:
            number += 1
        if number == len(spans):
            break
        start, end = spans[number]
        if start <= first < last and (last <= end or _is_token(tokenizer, ids[place], text[first:end])):
            labels[place] = ids[place]
            learned.add(number)
    if len(learned) != len(spans):
        raise VlmError(
            f"{len(spans) - len(learned)} of {len(spans)} answers have no token of their own after tokenisation; "
            "check the chat template against the tokenizer"
        )
    return ids, labels


def _is_token(tokenizer: Any, identity: int, text: str) -> bool:
    # The offsets of a token with `rstrip` take in the white space behind it, its name does not.
    return bool(tokenizer.convert_ids_to_tokens(identity) == text)
