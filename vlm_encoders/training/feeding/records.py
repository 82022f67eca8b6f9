"""Conversations as plain records, of whatever source: the form of LLaVA files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from connectors.errors import VlmError

__all__ = [
    "IMAGE_PLACEHOLDER",
    "ROLES",
    "Record",
    "image_entries",
    "image_paths",
    "images_of",
    "read_records",
    "record_problems",
    "sample_name",
]

IMAGE_PLACEHOLDER = "<image>"
"""Where an image stands in the text of LLaVA files, whatever the LLM's own image token is."""

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
"""Roles of LLaVA files -> roles of chat templates."""

Record: TypeAlias = dict[str, Any]
"""One sample: `id`, `image` (an image or several) and `conversations`.

An image is a path, or embedded: bytes, {"bytes", "path"} as Hugging Face datasets hold it, a PIL image,
or a file that is read when it is needed.
"""


def read_records(path: str | Path) -> list[Record]:
    """Read a LLaVA conversation file whole, a JSON list or JSON Lines.

    Raises:
        VlmError: the file cannot be read, is not JSON, or holds no samples.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise VlmError(f"{path}: cannot be read ({error.strerror}); give a JSON or JSONL file") from error
    except UnicodeDecodeError as error:
        raise VlmError(f"{path}: is not UTF-8 text at byte {error.start}; save it as UTF-8") from error
    records = _parse_list(path, text) if text.lstrip()[:1] == "[" else _parse_lines(path, text)
    if not records:
        raise VlmError(f"{path}: holds no samples; expected a list of conversations")
    return records


def image_entries(record: Record) -> list[Any]:
    """Give the images of a sample as the record has them."""
    images = record.get("image")
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def images_of(record: Record, folder: str | Path) -> list[Any]:
    """Give the images of a sample in forms that the processor takes; relative paths start from `folder`."""
    return [_image(entry, Path(folder)) for entry in image_entries(record)]


def image_paths(record: Record, folder: str | Path) -> list[Path]:
    """Give the image files of a sample, embedded images left out; relative ones start from `folder`."""
    return [image for image in images_of(record, folder) if isinstance(image, Path)]


def sample_name(record: object, index: int) -> str:
    """Name a sample by its place and, where it has one, its id."""
    identity = record.get("id") if isinstance(record, dict) else None
    return f"sample {index}" if identity is None else f"sample {index} (id '{identity}')"


def record_problems(record: object) -> Iterator[str]:
    """Say what is wrong with the turns, placeholders and images of a record; no file is looked at."""
    if not isinstance(record, dict):
        yield f"is a {type(record).__name__}, not an object with 'conversations'"
        return
    images = image_entries(record)
    for entry in images:
        if not _is_image(entry):
            yield f"'image' must be a path or a list of paths, got {_shown(entry)}; an embedded image is its bytes"
            break
    turns = record.get("conversations")
    if turns == []:
        yield "has no turn in 'conversations'; give a question and an answer, or leave the sample out"
        return
    if not isinstance(turns, list):
        known = ", ".join(map(str, record)) or "none"
        yield (
            f"lacks 'conversations', a list of turns; its keys are {known} "
            "('messages' of role and content, and 'texts' of user and assistant, are read too)"
        )
        return
    for number, turn in enumerate(turns, start=1):
        if not (isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)):
            yield f"turn {number} lacks 'from' or 'value', both texts"
            return
        if turn["from"] not in ROLES:
            yield f"turn {number} has unknown role '{turn['from']}'; use {', '.join(ROLES)}"
            return
    yield from _order_problems([turn["from"] for turn in turns])
    yield from _placeholder_problems(turns, len(images))


def _order_problems(roles: list[str]) -> Iterator[str]:
    start = int(roles[0] == "system")
    for number, role in enumerate(roles[start:], start=start):
        wanted = ("human", "gpt")[(number - start) % 2]
        if role != wanted:
            yield f"turn {number + 1} is from '{role}', expected '{wanted}'; human and gpt must alternate, human first"
            return
    if roles[-1] != "gpt":
        yield f"ends with a turn from '{roles[-1]}', so there is no answer to learn; end it with 'gpt'"


def _placeholder_problems(turns: list[dict[str, str]], images: int) -> Iterator[str]:
    counts = {"human": 0, "gpt": 0, "system": 0}
    for turn in turns:
        counts[turn["from"]] += turn["value"].count(IMAGE_PLACEHOLDER)
    for role in ("gpt", "system"):
        if counts[role]:
            yield f"has an {IMAGE_PLACEHOLDER} placeholder in a turn from '{role}'; images stand in human turns"
    if counts["human"] != images:
        yield (
            f"has {counts['human']} {IMAGE_PLACEHOLDER} placeholders and {images} images; "
            "write one placeholder for each image"
        )


def _is_image(entry: object) -> bool:
    if isinstance(entry, Mapping):
        return isinstance(entry.get("bytes"), bytes) or isinstance(entry.get("path"), str)
    return isinstance(entry, (str, Path, bytes)) or hasattr(entry, "read") or hasattr(entry, "convert")


def _image(entry: Any, folder: Path) -> Any:
    if isinstance(entry, Mapping):
        entry = entry["path"] if entry.get("bytes") is None else entry["bytes"]
    return folder / entry if isinstance(entry, (str, Path)) else entry


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _parse_list(path: Path, text: str) -> list[Record]:
    try:
        return list(json.loads(text))
    except json.JSONDecodeError as error:
        raise VlmError(f"{path}: line {error.lineno}, column {error.colno} is not JSON: {error.msg}") from error


def _parse_lines(path: Path, text: str) -> list[Record]:
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise VlmError(
                f"{path}: line {number} is not JSON: {error.msg}; write one list, or one sample a line"
            ) from error
    return records
