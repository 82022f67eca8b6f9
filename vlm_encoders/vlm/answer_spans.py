"""Where the answers stand in a rendered conversation, whatever the chat template does around them.

The conversation is rendered once, as a whole. A turn is found in it by rendering
the same conversation again with a word put behind that turn's content: what
follows the word follows the content in the text too. Contents are never searched
for, so it does not matter whether they are equal, empty, trimmed by the template,
or hold the template's own marks.

An answer goes from where the model begins to write, which is where a prompt ends, to
its end-of-turn mark. So what a template itself writes between prompt and content is
learned with the answer, because at inference nobody else would write it: the space of
Mistral and Llama-2, the empty `<think>` block of Qwen3 before its last answer, the
channel of gpt-oss. Not learned is what follows the mark: line breaks, an end of text
behind the last turn, a header of the next turn.

Where a template writes an earlier answer otherwise than its prompt announces (a prompt
ends in `<think>`, but thinking is left out of the turns that have passed), that earlier
answer is learned from its content on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from connectors.errors import VlmError
from vlm_encoders.vlm.chat_template import Message, render

__all__ = ["answer_spans"]

REMEDY = "set tokenizer.chat_template to one that only appends turn after turn, such as VICUNA_TEMPLATE"


def answer_spans(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and find the characters of its assistant answers.

    Args:
        tokenizer: whose chat template writes the text, and whose special tokens end turns.
        messages: the turns.

    Returns:
        The text, and (start, end) of each answer, its end-of-turn mark included. The mark is
        what ends the last answer; an earlier answer that ends otherwise is given without one.

    Raises:
        VlmError: the conversation starts with an answer, or the template does not write each
            answer once, ends none by a special token, or ends its prompts otherwise than it
            begins the last answer.
    """
    text = render(tokenizer, messages)
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not places:
        return text, []
    last = places[-1]
    mark = _end_mark(tokenizer, _after(tokenizer, messages[: last + 1], last))
    spans = []
    for place in places:
        start = _answer_start(tokenizer, messages, place, text, is_last=place == last)
        end = _content_end(tokenizer, messages, place, text)
        spans.append((start, end + len(mark) if text.startswith(mark, end) else end))
    return text, spans


def _answer_start(tokenizer: Any, messages: Sequence[Message], place: int, text: str, *, is_last: bool) -> int:
    if place == 0:
        raise VlmError("the conversation starts with an answer, so there is no prompt to it; start with a user turn")
    prompt = render(tokenizer, messages[:place], generation_prompt=True)
    if text.startswith(prompt):
        return len(prompt)
    # Something further up is written otherwise once more turns follow; what announces the answer need not be.
    announced = _after(tokenizer, messages[:place], place - 1, generation_prompt=True)
    question_end = _content_end(tokenizer, messages, place - 1, text)
    if text.startswith(announced, question_end):
        return question_end + len(announced)
    before, _ = _around(tokenizer, messages, place, keep="")
    if is_last or not text.startswith(before):
        raise VlmError(
            f"the chat template ends the prompt of turn {place + 1} by {announced!r}, but does not write that before "
            f"its answer, so training would not be what generation meets; {REMEDY}"
        )
    return len(before)


def _content_end(tokenizer: Any, messages: Sequence[Message], place: int, text: str) -> int:
    after = _after(tokenizer, messages, place)
    if not text.endswith(after):
        raise VlmError(
            f"the chat template writes other turns differently by the text of turn {place + 1}, so the answers cannot "
            f"be found; {REMEDY}"
        )
    return len(text) - len(after)


def _after(tokenizer: Any, messages: Sequence[Message], place: int, *, generation_prompt: bool = False) -> str:
    content = messages[place]["content"]
    return _around(tokenizer, messages, place, keep=content, generation_prompt=generation_prompt)[1]


def _around(
    tokenizer: Any, messages: Sequence[Message], place: int, *, keep: str, generation_prompt: bool = False
) -> tuple[str, str]:
    # The text before and after a word that stands at the end of a turn's content, behind what is kept of it.
    number = 0
    while any(f"@{number}END" in message["content"] for message in messages):
        number += 1
    word = f"@{number}END"
    marked = [*messages[:place], {**messages[place], "content": keep + word}, *messages[place + 1 :]]
    text = render(tokenizer, marked, generation_prompt=generation_prompt)
    if text.count(word) != 1:
        raise VlmError(
            f"the chat template writes the content of turn {place + 1} ({messages[place]['role']}) "
            f"{text.count(word)} times, not once, so labels would be wrong; {REMEDY}"
        )
    before, _, after = text.partition(word)
    return before, after


@lru_cache(maxsize=8)
def _end_mark(tokenizer: Any, ending: str) -> str:
    # Up to the first special token; many mark a turn's end by an added token that is none of the named ones. Kept,
    # since listing the added tokens of a large vocabulary takes longer than all else here.
    known = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    ends = [(ending.index(token), -len(token)) for token in known if token.strip() and token in ending]
    if not ends:
        raise VlmError(
            f"the chat template ends an answer by {ending!r}, which holds no special token of the tokenizer, so the "
            "model would not learn to stop; write {{ eos_token }} behind the answers in tokenizer.chat_template, or "
            "make the template's mark a special token"
        )
    first, length = min(ends)
    return ending[: first - length]
