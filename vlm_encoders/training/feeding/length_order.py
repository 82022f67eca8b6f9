"""Orders that know how long samples are: like lengths in a batch, or packs without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from connectors.errors import VlmError
from vlm_encoders.packing import pack
from vlm_encoders.training.feeding.order import SeededBatches, StepBatches, epoch_generator

__all__ = ["GroupedBatches", "PackedBatches"]

MEGA_STEPS = 50
"""Steps whose samples are sorted together, as `LengthGroupedSampler` of transformers has it."""
WINDOW = 4096
"""Samples that are packed together: enough for full packs, few enough for another mix in each epoch."""


class GroupedBatches(SeededBatches):
    """Samples of like length in each batch and in each step, so that little is padded.

    An epoch's permutation is cut into pieces of many steps, each piece is sorted by length
    and cut into steps, and the steps are shuffled. In a step that two epochs share, lengths
    are mixed, and its batches are still sorted. Which samples make a step is thus random,
    and each epoch is still a permutation of the data.

    Source: the idea is that of `LengthGroupedSampler` in transformers and in LLaVA, where
    text alone is grouped apart too.

    Args:
        lengths: tokens of each sample; None for one that cannot be counted, taken for the shortest.
        text_only: whether a sample has no image: those are grouped apart, so that few batches hold both;
            None to mix.
        **settings: as in `StepBatches`.

    Raises:
        VlmError: the dataset is empty, or the two lists are of different lengths.
    """

    def __init__(
        self, lengths: Sequence[int | None], *, text_only: Sequence[bool] | None = None, **settings: Any
    ) -> None:
        super().__init__(len(lengths), **settings)
        if text_only is not None and len(text_only) != len(lengths):
            raise VlmError(f"{len(lengths)} lengths and {len(text_only)} marks of text alone came; give one a sample")
        tokens = np.array([length or 0 for length in lengths], dtype=np.int64)
        apart = np.zeros_like(tokens) if text_only is None else np.array(text_only, dtype=np.int64)
        # One number that sorts by both: samples with images first, and the longest first.
        self._keys = apart * (int(tokens.max()) + 1) - tokens

    def units(self, step: int) -> list[list[int]]:
        """Give the samples of one step, each a unit, those of like length side by side."""
        samples = [unit[0] for unit in super().units(step)]
        return [[sample] for sample in self._sorted(np.array(samples)).tolist()]

    def epoch(self, epoch: int) -> list[int]:
        """Give the order of all samples in one epoch."""
        generator, size = epoch_generator(self.seed, epoch), self.step_units
        drawn = generator.permutation(self.length)
        # The step in which the last epoch ended takes the first of this one, that in which it ends the last.
        first = min(-epoch * self.length % size, self.length)
        count = (self.length - first) // size
        last = first + count * size
        piece = min(MEGA_STEPS, max(1, count // 4)) * size
        inner = [self._sorted(drawn[place : min(place + piece, last)]) for place in range(first, last, piece)]
        steps = np.concatenate(inner).reshape(count, size) if inner else drawn[:0].reshape(0, size)
        order: list[int] = np.concatenate(
            [drawn[:first], steps[generator.permutation(count)].ravel(), drawn[last:]]
        ).tolist()
        return order

    def _sorted(self, samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return samples[np.argsort(self._keys[samples], kind="stable")]


class PackedBatches(StepBatches):
    """Samples packed one after another into rows of at most so many tokens, so that nothing is padded.

    An epoch's permutation is cut into windows, each is packed by first-fit decreasing, and
    the packs of the epoch are shuffled. A unit is a pack, and a batch the samples of
    `batch_size` packs in one list, since they become one row.

    Args:
        lengths: tokens of each sample; None for one that cannot be counted, which takes no room to speak of.
        pack_tokens: the most tokens of a pack.
        window: samples that are packed together.
        allow_longer: give a sample that is longer than a pack one of its own.
        **settings: as in `StepBatches`.

    Attributes:
        longer: samples that are longer than a pack.

    Raises:
        VlmError: the dataset is empty, a size is not positive, or a sample is longer than a pack and may not be.
    """

    def __init__(
        self,
        lengths: Sequence[int | None],
        pack_tokens: int,
        *,
        window: int = WINDOW,
        allow_longer: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(len(lengths), **settings)
        if min(pack_tokens, window) < 1:
            raise VlmError(f"packs of {pack_tokens} tokens from {window} samples hold nothing; use 1 or more for both")
        self.pack_tokens = pack_tokens
        self.window = window
        self._lengths = np.array([max(1, length or 1) for length in lengths], dtype=np.int64)
        longer = np.flatnonzero(self._lengths > pack_tokens)
        self.longer = len(longer)
        if self.longer and not allow_longer:
            first, longest = int(longer[0]), int(self._lengths.max())
            raise VlmError(
                f"{self.longer} samples are longer than a pack of {pack_tokens} tokens: sample {first} is the first, "
                f"the longest takes {longest}; set pack_tokens to that, or give images fewer tokens"
            )
        self._ends: list[int] = []
        self._known: tuple[int, list[list[int]]] = (-1, [])

    @property
    def fill(self) -> float:
        """The part of the packs of the first epoch that is filled; a longer sample fills its own."""
        taken = [int(self._lengths[samples].sum()) for samples in self._packs(0)]
        return sum(taken) / sum(max(self.pack_tokens, tokens) for tokens in taken)

    def units(self, step: int) -> list[list[int]]:
        """Give the packs of one step on all processes, each as its sample indices."""
        place, wanted = step * self.step_units, self.step_units
        epoch = 0
        while self.epoch_units(epoch + 1) <= place:
            epoch += 1
        found: list[list[int]] = []
        place -= self.epoch_units(epoch)
        while len(found) < wanted:
            found += self._packs(epoch)[place : place + wanted - len(found)]
            epoch, place = epoch + 1, 0
        return found

    def epoch_units(self, epochs: int) -> int:
        """Count the packs of so many epochs from the first: each epoch has its own number."""
        while len(self._ends) < epochs:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self._packs(len(self._ends))))
        return self._ends[epochs - 1] if epochs else 0

    def _packs(self, epoch: int) -> list[list[int]]:
        if epoch != self._known[0]:
            generator = epoch_generator(self.seed, epoch)
            drawn = generator.permutation(self.length)
            packs: list[list[int]] = []
            for first in range(0, self.length, self.window):
                samples = drawn[first : first + self.window]
                filled = pack(self._lengths[samples].tolist(), self.pack_tokens, allow_longer=True)
                packs += [samples[list(places)].tolist() for places in filled.packs]
            self._known = epoch, [packs[place] for place in generator.permutation(len(packs))]
        return self._known[1]
