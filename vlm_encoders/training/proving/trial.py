"""Some steps of a run on trial: what they move, give and wait for; the weights are put back."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm_encoders.training.proving.image_use import Difference
from vlm_encoders.training.run import Run
from vlm_encoders.training.start import start_run
from vlm_encoders.training.step import StepError, take_step
from vlm_encoders.vlm.stages import Part

if TYPE_CHECKING:
    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.training.feeding.batches import Samples
    from vlm_encoders.training.feeding.stream import ConversationStream
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["StepFindings", "take_steps", "weights_kept"]


@dataclass(frozen=True)
class StepFindings:
    """What some training steps on the data gave; their weights are put back.

    Attributes:
        losses: of each step.
        grad_norms: mean norm of the gradient of each unit.
        moved: whether each part moved.
        change: of the loss on the samples that were looked at, by the steps; None of fewer than two.
        data_seconds: waiting for data, a step.
        step_seconds: computing, a step; the first, which warms up, left out.
        warnings: of the proof.
    """

    losses: tuple[float, ...] = ()
    grad_norms: dict[str, float] = field(default_factory=dict)
    moved: dict[Part, bool] = field(default_factory=dict)
    change: Difference | None = None
    data_seconds: float = 0.0
    step_seconds: float = 0.0
    warnings: tuple[str, ...] = ()

    @property
    def waiting(self) -> float:
        """The part of the time that is spent waiting for data."""
        whole = self.data_seconds + self.step_seconds
        return self.data_seconds / whole if whole else 0.0


def take_steps(
    model: VisionLanguageModel,
    processor: VLMProcessor,
    dataset: Samples | ConversationStream,
    config: TrainConfig,
    steps: int,
    folder: str,
) -> StepFindings:
    """Take the first steps of a run at its peak learning rate, with the proof on.

    Args:
        model: a model whose stage is applied.
        processor: the processor of that model.
        dataset: what is trained on.
        config: the settings of the run.
        steps: how many.
        folder: for what a run writes.

    Raises:
        VlmError: as a run.
    """
    # At the peak rate at once: ten steps of a warm-up show nothing.
    trial = replace(
        config,
        output=folder,
        steps=steps,
        epochs=None,
        schedule="constant",
        warmup_ratio=0.0,
        group_by_length=False,
        token_cache=None,
    )
    run = start_run(model, processor, dataset, trial, None)
    try:
        return _steps_of(run, steps)
    finally:
        run.feed.close()
        run.close()


def _steps_of(run: Run, steps: int) -> StepFindings:
    config, proof = run.config, run.proof
    results, seconds, waits, warnings = [], [], [], []
    for step in range(1, steps + 1):
        started, waited = time.monotonic(), run.feed.waited
        try:
            result = take_step(
                run.accelerator,
                run.module,
                run.optimizer,
                run.feed,
                accumulation=config.gradient_accumulation,
                max_grad_norm=config.max_grad_norm,
                before_update=partial(proof.after_backward, step),
            )
        except StepError as error:
            raise StepError(f"step {step}, {run.feed.last_names()}: {error}") from error
        waits.append(run.feed.waited - waited)
        seconds.append(time.monotonic() - started - waits[-1])
        warnings += proof.after_step(step)
        results.append(result)
    moved = proof.check()
    late = slice(1, None) if steps > 1 else slice(None)
    units = {name for result in results for name in result.grad_norms}
    return StepFindings(
        losses=tuple(result.loss for result in results),
        grad_norms={
            name: math.fsum(result.grad_norms.get(name, 0.0) for result in results) / steps for name in sorted(units)
        },
        moved=moved,
        data_seconds=sum(waits[late]) / len(waits[late]),
        step_seconds=sum(seconds[late]) / len(seconds[late]),
        warnings=tuple(warnings),
    )


@contextmanager
def weights_kept(model: VisionLanguageModel) -> Iterator[None]:
    """Put all that trains, and all buffers, back as they were."""
    held: dict[str, Tensor] = {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if not isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad
    }
    trained = set(model.trained)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if name in held:
                    tensor.copy_(held[name])
                    tensor.grad = None
        model.trained = trained
