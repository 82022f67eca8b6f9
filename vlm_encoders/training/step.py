"""One optimizer step: batches of unequal length weigh by their supervised tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm_encoders.training.processes.blank import anchor, blank_batch, has_images
from vlm_encoders.training.processes.norms import gradient_norms, scale_gradients
from vlm_encoders.training.processes.sharding import is_engine, is_fsdp
from vlm_encoders.training.processes.turns import StepError, Turns, require_finite

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer

    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["StepError", "StepResult", "SummedLoss", "take_step"]


@dataclass(frozen=True)
class StepResult:
    """What one step gave, over all its batches and processes.

    Attributes:
        loss: mean over the supervised tokens.
        grad_norm: norm of the gradient before clipping.
        tokens: LLM tokens, padding left out.
        supervised: tokens that the loss is the mean of.
        grad_norms: norm of the gradient of each unit before clipping; none under DeepSpeed.
    """

    loss: float
    grad_norm: float
    tokens: int
    supervised: int = 0
    grad_norms: dict[str, float] = field(default_factory=dict)


class SummedLoss(nn.Module):
    """Gives the loss summed over supervised tokens, and their number, in one forward.

    Sums add up over batches and processes whatever their lengths; means do not. It is
    what distributed training wraps, so logits never leave it.

    Args:
        model: the model that is trained.
        autocast: dtype to compute in, None for that of the weights.

    Attributes:
        even: each forward pass reaches the same modules and trained parameters whatever the batch holds, for
            processes that would else wait for each other.
    """

    def __init__(self, model: VisionLanguageModel, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.even = False

    def forward(self, batch: dict[str, Any] | None) -> tuple[Tensor, int]:
        """Run one batch, the keyword arguments of the model's `forward`; None for one that counts for nothing.

        Raises:
            VlmError: no token of the batch is supervised.
        """
        inputs = blank_batch(self.model) if batch is None else batch
        device = inputs["input_ids"].device.type
        with torch.autocast(device, dtype=self.autocast) if self.autocast else nullcontext():
            output = self.model(**inputs, anchor=self._anchor(inputs))
        supervised = 0 if batch is None else int(output.num_supervised)
        return output.loss * supervised, supervised

    def _anchor(self, batch: dict[str, Any]) -> Callable[[], Tensor] | None:
        images = has_images(batch)
        if self.even or (torch.is_grad_enabled() and not images and self._trains_before_llm()):
            return partial(anchor, self.model, images=images)
        return None

    def _trains_before_llm(self) -> bool:
        parts = (self.model.encoder, self.model.connector)
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())


def take_step(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: Optimizer,
    batches: Iterator[dict[str, Any] | None],
    *,
    accumulation: int,
    max_grad_norm: float | None,
    before_update: Callable[[], None] | None = None,
) -> StepResult:
    """Run `accumulation` batches and move the trained parameters once.

    The gradient is that of the mean over the supervised tokens of all batches of all
    processes, as if they had been one batch.

    Args:
        accelerator: device and processes.
        module: a prepared `SummedLoss`.
        optimizer: of the trained parameters.
        batches: those of this process; None where all samples of one were left out.
        accumulation: batches of the step.
        max_grad_norm: norm to which the gradient is clipped; None for no clipping.
        before_update: called once the gradients are there, before they are scaled.

    Raises:
        StepError: loss or gradient is not finite, the weights have not moved; or nothing
            is supervised.
        VlmError: a batch cannot be made; raised on every process.
    """
    if is_engine(module):
        from vlm_encoders.training.processes.zero import take_engine_step

        return take_engine_step(accelerator, module, batches, accumulation=accumulation)
    optimizer.zero_grad(set_to_none=True)
    turns = Turns(accelerator, batches)
    for turn in range(accumulation):
        batch = turns.next()
        if batch is None and accelerator.num_processes == 1:
            continue
        # Kept from being shared, the gradients of sharded weights would be held whole.
        wait = turn < accumulation - 1 and not is_fsdp(module)
        with accelerator.no_sync(module) if wait else nullcontext():
            loss, supervised = module(batch)
            accelerator.backward(loss)
        turns.add(batch, loss, supervised)
    mean, supervised, tokens = turns.totals()
    require_finite({"loss": mean})
    if before_update is not None:
        before_update()
    # Distributed training averages over processes; what is wanted is their sum over the tokens of all.
    factor = accelerator.num_processes / supervised
    norms = {name: norm * factor for name, norm in gradient_norms(optimizer).items()}
    norm = math.hypot(*norms.values())
    require_finite({"gradient norm": norm})
    limit = math.inf if max_grad_norm is None else max_grad_norm
    scale_gradients(optimizer, factor * limit / norm if norm > limit else factor)
    optimizer.step()
    return StepResult(mean, norm, tokens, supervised, norms)
