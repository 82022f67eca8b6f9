"""The training loop: one for every stage, on one process or many."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from connectors.errors import VlmError
from vlm_encoders.training.checkpoints import checkpoint_to_resume, load_state, tidy
from vlm_encoders.training.config import TrainConfig
from vlm_encoders.training.feeding.batches import Samples
from vlm_encoders.training.masters import release_masters
from vlm_encoders.training.processes.distributed import join_processes
from vlm_encoders.training.processes.sharding import is_engine, is_sharded
from vlm_encoders.training.progress import LogEntry, RunProgress, make_output, trim_log, write_log
from vlm_encoders.training.proving.build_report import BuildReport, build_report, typical_of
from vlm_encoders.training.result import TrainResult
from vlm_encoders.training.run import BEST, Run
from vlm_encoders.training.start import start_run
from vlm_encoders.training.step import StepError, StepResult, take_step
from vlm_encoders.training.stopping import StopRequest, stop_on_sigterm
from vlm_encoders.training.trackers import Tracker, check_tracker, open_tracker

if TYPE_CHECKING:
    from vlm_encoders.training.feeding.stream import ConversationStream
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["TrainResult", "Trainer"]

LOG_FILE = "log.jsonl"
BUILD_FILE = "build.txt"


class Trainer:
    """Trains what the stage of a model says, and nothing else.

    Args:
        model: a model whose stage is applied.
        processor: the processor of that model.
        dataset: samples by index, such as a `ConversationDataset`, or a `ConversationStream`.
        config: the settings of the run.
        eval_dataset: samples whose loss is measured and that are never trained on.
        on_build: called on the first process with the build report, before the first step; it is written to
            `output`/build.txt too.
        on_log: called on the first process with each log entry.

    Raises:
        VlmError: a dataset is empty, or the settings say another stage or length limit
            than model and processor have.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: VLMProcessor,
        dataset: Samples | ConversationStream,
        config: TrainConfig,
        *,
        eval_dataset: Samples | None = None,
        on_build: Callable[[BuildReport], None] | None = None,
        on_log: Callable[[LogEntry], None] | None = None,
    ) -> None:
        for name, samples in (("training", dataset), ("evaluation", eval_dataset)):
            if samples is not None and hasattr(samples, "__len__") and not len(samples):
                raise VlmError(f"the {name} dataset is empty; give at least one conversation")
        if eval_dataset is not None and not hasattr(eval_dataset, "__len__"):
            raise VlmError(
                "the evaluation dataset is a stream, which has no end; give samples by index, such as a file"
            )
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
        self.on_build = on_build
        self.on_log = on_log
        self.output = Path(config.output)
        self._last: Run | None = None

    def fit(self, *, resume: bool | str | Path = False) -> TrainResult:
        """Train to the end of the run, from its beginning or from a checkpoint.

        On the CPU, a run that is resumed gives the losses of one that was never
        interrupted, to the bit. SIGTERM ends it behind the step under way, with a
        checkpoint to resume from.

        Args:
            resume: True for the newest checkpoint in the output folder, or a checkpoint folder.

        Raises:
            VlmError: nothing trains, a sample cannot be made, a loss is not finite, a
                checkpoint cannot be written or does not fit, a frozen part moved, or a
                trained one did not.
        """
        processes = join_processes(cpu=self.config.cpu)
        make_output(self.output)
        with processes.main_process_first():
            if processes.is_main_process:
                tidy(self.output)
        folder = checkpoint_to_resume(self.output, resume=resume)
        check_tracker(self.config.tracker)
        with stop_on_sigterm() as stop:
            state = load_state(folder) if folder else None
            run = self._last = start_run(
                self.model, self.processor, self.dataset, self.config, state, eval_dataset=self.eval_dataset
            )
            try:
                return self._run(run, stop, folder)
            finally:
                run.close()

    def save_pretrained(self, folder: str | Path) -> None:
        """Save model and processor to a folder; after `fit`, each process calls it, also where weights are sharded.

        Raises:
            VlmError: it cannot be written; raised on every process.
        """
        if self._last is not None:
            self._last.save_model(Path(folder))
            return
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def _run(self, run: Run, stop: StopRequest, folder: Path | None) -> TrainResult:
        config, main = self.config, run.accelerator.is_main_process
        first_step, first_token, started = run.step, run.tokens, time.monotonic()
        eval_losses: dict[int, float] = {}
        if main:
            trim_log(self.output / LOG_FILE, run.step)
            self._report(run)
        stopped = False
        with (
            closing(
                open_tracker(config.tracker if main else "none", self.output, config.to_dict(), step=run.step)
            ) as tracker,
            run.feed,
            RunProgress(run.total, run.step, bar=config.progress, active=main) as progress,
        ):
            while run.step < run.total and not stopped:
                result = self._step(run)
                for warning in run.proof.after_step(run.step):
                    progress.say(warning)
                elapsed = time.monotonic() - started
                entry = run.entry(result, elapsed, steps=run.step - first_step, tokens=run.tokens - first_token)
                progress.step(entry)
                if run.eval_dataset is not None and run.due(config.eval_every):
                    entry["eval_loss"] = eval_losses[run.step] = run.eval_loss()
                if main and ("eval_loss" in entry or run.due(config.log_every)):
                    self._log(entry, progress, tracker)
                if "eval_loss" in entry:
                    run.save_best(entry["eval_loss"])
                stopped = run.step < run.total and stop.everywhere(run.accelerator)
                if stopped or run.due(config.save_every):
                    folder = run.save()
        seconds = time.monotonic() - started
        moved = run.proof.check(self.model) if run.step > first_step else dict.fromkeys(run.proof.frozen, False)
        if not is_engine(run.module) and not any(is_sharded(parameter) for parameter in self.model.parameters()):
            # What follows, such as generating, is not under autocast.
            release_masters(self.model)
        best = self.output / BEST
        assert folder is not None
        return TrainResult(
            steps=run.step,
            losses=run.losses,
            eval_losses=eval_losses,
            seconds=seconds,
            tokens=run.tokens,
            tokens_per_second=(run.tokens - first_token) / seconds,
            moved=moved,
            checkpoint=folder,
            best=best if best.is_dir() else None,
            skipped=run.skipped(),
            stopped=stopped,
        )

    def _report(self, run: Run) -> None:
        report = build_report(
            self.model, typical_of(self.dataset, self.model.image_token_id), mixed_precision=self.config.mixed_precision
        )
        with suppress(OSError):
            (self.output / BUILD_FILE).write_text(f"{report}\n", encoding="utf-8")
        if self.on_build is not None:
            self.on_build(report)

    def _step(self, run: Run) -> StepResult:
        config = self.config
        try:
            result = take_step(
                run.accelerator,
                run.module,
                run.optimizer,
                run.feed,
                accumulation=config.gradient_accumulation,
                max_grad_norm=config.max_grad_norm,
                before_update=partial(run.proof.after_backward, run.step + 1),
            )
        except StepError as error:
            raise StepError(f"step {run.step + 1}, {run.feed.last_names()}: {error}") from error
        run.took(result)
        return result

    def _log(self, entry: LogEntry, progress: RunProgress, tracker: Tracker) -> None:
        progress.log(entry)
        write_log(self.output / LOG_FILE, entry)
        tracker.log(int(entry["step"]), {name: value for name, value in entry.items() if name != "step"})
        if self.on_log is not None:
            self.on_log(entry)
