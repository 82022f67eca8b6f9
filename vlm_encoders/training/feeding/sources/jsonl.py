"""JSON Lines of any size: the places of the lines are held, a line is read when it is asked for."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, overload

from connectors.errors import VlmError

__all__ = ["JsonLines"]


class JsonLines:
    """The samples of a JSON Lines file by index; 16 bytes of memory a line.

    Args:
        path: the file; lines without text are passed over.

    Raises:
        VlmError: it cannot be read, or holds no samples.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._starts = array("q")
        self._numbers = array("q")
        place = 0
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        self._starts.append(place)
                        self._numbers.append(number)
                    place += len(line)
        except OSError as error:
            raise VlmError(f"{path}: cannot be read ({error.strerror}); give a JSON or JSONL file") from error
        if not self._starts:
            raise VlmError(f"{path}: holds no samples; expected a list of conversations")

    def __len__(self) -> int:
        """Count the samples."""
        return len(self._starts)

    def __iter__(self) -> Iterator[Any]:
        """Give all samples; the file is opened once."""
        with self.path.open("rb") as file:
            for index, start in enumerate(self._starts):
                file.seek(start)
                yield self._parsed(file.readline(), index)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        """Give one sample, or a list of several.

        Raises:
            VlmError: its line is not JSON.
        """
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        # Opened each time: workers must not share the place in a file.
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            return self._parsed(file.readline(), index)

    def _parsed(self, line: bytes, index: int) -> Any:
        try:
            return json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            place = self._starts[index] + error.start
            raise VlmError(f"{self.path}: is not UTF-8 text at byte {place}; save it as UTF-8") from error
        except json.JSONDecodeError as error:
            raise VlmError(
                f"{self.path}: line {self._numbers[index]} is not JSON: {error.msg}; write one list, or one sample a "
                "line"
            ) from error
