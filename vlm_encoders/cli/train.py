"""`vlm-encoders train`: a stage from a TOML file, options, or both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connectors.errors import UnknownNameError, VlmError
from vlm_encoders.cli.console import quiet_libraries
from vlm_encoders.cli.settings import build_parts, check_files

if TYPE_CHECKING:
    from accelerate import PartialState

    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.training.trainer import TrainResult
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["train"]


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
    stage: Annotated[str | None, typer.Option(help="stage-1, stage-2, stage-2-lora or stage-3.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step and process.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate, in place of the stage's own.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints, 500 when left out.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
) -> None:
    """Train a stage; options stand over the file's settings."""
    quiet_libraries()
    from vlm_encoders.training.run import join_processes

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
    settings = _settings(config, {key: value for key, value in given.items() if value is not None})
    _check(settings, resume=resume)
    processes = join_processes(cpu=settings.cpu)
    built, processor = build_parts(settings)
    result = _run(settings, built, processor, processes, resume=resume)
    if processes.is_main_process:
        _finish(Path(settings.output) / "model", built, processor, result)
    processes.wait_for_everyone()


def _finish(folder: Path, model: VisionLanguageModel, processor: VLMProcessor, result: TrainResult) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    typer.echo(f"{result.steps} steps in {result.seconds:.0f} s, loss {result.losses[-1]:.4f}; model saved to {folder}")
    typer.echo(f'ask it: vlm-encoders generate {folder} PICTURE --prompt "..."')


def _settings(path: Path | None, given: dict[str, Any]) -> TrainConfig:
    from vlm_encoders.training.config import TrainConfig

    if path is not None:
        return TrainConfig.from_toml(path, **given)
    missing = [name for name in ("data", "image_folder", "output") if name not in given]
    if missing:
        options = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise VlmError(f"training needs {options}; give them, or a TOML file that holds them")
    return TrainConfig(**given)


def _check(settings: TrainConfig, *, resume: bool) -> None:
    """Refuse what no run can use, before anything large is loaded."""
    from connectors.registry import nearest
    from vlm_encoders.training.progress import make_output
    from vlm_encoders.training.state import checkpoint_to_resume
    from vlm_encoders.vlm.stages import STAGES

    if settings.stage not in STAGES:
        raise UnknownNameError(f"no stage '{settings.stage}'; {nearest(settings.stage, list(STAGES))}")
    check_files(settings)
    checkpoint_to_resume(Path(settings.output), resume=resume)
    make_output(Path(settings.output))


def _run(
    settings: TrainConfig,
    model: VisionLanguageModel,
    processor: VLMProcessor,
    processes: PartialState,
    *,
    resume: bool,
) -> TrainResult:
    from vlm_encoders.training.data import ConversationDataset
    from vlm_encoders.training.trainer import Trainer
    from vlm_encoders.vlm.stages import STAGES, apply_stage

    dataset = ConversationDataset(settings.data, settings.image_folder, processor)
    unseen = None
    if settings.eval_data is not None:
        unseen = ConversationDataset(settings.eval_data, settings.image_folder, processor)
    apply_stage(model, STAGES[settings.stage].with_lr(settings.learning_rate))
    if processes.is_main_process:
        typer.echo(str(model.describe()))
    return Trainer(model, processor, dataset, settings, eval_dataset=unseen).fit(resume=resume)
