"""A run under way: what is set up once, moves with each step, and goes into a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from connectors.errors import VlmError
from vlm_encoders.training.checkpoints import save_checkpoint
from vlm_encoders.training.config import TrainConfig
from vlm_encoders.training.evaluate import summed_loss
from vlm_encoders.training.feeding.feed import Feed
from vlm_encoders.training.processes.first import on_first
from vlm_encoders.training.processes.gather import full_optimizer_state, full_weights, gathered
from vlm_encoders.training.progress import LogEntry
from vlm_encoders.training.proving.proof import Proof
from vlm_encoders.training.recompute import Recompute
from vlm_encoders.training.rng import random_state
from vlm_encoders.training.state import RunState
from vlm_encoders.training.step import StepResult
from vlm_encoders.vlm.atomic import atomic_folder

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vlm_encoders.training.feeding.batches import Samples
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["BEST", "Run"]

BEST = "best"


@dataclass(kw_only=True)
class Run:
    """What the loop works with.

    Attributes:
        config: the settings of the run.
        samples: length of the dataset, None for a stream.
        model: the model itself.
        processor: its processor.
        eval_dataset: samples that are judged and never trained on.
        module: the model as it is trained: summed loss, wrapped for several processes.
        accelerator: device and processes.
        optimizer: of the trained parameters.
        schedule: of the learning rates.
        proof: that what trains moves and nothing else does.
        recompute: the blocks that are computed again in the backward pass.
        feed: the batches.
        total: steps of the whole run.
        step: steps that are done.
        tokens: LLM tokens seen.
        best: the lowest evaluation loss.
        losses: the loss of each step.
        factors: the part of the peak learning rate that each step took.
    """

    config: TrainConfig
    samples: int | None
    model: VisionLanguageModel
    processor: VLMProcessor
    eval_dataset: Samples | None
    module: nn.Module
    accelerator: Accelerator
    optimizer: Optimizer
    schedule: LambdaLR
    proof: Proof
    recompute: Recompute | None
    feed: Feed
    total: int
    step: int = 0
    tokens: int = 0
    best: float | None = None
    losses: list[float] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)

    def took(self, result: StepResult) -> None:
        """Count a step."""
        self.factors.append(self.schedule.lr_lambdas[0](self.step))
        self.schedule.step()
        self.step += 1
        self.tokens += result.tokens
        self.losses.append(result.loss)

    def save(self) -> Path:
        """Save a checkpoint on the first process and give its folder on all.

        Raises:
            VlmError: it cannot be written; raised on every process.
        """
        state = self._state()
        with gathered(self.accelerator, self.module):
            folder: Path = on_first(
                self.accelerator,
                lambda: save_checkpoint(
                    Path(self.config.output), state, self.model, self.processor, keep=self.config.keep_checkpoints
                ),
            )
        return folder

    def save_best(self, loss: float) -> None:
        """Save the model where its evaluation loss is the lowest so far.

        Raises:
            VlmError: it cannot be written; raised on every process.
        """
        if self.best is not None and loss >= self.best:
            return
        self.best = loss
        if self.config.keep_best:
            self.save_model(Path(self.config.output) / BEST)

    def save_model(self, folder: Path) -> None:
        """Save model and processor on the first process.

        Raises:
            VlmError: it cannot be written; raised on every process.
        """
        with gathered(self.accelerator, self.module):
            on_first(self.accelerator, partial(self._write_model, folder))

    def eval_loss(self) -> float:
        """Measure the loss on the evaluation data; every process takes its share.

        Raises:
            VlmError: a sample cannot be made, or nothing is supervised; raised on every process.
        """
        dataset, size, world = self.eval_dataset, self.config.batch_size, self.accelerator.num_processes
        assert dataset is not None
        loss, supervised = 0.0, 0
        problem: VlmError | None = None
        try:
            loss, supervised = summed_loss(
                self.model,
                self.processor,
                dataset,
                list(range(self.accelerator.process_index, len(dataset), world)),
                batch_size=size,
                module=self.module,
                # As many passes on each process, also where the last samples do not go round.
                passes=math.ceil(math.ceil(len(dataset) / world) / size),
                num_workers=self.config.num_workers,
                on_bad=partial(self.feed.leave_out, step=self.step),
            )
        except VlmError as error:
            # Told once the others, who wait for the sums, know of it.
            problem = error
        sums = torch.tensor([loss, float(supervised), float(problem is not None)], device=self.accelerator.device)
        total, count, problems = self.accelerator.reduce(sums, reduction="sum").tolist()
        if problem is not None:
            raise problem
        if problems:
            raise VlmError("another process could not make its evaluation samples; its own message says why")
        if not count:
            raise VlmError("no token of the evaluation dataset is supervised; check the answers of its samples")
        return float(total / count)

    def skipped(self) -> int:
        """Count the samples that all processes have left out."""
        counted = torch.tensor(self.feed.skipped, device=self.accelerator.device)
        return int(self.accelerator.reduce(counted, reduction="sum").item())

    def close(self) -> None:
        """Take all hooks and wrappers off the model."""
        self.proof.close()
        if self.recompute is not None:
            self.recompute.remove()

    def due(self, every: int | None) -> bool:
        """Say whether something is to be done at this step; at the last one it always is."""
        return self.step == self.total or (every is not None and self.step % every == 0)

    def entry(self, result: StepResult, elapsed: float, *, steps: int, tokens: int) -> LogEntry:
        """Make the log entry of a step; steps and tokens are those of the `elapsed` seconds."""
        rates: dict[str, float] = {}
        for group in self.optimizer.param_groups:
            # Deeper blocks may have lower rates; what is told is the peak of the part.
            name = f"lr_{group['part']}"
            rates[name] = max(rates.get(name, 0.0), float(group["lr"]))
        return {
            "step": self.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            **{f"grad_norm_{name}": norm for name, norm in result.grad_norms.items()},
            **rates,
            "tokens": self.tokens,
            "tokens_per_second": tokens / elapsed,
            "data_wait": self.feed.waited / elapsed,
            "skipped": self.feed.skipped,
            "seconds_left": elapsed / steps * (self.total - self.step),
        }

    def _state(self) -> RunState:
        """Collect what a resume needs; every process takes part."""
        from accelerate.utils import gather_object

        randoms: list[dict[str, Any]] = gather_object([random_state()])
        feeds: list[dict[str, Any]] = gather_object([self.feed.state()])
        return RunState(
            step=self.step,
            losses=list(self.losses),
            factors=list(self.factors),
            tokens=self.tokens,
            best=self.best,
            world=self.accelerator.num_processes,
            samples=self.samples,
            config=self.config.to_dict(),
            weights=full_weights(self.accelerator, self.module),
            optimizer=full_optimizer_state(self.accelerator, self.module, self.optimizer),
            feed=feeds,
            random=randoms,
            frozen=dict(self.proof.frozen),
        )

    def _write_model(self, folder: Path) -> None:
        with atomic_folder(folder) as inside:
            self.model.save_pretrained(inside)
            self.processor.save_pretrained(inside)
