"""Conversations as text, by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from connectors.errors import VlmError

__all__ = ["VICUNA_TEMPLATE", "Message", "render"]

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
