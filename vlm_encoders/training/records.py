"""LLaVA conversation files as plain records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

from connectors.errors import VlmError

__all__ = ["IMAGE_PLACEHOLDER", "ROLES", "Record", "image_paths", "read_records", "sample_name"]

IMAGE_PLACEHOLDER = "<image>"
"""Where an image stands in the text of LLaVA files, whatever the LLM's own image token is."""

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
"""Roles of LLaVA files -> roles of chat templates."""

Record: TypeAlias = dict[str, Any]
"""One sample: `id`, `image` (a path or several) and `conversations`."""


def read_records(path: str | Path) -> list[Record]:
    """Read a LLaVA conversation file, a JSON list or JSON Lines.

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


def image_paths(record: Record, folder: str | Path) -> list[Path]:
    """Give the image files of a sample; relative ones start from `folder`."""
    images = record.get("image") or []
    return [Path(folder) / image for image in ([images] if isinstance(images, str) else images)]


def sample_name(record: object, index: int) -> str:
    """Name a sample by its place and, where it has one, its id."""
    identity = record.get("id") if isinstance(record, dict) else None
    return f"sample {index}" if identity is None else f"sample {index} (id '{identity}')"


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
