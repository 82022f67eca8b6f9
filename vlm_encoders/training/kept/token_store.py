"""Tokens of images on the disk: appended so that a killed process leaves nothing half-written to be read.

A folder holds pairs of files, each pair written by one process once: `*.tokens`, raw values one entry after
another, and `*.index`, records of one size. A record is written when its values are on the disk; a record that was
cut short, or whose values are not all there, does not count.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from connectors.errors import VlmError
from vlm_encoders.tiling.plan import Size

__all__ = ["Entry", "TokenStore", "TokenWriter"]

_RECORD = np.dtype(
    [("key", "<u8", (2,)), ("offset", "<u8"), ("length", "<u8"), ("height", "<u4"), ("width", "<u4"), ("file", "<u4")]
)
_COMMIT = 1 << 28
"""Bytes of tokens that a killed process loses at most."""


class Entry(NamedTuple):
    """Where the tokens of an image lie.

    Attributes:
        size: (height, width) of the image, px.
        file: number of the file.
        offset: where in the file they begin, bytes.
        length: bytes.
    """

    size: Size
    file: int
    offset: int
    length: int


class TokenStore:
    """What a folder holds of tokens by the keys of their images; read by memory map, also from worker processes.

    Args:
        folder: of the tokens.
        dtype: of the values.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder = folder
        self.dtype = dtype
        self._files: list[Path] = []
        self._records = np.zeros(0, _RECORD)
        self._maps: dict[int, Any] = {}
        self.load()

    def __len__(self) -> int:
        """Count the images."""
        return len(self._records)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the maps out: they would be copied whole into the message to a worker."""
        return vars(self) | {"_maps": {}}

    def load(self) -> None:
        """Read the index anew."""
        self._maps = {}
        self._files = sorted(self.folder.glob("*.tokens")) if self.folder.is_dir() else []
        found = [_read_index(file, number) for number, file in enumerate(self._files)]
        records = np.concatenate(found) if found else np.zeros(0, _RECORD)
        _, first = np.unique(records["key"], axis=0, return_index=True)
        # Sorted by key, each once: some 60 bytes an image.
        self._records = records[first]
        self._firsts = np.ascontiguousarray(self._records["key"][:, 0])

    def find(self, key: bytes) -> Entry | None:
        """Find the tokens of an image by its key of 16 bytes; None where there are none."""
        first, second = np.frombuffer(key, "<u8")
        place = int(np.searchsorted(self._firsts, first))
        while place < len(self._firsts) and self._firsts[place] == first:
            record = self._records[place]
            if record["key"][1] == second:
                size = (int(record["height"]), int(record["width"]))
                return Entry(size, int(record["file"]), int(record["offset"]), int(record["length"]))
            place += 1
        return None

    def read(self, entry: Entry) -> Tensor:
        """Read the values of an image, in one row."""
        if entry.file not in self._maps:
            self._maps[entry.file] = np.memmap(self._files[entry.file], np.uint8, mode="r")
        held = self._maps[entry.file][entry.offset : entry.offset + entry.length]
        return torch.from_numpy(np.array(held)).view(self.dtype)


class TokenWriter:
    """Adds a pair of files to a folder; leaving the `with` statement writes what is left.

    Args:
        folder: of the tokens; made where there is none.

    Raises:
        VlmError: the disk is full or cannot be written; what was written before is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.name = uuid.uuid4().hex
        self._folder = folder
        self._tokens: BinaryIO | None = None
        self._index: BinaryIO | None = None
        self._waiting: list[np.ndarray[Any, Any]] = []
        self._offset = self._committed = 0

    def __enter__(self) -> Self:
        """Give the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is left, or after an error nothing more."""
        try:
            if kind is None:
                self._commit()
        finally:
            for file in (self._tokens, self._index):
                if file is not None:
                    file.close()

    @property
    def files(self) -> list[Path]:
        """The files that it has made."""
        return [] if self._tokens is None else [self._folder / f"{self.name}.{kind}" for kind in ("tokens", "index")]

    def add(self, key: bytes, size: Size, values: Iterable[Tensor]) -> None:
        """Add the tokens of an image.

        Args:
            key: 16 bytes.
            size: (height, width) of the image, px.
            values: contiguous tensors on the CPU, one after another.
        """
        try:
            if self._tokens is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._tokens, self._index = ((self._folder / f"{self.name}.{kind}").open("xb") for kind in _KINDS)
            begin = self._offset
            for tensor in values:
                data = tensor.contiguous().view(torch.uint8).numpy().data
                self._tokens.write(data)
                self._offset += data.nbytes
        except OSError as error:
            raise self._refusal(error) from error
        record = np.zeros((), _RECORD)
        record["key"] = np.frombuffer(key, "<u8")
        record["offset"], record["length"] = begin, self._offset - begin
        record["height"], record["width"] = size
        self._waiting.append(record)
        if self._offset - self._committed >= _COMMIT:
            self._commit()

    def note(self, name: str, text: str) -> None:
        """Write a text beside what was added; nothing where nothing was."""
        if self._tokens is not None:
            try:
                (self._folder / name).write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                raise self._refusal(error) from error

    def _commit(self) -> None:
        if self._tokens is None or self._index is None:
            return
        try:
            for file, data in ((self._tokens, b""), (self._index, b"".join(each.tobytes() for each in self._waiting))):
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._refusal(error) from error
        self._waiting, self._committed = [], self._offset

    def _refusal(self, error: OSError) -> VlmError:
        return VlmError(
            f"the token cache '{self._folder}' cannot be written: {error.strerror or error}; what is there already is "
            "kept, free some space or name another folder by token_cache"
        )


_KINDS = ("tokens", "index")


def _read_index(tokens: Path, number: int) -> np.ndarray[Any, Any]:
    """Read the whole records of a file, those whose values are all there."""
    index = tokens.with_suffix(".index")
    data = index.read_bytes() if index.is_file() else b""
    records = np.frombuffer(data[: len(data) - len(data) % _RECORD.itemsize], _RECORD).copy()
    records["file"] = number
    whole: np.ndarray[Any, Any] = records[records["offset"] + records["length"] <= tokens.stat().st_size]
    return whole
