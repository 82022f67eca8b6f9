"""Conversations that come one after another, shuffled in a buffer, from any place of the run on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from connectors.errors import VlmError
from vlm_encoders.training.feeding.data import ConversationDataset, checked_record, make_sample
from vlm_encoders.training.feeding.sources.base import RowStream
from vlm_encoders.training.feeding.sources.opening import open_records
from vlm_encoders.training.feeding.sources.spec import DataName

if TYPE_CHECKING:
    from vlm_encoders.vlm.processor import Sample, VLMProcessor

__all__ = ["ConversationStream", "Draw", "Place", "open_dataset"]


class Place(NamedTuple):
    """How far one process has come in a stream.

    Attributes:
        epoch: the pass over the data, from 0.
        drawn: samples that it has drawn in this pass, bad ones included.
    """

    epoch: int = 0
    drawn: int = 0


class Draw(NamedTuple):
    """One sample of a stream, not made yet.

    Attributes:
        name: for sentences.
        row: as the source gives it.
        after: where the stream stands behind it.
    """

    name: str
    row: Any
    after: Place


class ConversationStream:
    """The samples of tar shards or of a streaming dataset, which have no number and no end.

    Args:
        data: `shards/*.tar`, or `hf:NAME[streaming=true]`.
        image_folder: folder that relative image paths start from; None for that of the data.
        processor: makes samples of messages and images.

    Raises:
        VlmError: the data cannot be opened, or is no stream.
    """

    def __init__(self, data: str | Path, image_folder: str | Path | None, processor: VLMProcessor) -> None:
        opened = open_records(data, image_folder)
        if not isinstance(opened.rows, RowStream):
            raise VlmError(f"'{data}' is no stream; open it as a ConversationDataset, or write [streaming=true] behind")
        self.path = Path(data)
        self.image_folder = opened.image_folder
        self.processor = processor
        self.caption = opened.caption
        self.source = opened.rows

    @classmethod
    def open(cls, data: str | Path, image_folder: str | Path | None, processor: VLMProcessor) -> Self:
        """Open it, as `ConversationDataset.open` does data by index."""
        return cls(data, image_folder, processor)

    def draws(
        self, *, seed: int, buffer: int, rank: int = 0, world: int = 1, start: Place | None = None
    ) -> Iterator[Draw]:
        """Give the samples of one process without an end, from any place on.

        A place is reached again by drawing up to it: rows are passed over and no image of them
        is decoded, from shards not even read.

        Args:
            seed: of the order, another one for each epoch and process.
            buffer: rows from which the next one is drawn at random; 1 for their order in the shards.
            rank: this process.
            world: number of processes.
            start: where to go on; None for the beginning.

        Raises:
            VlmError: a shard cannot be read, or has no sample for this process.
        """
        first, drawn = start or Place()
        for epoch in itertools.count(first):
            rows = self.source.rows(seed=seed, epoch=epoch, rank=rank, world=world)
            mixed = _mixed(rows, buffer, np.random.default_rng((seed, epoch, rank)))
            count = 0
            for count, (name, row) in enumerate(mixed, start=1):
                if count > drawn:
                    yield Draw(name, row, Place(epoch, count))
            if not count:
                raise VlmError(
                    f"'{self.path}' has no sample for process {rank} of {world}; use fewer processes, or more shards"
                )
            drawn = 0

    def make(self, draw: Draw) -> Sample:
        """Make one training sample.

        Raises:
            VlmError: as `ConversationDataset`; the sample is named.
        """
        try:
            return make_sample(self.processor, checked_record(draw.row, self.caption), self.image_folder)
        except VlmError as error:
            raise VlmError(f"{self.path}, {draw.name}: {error}") from error

    def tell(self, draw: Draw) -> tuple[str, str]:
        """Give what a sample is known by, and its id."""
        row = draw.row if isinstance(draw.row, dict) else {}
        given = [row[name] for name in ("id", "__key__") if row.get(name) is not None]
        return draw.name, str(given[0]) if given else draw.name


def open_dataset(
    data: str | Path, image_folder: str | Path | None, processor: VLMProcessor, *, check: bool = True
) -> ConversationDataset | ConversationStream:
    """Open conversations of any kind: by index where they can be, else as a stream.

    Args:
        data: see `open_records`.
        image_folder: folder that relative image paths start from; None for that of the data.
        processor: makes samples of messages and images.
        check: refuse a conversation file that has problems; not wanted where bad samples are skipped.

    Raises:
        VlmError: the data cannot be opened, or has problems.
    """
    if DataName.parse(data).streaming:
        return ConversationStream(data, image_folder, processor)
    return ConversationDataset.open(data, image_folder, processor, check=check)


def _mixed(rows: Iterator[tuple[str, Any]], size: int, generator: np.random.Generator) -> Iterator[tuple[str, Any]]:
    held: list[tuple[str, Any]] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
            continue
        place = int(generator.integers(size))
        yield held[place]
        held[place] = row
    if size > 1:
        held = [held[place] for place in generator.permutation(len(held))]
    yield from held
