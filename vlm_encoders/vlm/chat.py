"""Conversations as text and ids: the tokenizer's chat template, and where the answers are.

An answer's span is found by rendering the conversation up to it and up to its end:
what the second adds to the first is the answer with its end-of-turn mark. Templates
that mark the answers themselves (`{% generation %}`) are not needed for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from connectors.errors import VlmError

__all__ = ["VICUNA_TEMPLATE", "Message", "answer_spans", "render", "tokenize_with_labels"]

Message: TypeAlias = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""

VICUNA_TEMPLATE = (
    "{{ bos_token | default('') }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] }}{{ eos_token | default('') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""For tokenizers without a chat template: the turns of Vicuna v1.1, as in LLaVA-1.5.

The prompt ends without a space: it belongs to the answer's first token.
"""

IGNORED = -100


def render(tokenizer: Any, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
    """Write a conversation as text by the tokenizer's chat template.

    Raises:
        VlmError: the template refuses the conversation.
    """
    from jinja2.exceptions import TemplateError

    template = None if tokenizer.chat_template else VICUNA_TEMPLATE
    try:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=generation_prompt
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise VlmError(
            f"the chat template refuses a conversation of roles {roles}: {error}; change the roles or the template"
        ) from error
    return str(text)


def answer_spans(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and find the characters of its assistant answers.

    Returns:
        The text, and (start, end) of each answer, its end-of-turn mark included.

    Raises:
        VlmError: the template writes earlier turns differently once an answer follows.
    """
    text = render(tokenizer, messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:index], generation_prompt=True)
        after = render(tokenizer, messages[: index + 1])
        if not (text.startswith(before) and text.startswith(after) and len(after) > len(before)):
            raise VlmError(
                f"the chat template writes turn {index + 1} or one before it differently once more turns follow, so "
                "the answer cannot be told from the question; set tokenizer.chat_template to one that only appends, "
                "such as VICUNA_TEMPLATE"
            )
        spans.append((len(before), len(_without_space_after_the_turn(tokenizer, after))))
    return text, spans


def _without_space_after_the_turn(tokenizer: Any, text: str) -> str:
    # What follows the end-of-turn token is never generated, so it must not be learned.
    stripped = text.rstrip()
    # Some mark the end of a turn by an added token that is none of the named special ones.
    marks = (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())
    return stripped if stripped.endswith(marks) else text


def tokenize_with_labels(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Give the ids of a conversation, and labels that are ids on answers and -100 elsewhere.

    A token belongs to an answer when all its characters do.

    Raises:
        VlmError: the tokenizer is slow (no character offsets), or an answer has no token of its own.
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
    supervised = 0
    for start, end in spans:
        inside = [
            place for place, (first, last) in enumerate(encoded["offset_mapping"]) if start <= first < last <= end
        ]
        for place in inside:
            labels[place] = ids[place]
        supervised += bool(inside)
    if supervised != len(spans):
        raise VlmError(
            f"{len(spans) - supervised} of {len(spans)} answers have no token of their own after tokenisation; "
            "check the chat template against the tokenizer"
        )
    return ids, labels
