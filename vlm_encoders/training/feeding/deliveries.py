"""Batches in the order of the run, each with the samples it was asked of and the place behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from connectors.errors import VlmError
from vlm_encoders.training.config import TrainConfig
from vlm_encoders.training.feeding.ahead import read_ahead
from vlm_encoders.training.feeding.batches import Indexed, Made, Parcel, Samples, load
from vlm_encoders.training.feeding.skipped import BadSample
from vlm_encoders.training.feeding.stream import ConversationStream, Draw, Place

if TYPE_CHECKING:
    from vlm_encoders.vlm.processor import Sample, VLMProcessor

__all__ = ["Delivery", "indexed", "streamed", "streamed_packs"]

_PATIENCE = 64
"""Bad samples after which a batch of packs is handed out as it is, so that they are counted."""


class Delivery(NamedTuple):
    """One batch as it is handed out.

    Attributes:
        batch: None where none of its samples could be made.
        bad: samples that could not.
        asked: all its samples, those included: indices, or names in a stream.
        place: where a stream stands behind it.
    """

    batch: dict[str, Any] | None
    bad: list[BadSample]
    asked: list[Any]
    place: Place | None = None


def indexed(
    dataset: Samples, processor: VLMProcessor, config: TrainConfig, order: Iterable[list[int]], *, pinned: bool
) -> Iterator[Delivery]:
    """Give the batches of an order of indices.

    Raises:
        VlmError: the machine failed.
    """
    packed = {"packed": True} if config.pack_tokens is not None else {}
    asked: deque[list[int]] = deque()
    lists = _noted(order, asked)
    workers = config.num_workers
    for parcel in load(Indexed(dataset), lists, processor=processor, num_workers=workers, pinned=pinned, **packed):
        yield Delivery(_batch(parcel), parcel.bad, asked.popleft())


def streamed(
    dataset: ConversationStream, draws: Iterator[Draw], processor: VLMProcessor, config: TrainConfig, *, pinned: bool
) -> Iterator[Delivery]:
    """Give batches of so many samples of a stream, in its order.

    Raises:
        VlmError: the machine failed, or the stream cannot be read.
    """
    asked: deque[list[Draw]] = deque()
    lists = _noted(_chunks(draws, config.batch_size), asked)
    for parcel in load(dataset, lists, processor=processor, num_workers=config.num_workers, pinned=pinned):
        drawn = asked.popleft()
        yield Delivery(_batch(parcel), parcel.bad, [draw.name for draw in drawn], drawn[-1].after)


def streamed_packs(
    dataset: ConversationStream, draws: Iterator[Draw], processor: VLMProcessor, config: TrainConfig, *, pinned: bool
) -> Iterator[Delivery]:
    """Give batches of so many packs, each filled with the samples of a stream in their order.

    Raises:
        VlmError: the machine failed, or the stream cannot be read.
    """
    filling = _Packs(processor, config)
    for draw, made in _one_by_one(dataset, draws, config, pinned=pinned):
        if made.failure is not None:
            raise VlmError(made.failure)
        if made.sample is not None and not filling.takes(len(made.sample.input_ids)):
            yield filling.handed_out()
            filling = _Packs(processor, config)
        filling.add(draw, made)
        if len(filling.bad) >= filling.patience:
            yield filling.handed_out()
            filling = _Packs(processor, config)


class _Packs:
    """The packs of one batch while they are filled: a sample that does not fit the last begins the next."""

    def __init__(self, processor: VLMProcessor, config: TrainConfig) -> None:
        assert config.pack_tokens is not None
        self.processor = processor
        self.room = config.pack_tokens
        self.most = config.batch_size
        self.patience = 1 if config.on_bad_sample == "error" else _PATIENCE
        self.samples: list[Sample] = []
        self.bad: list[BadSample] = []
        self.names: list[str] = []
        self.place: Place | None = None
        self._packs = 0
        self._left = 0

    def takes(self, tokens: int) -> bool:
        """Say whether a sample still belongs to this batch; one longer than a pack has a pack of its own."""
        return tokens <= self._left or self._packs < self.most

    def add(self, draw: Draw, made: Made) -> None:
        """Take a sample that fits, or a bad one."""
        self.names.append(draw.name)
        self.place = draw.after
        if made.bad is not None:
            self.bad.append(made.bad)
        if made.sample is not None:
            tokens = len(made.sample.input_ids)
            if tokens > self._left:
                self._packs, self._left = self._packs + 1, self.room
            self._left -= tokens
            self.samples.append(made.sample)

    def handed_out(self) -> Delivery:
        """Give the batch."""
        batch = self.processor.collate(self.samples, packed=True) if self.samples else None
        return Delivery(batch, self.bad, self.names, self.place)


def _one_by_one(
    dataset: ConversationStream, draws: Iterator[Draw], config: TrainConfig, *, pinned: bool
) -> Iterator[tuple[Draw, Made]]:
    asked: deque[list[Draw]] = deque()
    lists = _noted(_chunks(draws, config.batch_size), asked)
    for made in load(dataset, lists, processor=None, num_workers=config.num_workers, pinned=pinned):
        yield from zip(asked.popleft(), made, strict=True)


def _noted(lists: Iterable[list[Any]], asked: deque[list[Any]]) -> Iterator[list[Any]]:
    # Workers are asked some batches ahead and answer in order, so what was asked waits here for its answer.
    for tickets in lists:
        asked.append([Draw(each.name, None, each.after) if isinstance(each, Draw) else each for each in tickets])
        yield tickets


def _chunks(draws: Iterator[Draw], size: int) -> Iterator[list[Draw]]:
    ahead = read_ahead(draws, 4 * size)
    while chunk := list(islice(ahead, size)):
        yield chunk


def _batch(parcel: Parcel) -> dict[str, Any] | None:
    if parcel.failure is not None:
        raise VlmError(parcel.failure)
    return parcel.batch
