"""`vlm-encoders train`: a stage from a TOML file, options, or both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connectors.errors import VlmError
from vlm_encoders.cli.console import quiet_libraries
from vlm_encoders.cli.settings import build_parts, check_files, read_settings

if TYPE_CHECKING:
    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.training.proving.build_report import BuildReport
    from vlm_encoders.training.trainer import Trainer, TrainResult
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["train"]

_STOPPED = 128 + 15
"""Exit status of a process that SIGTERM ended, as shells tell it."""


def train(
    config: Annotated[Path | None, typer.Argument(help="TOML file of TrainConfig settings.")] = None,
    data: Annotated[str | None, typer.Option(help="LLaVA conversations, JSON or JSON Lines.")] = None,
    image_folder: Annotated[str | None, typer.Option(help="Folder that image paths start from.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for checkpoints and the trained model.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder name.")] = None,
    connector: Annotated[str | None, typer.Option(help="Connector recipe.")] = None,
    llm: Annotated[str | None, typer.Option(help="Hub id or folder of the LLM; 'tiny' for the embedded one.")] = None,
    model: Annotated[str | None, typer.Option(help="Saved model to go on from, in place of the three.")] = None,
    tiler: Annotated[str | None, typer.Option(help="Tiler name, such as llava-next; see list --tilers.")] = None,
    max_image_tokens: Annotated[int | None, typer.Option(help="Most tokens that an image may cost.")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Most tokens that the encoder sees at once.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of encoder and LLM: float32, bfloat16 or float16.")] = None,
    stage: Annotated[
        str | None, typer.Option(help="Stage policy, such as stage-1 or llava-1.5-stage-2; see list --stages.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step and process.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate, in place of the stage's own.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints, 500 when left out.")] = None,
    others: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, such as pack_tokens=4096; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Take no run: look at data, loss, speed, and whether the image is used.")
    ] = False,
) -> None:
    """Train a stage; options stand over the file's settings."""
    quiet_libraries()
    from vlm_encoders.training.policy_file import stage_policy
    from vlm_encoders.training.processes.distributed import join_processes
    from vlm_encoders.vlm.stages import apply_stage

    given: dict[str, Any] = {
        "data": data,
        "image_folder": image_folder,
        "output": output,
        "encoder": encoder,
        "connector": connector,
        "llm": llm,
        "model": model,
        "tiler": tiler,
        "max_image_tokens": max_image_tokens,
        "chunk_tokens": chunk_tokens,
        "dtype": dtype,
        "stage": stage,
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "save_every": save_every,
    }
    given = {key: value for key, value in given.items() if value is not None}
    settings = _settings(config, read_settings(others or []) | given)
    _check(settings, resume=resume, writes=not check)
    processes = join_processes(cpu=settings.cpu)
    built, processor = build_parts(settings)
    apply_stage(built, stage_policy(settings.stage).with_lr(settings.learning_rate))
    trainer = _trainer(settings, built, processor)
    if check:
        from vlm_encoders.cli.doctor import run_check

        raise typer.Exit(run_check(settings, built, processor, trainer.dataset, trainer.eval_dataset))
    result = trainer.fit(resume=resume)
    if result.stopped:
        if processes.is_main_process:
            typer.echo(f"stopped by SIGTERM behind step {result.steps}; go on with --resume", err=True)
        raise typer.Exit(_STOPPED)
    folder = Path(settings.output) / "model"
    trainer.save_pretrained(folder)
    if processes.is_main_process:
        _finish(folder, result)


def _finish(folder: Path, result: TrainResult) -> None:
    left_out = f", {result.skipped} bad samples left out" if result.skipped else ""
    took = f"{result.steps} steps in {result.seconds:.0f} s, loss {result.losses[-1]:.4f}{left_out}"
    typer.echo(f"{took}; model saved to {folder}")
    if result.best is not None:
        typer.echo(f"the model of the lowest evaluation loss: {result.best}")
    typer.echo(f'ask it: vlm-encoders generate {folder} PICTURE --prompt "..."')


def _settings(path: Path | None, given: dict[str, Any]) -> TrainConfig:
    from vlm_encoders.training.config import TrainConfig

    if path is not None:
        return TrainConfig.from_toml(path, **given)
    missing = [name for name in ("data", "output") if name not in given]
    if missing:
        options = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise VlmError(f"training needs {options}; give them, or a TOML file that holds them")
    return TrainConfig(**given)


def _check(settings: TrainConfig, *, resume: bool, writes: bool) -> None:
    """Refuse what no run can use, before anything large is loaded."""
    from vlm_encoders.training.checkpoints import checkpoint_to_resume
    from vlm_encoders.training.policy_file import stage_policy
    from vlm_encoders.training.progress import make_output
    from vlm_encoders.training.trackers import check_tracker

    stage_policy(settings.stage)
    check_tracker(settings.tracker)
    check_files(settings)
    if writes:
        checkpoint_to_resume(Path(settings.output), resume=resume)
        make_output(Path(settings.output))


def _trainer(settings: TrainConfig, model: VisionLanguageModel, processor: VLMProcessor) -> Trainer:
    from vlm_encoders.training.feeding.data import ConversationDataset
    from vlm_encoders.training.feeding.stream import open_dataset
    from vlm_encoders.training.trainer import Trainer

    # The files were checked before the model was built.
    dataset = open_dataset(settings.data, settings.image_folder, processor, check=False)
    unseen = None
    if settings.eval_data is not None:
        unseen = ConversationDataset(settings.eval_data, settings.image_folder, processor, check=False)
    return Trainer(model, processor, dataset, settings, eval_dataset=unseen, on_build=_show)


def _show(report: BuildReport) -> None:
    typer.echo(str(report))
