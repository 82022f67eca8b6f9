"""The order of the data: a pure function of the seed and the place in the run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from connectors.errors import VlmError

__all__ = ["SeededBatches", "epoch_order"]


def epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    """Give the order of `length` samples in one epoch."""
    order: list[int] = np.random.default_rng((seed, epoch)).permutation(length).tolist()
    return order


class SeededBatches:
    """The batches of one process, from any step of the run on.

    All epochs are one stream, each epoch a permutation of the data; a step takes the
    next `batch_size * accumulation * world` samples of it. Where an epoch ends inside
    a step, the step goes on into the next epoch: nothing is dropped and nothing is
    padded. As a `batch_sampler`, it needs no state to resume, only the step.

    Args:
        length: samples of the dataset.
        batch_size: samples of one batch on one process.
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
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        """Count the batches from the start step on."""
        return max(self.steps - self.start, 0) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        """Give the sample indices of each batch."""
        for step in range(self.start, self.steps):
            yield from self.step_batches(step)

    def step_batches(self, step: int) -> list[list[int]]:
        """Give the sample indices of the batches of one step."""
        size = self.batch_size
        turns = range(step * self.accumulation, (step + 1) * self.accumulation)
        firsts = [(turn * self.world + self.rank) * size for turn in turns]
        return [[self._at(place) for place in range(first, first + size)] for first in firsts]

    def _at(self, place: int) -> int:
        epoch, offset = divmod(place, self.length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.length, self.seed, epoch)
        return self._order[offset]
