"""The text that names the data of a run, taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal, TypeAlias

from connectors.errors import VlmError
from connectors.registry import nearest

__all__ = ["DataName", "Kind"]

Kind: TypeAlias = Literal["file", "hf", "tar"]
_OPTIONS: dict[Kind, tuple[str, ...]] = {
    "file": (),
    "hf": ("split", "name", "streaming", "revision", "caption"),
    "tar": ("caption",),
}
_HF = "hf:"


@dataclass(frozen=True)
class DataName:
    """Where conversations are: `data.json`, `hf:NAME[split=train]` or `shards/*.tar`.

    Attributes:
        kind: a conversation file, a Hugging Face dataset, or tar shards.
        place: path, pattern, or name.
        options: what stands in brackets behind it.
    """

    kind: Kind
    place: str
    options: dict[str, str]

    @classmethod
    def parse(cls, data: str | Path) -> DataName:
        """Take a name apart.

        Raises:
            VlmError: an option is unknown or twice there, or the archive is compressed.
        """
        text = str(data)
        found = re.fullmatch(r"(?P<place>[^\[]+(?:\[[^=\]]*\][^\[]+)*)\[(?P<options>\w+=.*)\]", text)
        place = found["place"] if found else text
        if place.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
            raise VlmError(f"'{text}' is compressed, so that no file in it can be read alone; unpack it to .tar")
        kind: Kind = "hf" if place.startswith(_HF) else "tar" if place.endswith(".tar") else "file"
        if kind == "file" and found:
            raise VlmError(f"'{text}': a conversation file takes no options; write '{place}'")
        options = _options(text, found["options"] if found else "", _OPTIONS[kind])
        return cls(kind, place.removeprefix(_HF) if kind == "hf" else place, options)

    @property
    def folder(self) -> Path:
        """The folder that relative image paths start from where none is given."""
        path = Path(self.place)
        if self.kind == "hf":
            return path if path.is_dir() else Path()
        if self.kind == "file":
            return path.parent
        # A pattern may stand in the folders too; those before it are the same for all shards.
        return Path(*takewhile(lambda part: not set(part) & set("*?[{"), path.parent.parts))

    @property
    def streaming(self) -> bool:
        """Whether its rows come one after another, without a length."""
        return self.kind == "tar" or self.options.get("streaming", "false") == "true"


def _options(text: str, inside: str, known: tuple[str, ...]) -> dict[str, str]:
    options: dict[str, str] = {}
    for each in filter(None, inside.split(",")):
        key, equals, value = (part.strip() for part in each.partition("="))
        if not equals or not value:
            raise VlmError(f"'{text}': option '{each}' has no value; write key=value")
        if key not in known:
            raise VlmError(f"'{text}': no option '{key}'; {nearest(key, list(known))}")
        if key in options:
            raise VlmError(f"'{text}': option '{key}' is there twice; write it once")
        options[key] = value
    if options.get("streaming", "true") not in {"true", "false"}:
        raise VlmError(f"'{text}': streaming is true or false, got '{options['streaming']}'")
    return options
