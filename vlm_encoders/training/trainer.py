"""The training loop: one for every stage, on one process or many."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from connectors.errors import VlmError
from vlm_encoders.training.batches import Samples, iterate_batches
from vlm_encoders.training.config import TrainConfig
from vlm_encoders.training.evaluate import summed_loss
from vlm_encoders.training.order import SeededBatches
from vlm_encoders.training.progress import LogEntry, RunProgress, make_output, trim_log, write_log
from vlm_encoders.training.run import Run, start_run
from vlm_encoders.training.state import checkpoint_to_resume, load_state
from vlm_encoders.training.step import StepError, StepResult, take_step
from vlm_encoders.vlm.stages import Part

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["TrainResult", "Trainer"]

LOG_FILE = "log.jsonl"


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        steps: steps of the whole run, those before a resume included.
        losses: the loss of each step, a mean over its supervised tokens.
        eval_losses: step -> loss on the evaluation data, in this call.
        seconds: time of the steps of this call, evaluation and saving included.
        tokens: LLM tokens seen by the whole run, padding left out.
        tokens_per_second: LLM tokens a second, in this call.
        moved: whether the weights of each part moved in this call.
        checkpoint: the last checkpoint, a folder.
    """

    steps: int
    losses: list[float]
    eval_losses: dict[int, float]
    seconds: float
    tokens: int
    tokens_per_second: float
    moved: dict[Part, bool]
    checkpoint: Path


class Trainer:
    """Trains what the stage of a model says, and nothing else.

    Args:
        model: a model whose stage is applied.
        processor: the processor of that model.
        dataset: samples by index, such as a `ConversationDataset`.
        config: the settings of the run.
        eval_dataset: samples whose loss is measured and that are never trained on.
        on_log: called on the first process with each log entry.

    Raises:
        VlmError: a dataset is empty, or the settings say another stage or length limit
            than model and processor have.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: VLMProcessor,
        dataset: Samples,
        config: TrainConfig,
        *,
        eval_dataset: Samples | None = None,
        on_log: Callable[[LogEntry], None] | None = None,
    ) -> None:
        for name, samples in (("training", dataset), ("evaluation", eval_dataset)):
            if samples is not None and not len(samples):
                raise VlmError(f"the {name} dataset is empty; give at least one conversation")
        if model.stage is not None and model.stage.name != config.stage:
            raise VlmError(
                f"the settings say stage '{config.stage}', the model has '{model.stage.name}'; name one stage"
            )
        if config.max_length is not None and config.max_length != processor.max_length:
            raise VlmError(
                f"the settings say max_length={config.max_length}, the processor has {processor.max_length}; "
                "build it with the same max_length"
            )
        self.model = model
        self.processor = processor
        self.dataset = dataset
        self.config = config
        self.eval_dataset = eval_dataset
        self.on_log = on_log
        self.output = Path(config.output)

    def fit(self, *, resume: bool | str | Path = False) -> TrainResult:
        """Train to the end of the run, from its beginning or from a checkpoint.

        On the CPU, a run that is resumed gives the losses of one that was never
        interrupted, to the bit.

        Args:
            resume: True for the newest checkpoint in the output folder, or a checkpoint folder.

        Raises:
            VlmError: nothing trains, a sample cannot be made, a loss is not finite, a
                checkpoint cannot be written or does not fit, a frozen part moved, or a
                trained one did not.
        """
        folder = checkpoint_to_resume(self.output, resume=resume)
        make_output(self.output)
        run = start_run(self.model, self.config, len(self.dataset), load_state(folder) if folder else None)
        config, main = self.config, run.accelerator.is_main_process
        first_step, first_token, started = run.step, run.tokens, time.monotonic()
        eval_losses: dict[int, float] = {}
        if main:
            trim_log(self.output / LOG_FILE, run.step)
        with RunProgress(run.total, run.step, bar=config.progress, active=main) as progress:
            for result in self._steps(run):
                elapsed = time.monotonic() - started
                entry = run.entry(result, elapsed, steps=run.step - first_step, tokens=run.tokens - first_token)
                progress.step(entry)
                if self.eval_dataset is not None and run.due(config.eval_every):
                    entry["eval_loss"] = eval_losses[run.step] = self._eval_loss(run, self.eval_dataset)
                if main and ("eval_loss" in entry or run.due(config.log_every)):
                    self._log(entry, progress)
                if run.due(config.save_every):
                    folder = run.save(self.processor)
        seconds = time.monotonic() - started
        moved = run.guard.check(self.model) if run.step > first_step else dict.fromkeys(run.guard.frozen, False)
        speed = (run.tokens - first_token) / seconds
        assert folder is not None
        return TrainResult(run.step, run.losses, eval_losses, seconds, run.tokens, speed, moved, folder)

    def _steps(self, run: Run) -> Iterator[StepResult]:
        config, accelerator = self.config, run.accelerator
        order = SeededBatches(
            len(self.dataset),
            batch_size=config.batch_size,
            accumulation=config.gradient_accumulation,
            steps=run.total,
            seed=config.seed,
            start=run.step,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        batches = iterate_batches(
            self.dataset, self.processor, order, device=accelerator.device, num_workers=config.num_workers
        )
        while run.step < run.total:
            try:
                result = take_step(
                    accelerator,
                    run.module,
                    run.optimizer,
                    batches,
                    accumulation=config.gradient_accumulation,
                    max_grad_norm=config.max_grad_norm,
                )
            except StepError as error:
                indices = [index for batch in order.step_batches(run.step) for index in batch]
                raise StepError(f"step {run.step + 1}, {self._names(indices)}: {error}") from error
            run.schedule.step()
            run.step += 1
            run.tokens += result.tokens
            run.losses.append(result.loss)
            yield result

    def _eval_loss(self, run: Run, dataset: Samples) -> float:
        accelerator = run.accelerator
        mine = list(range(accelerator.process_index, len(dataset), accelerator.num_processes))
        loss, supervised = summed_loss(self.model, self.processor, dataset, mine, batch_size=self.config.batch_size)
        sums = torch.tensor([loss, float(supervised)], device=accelerator.device)
        total, count = accelerator.reduce(sums, reduction="sum").tolist()
        return float(total / count)

    def _log(self, entry: LogEntry, progress: RunProgress) -> None:
        progress.log(entry)
        write_log(self.output / LOG_FILE, entry)
        if self.on_log is not None:
            self.on_log(entry)

    def _names(self, indices: list[int]) -> str:
        name = getattr(self.dataset, "name", "sample {}".format)
        more = f" and {len(indices) - 8} more" if len(indices) > 8 else ""
        return ", ".join(name(index) for index in indices[:8]) + more
