"""WebDataset shards: tar files whose members of one name are one sample.

The reader is our own: that of `datasets` takes the columns from the first five samples and refuses
shards in which they differ, as where text alone stands between images, and it reads every image to
pass over it.
"""

from __future__ import annotations

import glob
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

from connectors.errors import VlmError
from vlm_encoders.training.feeding.sources.base import share_shards

__all__ = ["TarPart", "TarShards", "expand_pattern"]

_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class TarPart:
    """A file inside a shard, which is read when it is needed; as an image, an open binary file.

    Attributes:
        shard: path of the tar file.
        member: its name in there.
        offset: where it begins, in bytes.
        size: in bytes.
    """

    shard: str
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """Its name for sentences."""
        return f"{self.shard}/{self.member}"

    def seekable(self) -> bool:
        """Say that it is read from its start at each time."""
        return False

    def read(self) -> bytes:
        """Read it.

        Raises:
            OSError: the shard cannot be read.
        """
        with open(self.shard, "rb") as file:  # noqa: PTH123
            file.seek(self.offset)
            return file.read(self.size)


class TarShards:
    """The samples of tar shards, shard after shard.

    Passing over a sample reads nothing but its headers.

    Args:
        pattern: a path, with `*`, `?`, `{000..012}` or `{a,b}` for several.

    Raises:
        VlmError: no file fits.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.shards = expand_pattern(pattern)

    def rows(
        self, *, seed: int | None = None, epoch: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Give the samples of one pass that are those of one process; see `RowStream.rows`."""
        share = share_shards(len(self.shards), seed=seed, epoch=epoch, rank=rank, world=world)
        rows = (row for place in share.shards for row in _named(self.shards[place]))
        return islice(rows, share.first, None, share.every)


def expand_pattern(pattern: str) -> list[str]:
    """Give the paths of a pattern in their order, each once.

    Raises:
        VlmError: no file fits, or a file that braces name is missing.
    """
    found: list[str] = []
    for path in _braces(pattern):
        fitting = sorted(glob.glob(path)) if glob.has_magic(path) else [path]  # noqa: PTH207
        if not fitting or not all(Path(each).is_file() for each in fitting):
            raise VlmError(f"no tar shard '{path}' is there; give the path of a tar file, or a pattern of several")
        found += fitting
    return list(dict.fromkeys(found))


def _braces(pattern: str) -> list[str]:
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[piece] if place % 2 == 0 else _choices(piece) for place, piece in enumerate(pieces)]
    return ["".join(each) for each in product(*choices)]


def _choices(inside: str) -> list[str]:
    bounds = _RANGE.fullmatch(inside)
    if bounds is None:
        return inside.split(",")
    return [f"{number:0{len(bounds[1])}}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]


def _named(shard: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in _samples(shard):
        yield f"{shard}/{row['__key__']}", row


def _samples(shard: str) -> Iterator[dict[str, Any]]:
    row: dict[str, Any] = {}
    for member in _members(shard):
        folder, _, file = member.name.rpartition("/")
        stem, dot, extension = file.partition(".")
        if not (stem and dot):
            continue
        key = f"{folder}/{stem}" if folder else stem
        if row and row["__key__"] != key:
            yield row
            row = {}
        if extension in row:
            raise VlmError(f"'{shard}' holds '{member.name}' twice; pack each file of a sample once")
        row["__key__"] = key
        row[extension] = TarPart(shard, member.name, member.offset_data, member.size)
    if row:
        yield row


def _check_end(archive: tarfile.TarFile) -> None:
    # tarfile takes a header that is broken, cut short or missing for the end, and what came behind it would be lost.
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it breaks off at byte {archive.offset}, without the mark of its end")


def _members(shard: str) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.isfile():
                    yield member
                # The archive keeps the headers of all its members; a shard may have a million.
                archive.members.clear()  # type: ignore[attr-defined]
            _check_end(archive)
    except (tarfile.TarError, OSError) as error:
        raise VlmError(f"'{shard}' is no whole tar file ({error}); pack it again, or leave it out") from error
