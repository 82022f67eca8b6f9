"""The batches of one optimizer step, and what they add up to over all processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from connectors.errors import VlmError
from vlm_encoders.training.processes.blank import is_supervised

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["StepError", "Turns", "require_finite"]


class StepError(VlmError):
    """A step that cannot be taken because of what its samples gave."""


class Turns:
    """The batches of one step on one process, and what they add up to over all.

    What is wrong with a batch of one process is told by all of them at the end: a process that
    stopped at once would leave the others waiting for it.
    """

    def __init__(self, accelerator: Accelerator, batches: Iterator[dict[str, Any] | None]) -> None:
        self._accelerator = accelerator
        self._batches = batches
        self._problem: VlmError | None = None
        self._sums = torch.zeros(4, dtype=torch.float64)

    def next(self) -> dict[str, Any] | None:
        """Give the next batch; None where there is none that can be used."""
        if self._problem is not None:
            return None
        try:
            batch = next(self._batches)
            if batch is not None and not is_supervised(batch):
                raise StepError(
                    "no token of the batch is supervised, so it has no loss; check the answers of its samples"
                )
        except VlmError as problem:
            if self._accelerator.num_processes == 1:
                raise
            self._problem = problem
            self._sums[3] = 1
            return None
        return batch

    def add(self, batch: dict[str, Any] | None, loss: Tensor, supervised: int) -> None:
        """Add what a batch gave."""
        tokens = 0 if batch is None else int(batch["attention_mask"].sum())
        self._sums[:3] += torch.tensor([float(loss.detach()), supervised, tokens], dtype=torch.float64)

    def totals(self) -> tuple[float, int, int]:
        """Give mean loss, supervised tokens and tokens of all processes.

        Raises:
            VlmError: a batch of any process could not be made, or nothing is supervised.
        """
        loss, supervised, tokens, problems = self._over_processes()
        if self._problem is not None:
            raise self._problem
        if problems:
            raise StepError("another process could not make its batch; its own message says why")
        if supervised == 0:
            raise StepError("all samples of the step were left out; look at the log of bad samples")
        return loss / supervised, int(supervised), int(tokens)

    def _over_processes(self) -> list[float]:
        accelerator, sums = self._accelerator, self._sums
        if accelerator.num_processes > 1:
            dtype = torch.float32 if accelerator.device.type == "mps" else sums.dtype
            sums = accelerator.reduce(sums.to(accelerator.device, dtype), reduction="sum")
        values: list[float] = sums.tolist()
        return values


def require_finite(values: dict[str, float]) -> None:
    """Refuse what is not finite.

    Raises:
        StepError: a value is infinite or no number.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise StepError(
                f"the {name} is {value}; lower learning_rate, load the model in float32, and look at these samples"
            )
