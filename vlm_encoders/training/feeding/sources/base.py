"""What a source of conversations is: rows by index, or a stream of rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

__all__ = ["Opened", "Records", "RowStream", "Share", "share_shards"]


@runtime_checkable
class Records(Protocol):
    """Rows by index, of any form that `as_record` knows."""

    def __len__(self) -> int:
        """Count the rows."""

    def __getitem__(self, index: int, /) -> Any:
        """Give one row.

        Raises:
            VlmError: the row cannot be read.
        """

    def __iter__(self) -> Iterator[Any]:
        """Give all rows."""


@runtime_checkable
class RowStream(Protocol):
    """Rows that come one after another, each with its name, without a length."""

    def rows(
        self, *, seed: int | None = None, epoch: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[str, Any]]:
        """Give the rows of one pass that are those of one process.

        Args:
            seed: of the order of the shards, drawn for each epoch; None for the order as it is.
            epoch: the pass over the data.
            rank: this process: it takes shards of its own where they go round, else every `world`-th row.
            world: number of processes.

        Raises:
            VlmError: a shard cannot be read.
        """


class Share(NamedTuple):
    """What one process reads of some shards: of their rows from `first` on, every `every`-th."""

    shards: list[int]
    first: int
    every: int


def share_shards(count: int, *, seed: int | None, epoch: int, rank: int, world: int) -> Share:
    """Say what one process reads of `count` shards in one pass.

    Where the number of shards is a multiple of that of the processes, each has shards of its
    own, else every so many-th row of all.

    Args:
        count: shards there are.
        seed: of their order, drawn for each epoch; None for the order as it is.
        epoch: the pass over the data.
        rank: the process.
        world: number of processes.
    """
    order = list(range(count))
    if seed is not None:
        order = np.random.default_rng((seed, epoch)).permutation(count).tolist()
    return Share(order[rank::world], 0, 1) if count % world == 0 else Share(order, rank, world)


class Opened:
    """A source, and what else a dataset needs to know of it.

    Args:
        rows: by index, or a stream.
        image_folder: folder that relative image paths start from.
        caption: the column that is the answer to the image alone; None where rows hold conversations.
    """

    def __init__(self, rows: Records | RowStream, image_folder: Path, caption: str | None = None) -> None:
        self.rows = rows
        self.image_folder = image_folder
        self.caption = caption
