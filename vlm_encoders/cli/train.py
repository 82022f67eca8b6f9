"""`vlm-encoders train`: a stage from a TOML file, options, or both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connectors.errors import UnknownNameError, VlmError
from vlm_encoders.cli.console import count, print_table, quiet_libraries

if TYPE_CHECKING:
    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.training.trainer import TrainResult
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["print_parts", "train"]


def train(
    config: Annotated[Path | None, typer.Argument(help="TOML file of TrainConfig settings.")] = None,
    data: Annotated[str | None, typer.Option(help="LLaVA conversations, JSON or JSON Lines.")] = None,
    image_folder: Annotated[str | None, typer.Option(help="Folder that image paths start from.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for checkpoints and the trained model.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder name.")] = None,
    connector: Annotated[str | None, typer.Option(help="Connector recipe.")] = None,
    llm: Annotated[str | None, typer.Option(help="Hub id or folder of the LLM; 'tiny' for the embedded one.")] = None,
    model: Annotated[str | None, typer.Option(help="Saved model to go on from, in place of the three.")] = None,
    tiler: Annotated[str | None, typer.Option(help="whole, anyres or internvl.")] = None,
    stage: Annotated[str | None, typer.Option(help="stage-1, stage-2, stage-2-lora or stage-3.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step and process.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate, in place of the stage's own.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
) -> None:
    """Train a stage; options stand over the file's settings."""
    quiet_libraries()
    given: dict[str, Any] = {
        "data": data,
        "image_folder": image_folder,
        "output": output,
        "encoder": encoder,
        "connector": connector,
        "llm": llm,
        "model": model,
        "tiler": tiler,
        "stage": stage,
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
    }
    settings = _settings(config, {key: value for key, value in given.items() if value is not None})
    built, processor = _parts(settings)
    result = _run(settings, built, processor, resume=resume)
    folder = Path(settings.output) / "model"
    built.save_pretrained(folder)
    processor.save_pretrained(folder)
    typer.echo(f"{result.steps} steps in {result.seconds:.0f} s, loss {result.losses[-1]:.4f}; model saved to {folder}")
    typer.echo(f'ask it: vlm-encoders generate {folder} PICTURE --prompt "..."')


def print_parts(model: VisionLanguageModel) -> None:
    """Print what each part of a model is, and what of it trains."""
    rows = [
        (
            row.part,
            row.module,
            count(row.parameters),
            count(row.trainable),
            row.dtype,
            "-" if row.lr is None else f"{row.lr:g}",
            row.mode,
            row.tokens,
        )
        for row in model.describe()
    ]
    headers = ("part", "class", "params", "trainable", "dtype", "lr", "mode", "tokens out")
    print_table(headers, rows, right=(2, 3, 5))


def _settings(path: Path | None, given: dict[str, Any]) -> TrainConfig:
    from vlm_encoders.training.config import TrainConfig

    if path is not None:
        return TrainConfig.from_toml(path, **given)
    missing = [name for name in ("data", "image_folder", "output") if name not in given]
    if missing:
        options = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise VlmError(f"training needs {options}; give them, or a TOML file that holds them")
    return TrainConfig(**given)


def _parts(settings: TrainConfig) -> tuple[VisionLanguageModel, VLMProcessor]:
    from vlm_encoders.tiny import llm_folder
    from vlm_encoders.vlm.build import build_model
    from vlm_encoders.vlm.checkpoint import load_model
    from vlm_encoders.vlm.processor import VLMProcessor

    if settings.model is not None:
        model = load_model(Path(settings.model))
        return model, VLMProcessor.from_pretrained(settings.model, model)
    if settings.encoder is None or settings.connector is None or settings.llm is None:
        raise VlmError("training needs --encoder, --connector and --llm, or --model with a saved model")
    llm = llm_folder() if settings.llm == "tiny" else settings.llm
    return build_model(settings.encoder, settings.connector, llm, tiler=settings.tiler, max_length=settings.max_length)


def _run(settings: TrainConfig, model: VisionLanguageModel, processor: VLMProcessor, *, resume: bool) -> TrainResult:
    from connectors.registry import nearest
    from vlm_encoders.training.data import ConversationDataset
    from vlm_encoders.training.trainer import Trainer
    from vlm_encoders.vlm.stages import STAGES, apply_stage

    if settings.stage not in STAGES:
        raise UnknownNameError(f"no stage '{settings.stage}'; {nearest(settings.stage, list(STAGES))}")
    dataset = ConversationDataset(settings.data, settings.image_folder, processor)
    unseen = None
    if settings.eval_data is not None:
        unseen = ConversationDataset(settings.eval_data, settings.image_folder, processor)
    apply_stage(model, STAGES[settings.stage].with_lr(settings.learning_rate))
    print_parts(model)
    return Trainer(model, processor, dataset, settings, eval_dataset=unseen).fit(resume=resume)
