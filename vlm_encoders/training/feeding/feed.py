"""What the loop draws its batches from, by index or from a stream, and its place in the data."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

from connectors.errors import VlmError
from vlm_encoders.training.config import TrainConfig
from vlm_encoders.training.feeding.batches import Samples
from vlm_encoders.training.feeding.deliveries import Delivery, indexed, streamed, streamed_packs
from vlm_encoders.training.feeding.skipped import BadSample, BadSamples
from vlm_encoders.training.feeding.stream import ConversationStream, Place
from vlm_encoders.vlm.batch import to_device

if TYPE_CHECKING:
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["BatchOrder", "Feed", "make_feed"]

_SHOWN = 8


class BatchOrder(Protocol):
    """The sample indices of every batch of one process; `make_order` gives one."""

    def __iter__(self) -> Iterator[list[int]]:
        """Give the batches from the step on at which the run begins."""

    def step_batches(self, step: int, /) -> list[list[int]]:
        """Give the batches of one step, from 0."""


class Feed(Iterator[dict[str, Any] | None]):
    """The batches of one process, in the order of the run.

    Workers make batches ahead; what is told here is of the batches handed out alone.

    Args:
        deliveries: the batches.
        bad: counts and logs the samples that cannot be made.
        device: where the batches go.
        accumulation: batches of a step.
        start_step: steps that are done.
        name: names what a delivery was asked of.
        order: the indices by step, where the data has them.
        place: where a stream stands.
        world: number of processes.

    Attributes:
        waited: seconds spent in waiting for batches.
    """

    def __init__(
        self,
        deliveries: Iterator[Delivery],
        bad: BadSamples,
        *,
        device: torch.device,
        accumulation: int,
        start_step: int,
        name: Callable[[Any], str] = str,
        order: BatchOrder | None = None,
        place: Place | None = None,
        world: int = 1,
    ) -> None:
        self.waited = 0.0
        self._deliveries: Iterator[Delivery] | None = deliveries
        self._bad = bad
        self._device = device
        self._accumulation = accumulation
        self._start = start_step
        self._name = name
        self._order = order
        self._place = place
        self._world = world
        self._given = 0
        self._asked: deque[list[Any]] = deque(maxlen=accumulation)

    def __next__(self) -> dict[str, Any] | None:
        """Give the next batch on the device, or None where none of its samples could be made.

        Raises:
            VlmError: a sample cannot be made and may not be left out, or the machine failed.
        """
        if self._deliveries is None:
            raise StopIteration
        started = time.monotonic()
        try:
            delivery = next(self._deliveries)
        finally:
            self.waited += time.monotonic() - started
        if self._given % self._accumulation == 0:
            self._asked.clear()
        self._asked.append(delivery.asked)
        self._bad.take(delivery.bad, self._start + self._given // self._accumulation + 1)
        self._given += 1
        self._place = delivery.place
        return None if delivery.batch is None else to_device(delivery.batch, self._device)

    @property
    def skipped(self) -> int:
        """Count the samples that this process has left out, each once."""
        return len(self._bad.known)

    def leave_out(self, samples: Sequence[BadSample], step: int) -> None:
        """Count and log samples of the evaluation data that cannot be made, after `step` steps.

        Raises:
            VlmError: they may not be left out, or too many are.
        """
        self._bad.take([each._replace(key=f"evaluation {each.key}") for each in samples], step)

    def last_names(self) -> str:
        """Name the samples of the step under way, or of the last one, for sentences."""
        return self._joined([each for asked in self._asked for each in asked])

    def names(self, step: int) -> str:
        """Name the samples of a step, from 0; of a stream, those of `last_names`."""
        if self._order is None:
            return self.last_names()
        return self._joined([index for batch in self._order.step_batches(step) for index in batch])

    def state(self) -> dict[str, Any]:
        """Give what a resume needs beside the step, as plain values; each process has its own."""
        place = None if self._place is None else self._place._asdict() | {"world": self._world}
        return {"skipped": list(self._bad.known), "place": place}

    def close(self) -> None:
        """Stop the workers."""
        self._deliveries = None

    def __enter__(self) -> Self:
        """Give the feed itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the workers."""
        self.close()

    def _joined(self, asked: list[Any]) -> str:
        more = f" and {len(asked) - _SHOWN} more" if len(asked) > _SHOWN else ""
        return ", ".join(map(self._name, asked[:_SHOWN])) + more


def make_feed(
    dataset: Samples | ConversationStream,
    processor: VLMProcessor,
    config: TrainConfig,
    *,
    rank: int,
    world: int,
    device: torch.device,
    start_step: int,
    state: dict[str, Any] | None = None,
    order: BatchOrder | None = None,
) -> Feed:
    """Give what the loop of one process draws from.

    Args:
        dataset: samples by index, or a stream.
        processor: the processor of both.
        config: batch size, accumulation, packing, workers and the policy of bad samples.
        rank: this process.
        world: number of processes.
        device: where the batches go.
        start_step: steps that are done.
        state: what `Feed.state` gave after these steps on this process; None at the beginning.
        order: the indices of each batch from `start_step` on, for samples by index; a stream has its own.

    Raises:
        VlmError: an order is missing, or settings or state do not go with a stream.
    """
    pinned = device.type == "cuda"
    start: Place | None = None
    name: Callable[[Any], str] = str
    if isinstance(dataset, ConversationStream):
        start = _stream_start(config, state, start_step=start_step, world=world)
        draws = dataset.draws(seed=config.seed, buffer=config.shuffle_buffer, rank=rank, world=world, start=start)
        deliver = streamed if config.pack_tokens is None else streamed_packs
        deliveries, order = deliver(dataset, draws, processor, config, pinned=pinned), None
    elif order is not None:
        deliveries = indexed(dataset, processor, config, order, pinned=pinned)
        name = getattr(dataset, "name", "sample {}".format)
    else:
        raise VlmError("samples by index need an order, none came; make one by make_order")
    known = (state or {}).get("skipped", ())
    policy, limit = config.on_bad_sample, config.max_bad_samples
    return Feed(
        deliveries,
        BadSamples(config.output, policy=policy, limit=limit, rank=rank, step=start_step, known=known),
        device=device,
        accumulation=config.gradient_accumulation,
        start_step=start_step,
        name=name,
        order=order,
        place=start,
        world=world,
    )


def _stream_start(config: TrainConfig, state: dict[str, Any] | None, *, start_step: int, world: int) -> Place:
    if config.steps is None:
        raise VlmError("a stream has no length from which epochs are counted; set steps in place of epochs")
    if config.group_by_length:
        raise VlmError("group_by_length sorts samples by index, and a stream has none; set it to false, or pack_tokens")
    place = (state or {}).get("place")
    if place is None:
        if start_step:
            raise VlmError(f"the checkpoint of step {start_step} has no place in a stream; give the data it began with")
        return Place()
    if place["world"] != world:
        raise VlmError(
            f"the stream was shared by {place['world']} processes, now there are {world}; resume with as many"
        )
    return Place(place["epoch"], place["drawn"])
