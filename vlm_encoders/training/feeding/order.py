"""The order of the data: a pure function of the seed and the place in the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from connectors.errors import VlmError

if TYPE_CHECKING:
    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.training.feeding.lengths import DataLengths

__all__ = ["SeededBatches", "StepBatches", "epoch_generator", "epoch_order", "make_order"]

Generator: TypeAlias = np.random.Generator


def epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    """Give the order of `length` samples in one epoch."""
    order: list[int] = epoch_generator(seed, epoch).permutation(length).tolist()
    return order


def epoch_generator(seed: int, epoch: int) -> Generator:
    """Give the generator from which all that is random in one epoch is drawn."""
    return np.random.default_rng((seed, epoch))


class StepBatches(ABC):
    """The batches of one process, from any step of the run on.

    All epochs are one stream of units, samples or packs of them; a step takes the next
    `batch_size * accumulation * world` units of it. Where an epoch ends inside a step, the
    step goes on into the next epoch: nothing is dropped and nothing is padded. As a
    `batch_sampler`, it needs no state to resume, only the step. What a step takes depends
    on the product above alone, so that it is the same however many processes share it.

    Args:
        length: samples of the dataset.
        batch_size: units of one batch on one process.
        accumulation: batches of one process in a step.
        steps: steps of the whole run.
        seed: seed of the order.
        start: first step to give.
        rank: this process.
        world: number of processes.

    Raises:
        VlmError: the dataset is empty.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        accumulation: int,
        steps: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if length < 1:
            raise VlmError("the dataset is empty; there is nothing to train on")
        self.length = length
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.steps = steps
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world = world

    @property
    def step_units(self) -> int:
        """Units of one step on all processes together."""
        return self.batch_size * self.accumulation * self.world

    def __len__(self) -> int:
        """Count the batches from the start step on."""
        return max(self.steps - self.start, 0) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        """Give the sample indices of each batch."""
        for step in range(self.start, self.steps):
            yield from self.step_batches(step)

    def step_batches(self, step: int) -> list[list[int]]:
        """Give the sample indices of the batches of one step."""
        units, size = self.units(step), self.batch_size
        firsts = [(turn * self.world + self.rank) * size for turn in range(self.accumulation)]
        return [[index for unit in units[first : first + size] for index in unit] for first in firsts]

    def steps_per_epochs(self, epochs: int) -> int:
        """Count the steps that so many passes over the data take; the last may go on into one more."""
        return -(-self.epoch_units(epochs) // self.step_units)

    @abstractmethod
    def units(self, step: int) -> list[list[int]]:
        """Give the units of one step on all processes, each as its sample indices."""

    @abstractmethod
    def epoch_units(self, epochs: int) -> int:
        """Count the units of so many epochs from the first."""


class SeededBatches(StepBatches):
    """Samples in random order: each epoch is a permutation of the data."""

    _known: tuple[int, list[int]] = (-1, [])

    def units(self, step: int) -> list[list[int]]:
        """Give the samples of one step, each a unit."""
        first = step * self.step_units
        return [[self.sample_at(place)] for place in range(first, first + self.step_units)]

    def epoch_units(self, epochs: int) -> int:
        """Count the samples of so many epochs."""
        return epochs * self.length

    def epoch(self, epoch: int) -> list[int]:
        """Give the order of all samples in one epoch."""
        return epoch_order(self.length, self.seed, epoch)

    def sample_at(self, place: int) -> int:
        """Give the sample at a place of the stream of all epochs."""
        epoch, offset = divmod(place, self.length)
        if epoch != self._known[0]:
            self._known = epoch, self.epoch(epoch)
        return self._known[1][offset]


def make_order(
    dataset_length: int,
    config: TrainConfig,
    *,
    lengths: DataLengths | None = None,
    steps: int | None = None,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
) -> StepBatches:
    """Make the order that a run's settings ask for: at random, by like length, or packed.

    Args:
        dataset_length: samples of the dataset.
        config: of the run.
        lengths: of all samples, where the settings group or pack.
        steps: steps of the whole run; None for those of the settings, counted by epochs where they name no steps.
        start: first step to give.
        rank: this process.
        world: number of processes.

    Raises:
        VlmError: the dataset is empty, lengths are needed and missing or not those of the dataset, or the settings
            both group and pack.
    """
    from vlm_encoders.training.feeding.length_order import GroupedBatches, PackedBatches

    settings: dict[str, Any] = {
        "batch_size": config.batch_size,
        "accumulation": config.gradient_accumulation,
        "steps": 0,
        "seed": config.seed,
        "start": start,
        "rank": rank,
        "world": world,
    }
    order: StepBatches
    if config.pack_tokens is None and not config.group_by_length:
        order = SeededBatches(dataset_length, **settings)
    else:
        asked = "pack_tokens" if config.pack_tokens is not None else "group_by_length"
        if config.pack_tokens is not None and config.group_by_length:
            raise VlmError("pack_tokens and group_by_length both save padding, and packs have none; set one of them")
        if lengths is None or len(lengths) != dataset_length:
            came = "none came" if lengths is None else f"{len(lengths)} came"
            raise VlmError(
                f"{asked} needs the lengths of the {dataset_length} samples, {came}; count them by data_lengths, or "
                f"leave {asked} out where samples cannot be indexed"
            )
        if config.pack_tokens is not None:
            order = PackedBatches(lengths.tokens, config.pack_tokens, **settings)
        else:
            order = GroupedBatches(lengths.tokens, text_only=lengths.text_only, **settings)
    if steps is None:
        steps = config.steps if config.steps is not None else order.steps_per_epochs(config.epochs or 1)
    order.steps = steps
    return order
