"""Rows of any known form as records: turns of LLaVA, chat messages, pairs of texts, WebDataset samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from connectors.errors import VlmError
from vlm_encoders.training.feeding.records import IMAGE_PLACEHOLDER, ROLES, Record

__all__ = ["IMAGE_EXTENSIONS", "as_record"]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Endings of WebDataset files that are images."""

_SPEAKERS = {role: speaker for speaker, role in ROLES.items()}


def as_record(row: object, *, caption: str | None = None) -> Record:
    """Give a row as a record; of its turns only the form is brought into line, see `record_problems`.

    Known forms: `conversations` of `from` and `value` (LLaVA), or of `role` and `content`; `messages` of
    `role` and `content`, a text or a list of parts (OpenAI); `texts` of `user` and `assistant` (the Cauldron,
    FineVision), whose images stand before the first question; each with `image` or `images`. The files of a
    WebDataset sample are an image or several, and `json` with one of these forms.

    Args:
        row: what the source gives.
        caption: the column whose text is the answer to the image alone.

    Raises:
        VlmError: the row is no object, or a column has none of these forms.
    """
    if not isinstance(row, Mapping):
        raise VlmError(f"is a {type(row).__name__}, not an object with 'conversations'")
    values = _unpacked(row) if "__key__" in row else dict(row)
    record: Record = {} if values.get("id") is None else {"id": values["id"]}
    images = _images(values)
    if caption is not None:
        turns: Any = _of_caption(values, caption)
    elif values.get("conversations") is not None:
        turns = _of_messages(_as_list(values["conversations"]), images)
    elif values.get("messages") is not None:
        turns = _of_messages(_as_list(values["messages"]), images)
    elif values.get("texts") is not None:
        turns = _of_texts(_as_list(values["texts"]), len(images))
    else:
        known = ", ".join(map(str, row)) or "none"
        raise VlmError(
            f"lacks 'conversations', a list of turns; its keys are {known} ('messages' of role and content, and "
            "'texts' of user and assistant, are read too; captions by caption=COLUMN behind the data)"
        )
    return record | ({"image": images} if images else {}) | {"conversations": turns}


def _images(values: Mapping[str, Any]) -> list[Any]:
    images = values.get("images") if values.get("image") is None else values["image"]
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _unpacked(row: Mapping[str, Any]) -> dict[str, Any]:
    """Give the files of a WebDataset sample as columns, what stands in `json` among them."""
    values: dict[str, Any] = {"id": row["__key__"], **{name: _text(row[name]) for name in row if name == "txt"}}
    if row.get("json") is not None:
        inside = _json(row["json"])
        if not isinstance(inside, Mapping):
            raise VlmError(f"its json holds a {type(inside).__name__}, not an object with 'conversations'")
        values |= inside
    pictures = [row[name] for name in row if _is_picture(name) and row[name] is not None]
    if pictures:
        # The names that stand in json are those of the files before they were packed.
        values |= {"image": pictures, "images": None}
    return values


def _is_picture(name: str) -> bool:
    return name.rsplit(".", 1)[-1].lower() in IMAGE_EXTENSIONS


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value
    try:
        return json.loads(_read(value))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise VlmError(f"its json is not JSON: {error}; write one object") from error


def _text(value: Any) -> Any:
    try:
        return value if isinstance(value, str) else _read(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise VlmError(f"its txt is not UTF-8 at byte {error.start}; save it as UTF-8") from error


def _read(value: Any) -> bytes:
    data: bytes = value.read() if hasattr(value, "read") else value
    return data


def _as_list(turns: Any) -> Any:
    if isinstance(turns, Mapping) and all(isinstance(column, list) for column in turns.values()):
        # Some datasets hold a list of objects as an object of lists.
        return [dict(zip(turns, values, strict=False)) for values in zip(*turns.values(), strict=False)]
    return turns


def _of_caption(values: Mapping[str, Any], column: str) -> list[dict[str, str]]:
    text = values.get(column)
    if not isinstance(text, str) or not text.strip():
        known = ", ".join(map(str, values)) or "none"
        raise VlmError(f"has no caption: '{column}' is no text; its columns are {known}")
    return [{"from": "human", "value": IMAGE_PLACEHOLDER}, {"from": "gpt", "value": text.strip()}]


def _of_texts(pairs: Any, images: int) -> list[dict[str, str]]:
    turns = []
    for number, pair in enumerate(pairs if isinstance(pairs, list) else [None], start=1):
        asked, said = (pair.get("user"), pair.get("assistant")) if isinstance(pair, Mapping) else (None, None)
        if not (isinstance(asked, str) and isinstance(said, str)):
            raise VlmError(f"'texts' {number} lacks 'user' or 'assistant', both texts")
        turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    if turns and not any(IMAGE_PLACEHOLDER in turn["value"] for turn in turns):
        turns[0]["value"] = f"{IMAGE_PLACEHOLDER}\n" * images + turns[0]["value"]
    return turns


def _of_messages(messages: Any, images: list[Any]) -> Any:
    """Give turns of role and content as those of LLaVA; images inside their content are added to `images`."""
    if not isinstance(messages, list) or not any(isinstance(turn, Mapping) and "role" in turn for turn in messages):
        return messages
    inside: list[Any] = []
    turns = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise VlmError(f"message {number} is a {type(message).__name__}, not an object of role and content")
        role = message.get("role")
        if role not in _SPEAKERS:
            raise VlmError(f"message {number} has unknown role '{role}'; use {', '.join(_SPEAKERS)}")
        turns.append({"from": _SPEAKERS[role], "value": _content(message.get("content"), number, inside)})
    if not images:
        images.extend(inside)
    return turns


def _content(content: Any, number: int, inside: list[Any]) -> str:
    if isinstance(content, str):
        return content
    parts = _as_list(content)
    texts = []
    for each in parts if isinstance(parts, list) else [None]:
        part: Mapping[str, Any] = each if isinstance(each, Mapping) else {}
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") == "image":
            texts.append(IMAGE_PLACEHOLDER)
            given = [part[name] for name in ("image", "path", "url") if part.get(name) is not None]
            inside.extend(given[:1])
        else:
            raise VlmError(f"message {number} has content that is neither a text nor a list of text and image parts")
    return "\n".join(texts)
