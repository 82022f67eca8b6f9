"""One optimizer step: batches of unequal length weigh by their supervised tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from connectors.errors import VlmError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer

    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["StepError", "StepResult", "SummedLoss", "take_step"]


class StepError(VlmError):
    """A step that cannot be taken because of what its samples gave."""


@dataclass(frozen=True)
class StepResult:
    """What one step gave, over all its batches and processes.

    Attributes:
        loss: mean over the supervised tokens.
        grad_norm: norm of the gradient before clipping.
        tokens: LLM tokens, padding left out.
    """

    loss: float
    grad_norm: float
    tokens: int


class SummedLoss(nn.Module):
    """Gives the loss summed over supervised tokens, and their number, in one forward.

    Sums add up over batches and processes whatever their lengths; means do not. It is
    what distributed training wraps, so logits never leave it.

    Args:
        model: the model that is trained.
        autocast: dtype to compute in, None for that of the weights.
    """

    def __init__(self, model: VisionLanguageModel, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Run one batch, the keyword arguments of the model's `forward`.

        Raises:
            StepError: no token of the batch is supervised.
        """
        if not bool((batch["labels"][:, 1:] != -100).any()):
            raise StepError("no token of the batch is supervised, so it has no loss; check the answers of its samples")
        device = batch["input_ids"].device.type
        with torch.autocast(device, dtype=self.autocast) if self.autocast else nullcontext():
            output = self.model(**batch)
        supervised = int(output.num_supervised)
        loss: Tensor = output.loss * supervised
        if not loss.requires_grad:
            # Text alone does not reach a connector: its gradient is zero, and other processes wait for it.
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            loss = loss + 0.0 * torch.stack([parameter.flatten()[0].float() for parameter in trained]).sum()
        return loss, supervised


def take_step(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: Optimizer,
    batches: Iterator[dict[str, Any]],
    *,
    accumulation: int,
    max_grad_norm: float | None,
) -> StepResult:
    """Run `accumulation` batches and move the trained parameters once.

    The gradient is that of the mean over the supervised tokens of all batches of all
    processes, as if they had been one batch.

    Raises:
        StepError: loss or gradient is not finite, the weights have not moved; or nothing
            is supervised.
    """
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(3, dtype=torch.float64)
    for turn in range(accumulation):
        batch = next(batches)
        with accelerator.no_sync(module) if turn < accumulation - 1 else nullcontext():
            loss, supervised = module(batch)
            accelerator.backward(loss)
        sums += torch.tensor([float(loss.detach()), supervised, int(batch["attention_mask"].sum())])
    total_loss, total_supervised, tokens = _over_processes(accelerator, sums)
    mean = total_loss / total_supervised
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        if parameter.grad is not None:
            # Distributed training averages over processes; what is wanted is their sum over the tokens of all.
            parameter.grad.mul_(accelerator.num_processes / total_supervised)
    norm = float(accelerator.clip_grad_norm_(parameters, max_grad_norm or math.inf))
    for name, value in (("loss", mean), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise StepError(
                f"the {name} is {value}; lower learning_rate, load the model in float32, and look at these samples"
            )
    optimizer.step()
    return StepResult(mean, norm, int(tokens))


def _over_processes(accelerator: Accelerator, sums: Tensor) -> list[float]:
    if accelerator.num_processes > 1:
        dtype = torch.float32 if accelerator.device.type == "mps" else sums.dtype
        sums = accelerator.reduce(sums.to(accelerator.device, dtype), reduction="sum")
    values: list[float] = sums.tolist()
    return values
