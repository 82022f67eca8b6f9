"""`vlm-encoders check-data`: everything that is wrong with conversations, before a run meets it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connectors.errors import VlmError
from vlm_encoders.cli.console import quiet_libraries
from vlm_encoders.cli.data_report import print_report, write_json

if TYPE_CHECKING:
    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.training.feeding.findings import DataCheck
    from vlm_encoders.training.feeding.sources.base import Opened
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["check_data"]


def check_data(
    config: Annotated[Path | None, typer.Argument(help="TOML file of TrainConfig settings.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Conversations: JSON, JSON Lines, 'shards/*.tar' or hf:NAME[split=train].")
    ] = None,
    image_folder: Annotated[
        str | None, typer.Option(help="Folder that image paths start from; else that of the data.")
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder name; of it the spec alone is read.")] = None,
    connector: Annotated[str | None, typer.Option(help="Connector recipe.")] = None,
    llm: Annotated[
        str | None, typer.Option(help="Hub id or folder of the LLM, of which the tokenizer is read; 'tiny' for ours.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Saved model, in place of the three.")] = None,
    tiler: Annotated[str | None, typer.Option(help="Tiler name, such as llava-next; see list --tilers.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of the context; else the LLM's.")] = None,
    max_image_tokens: Annotated[int | None, typer.Option(help="Most tokens that an image may cost.")] = None,
    max_megapixels: Annotated[float, typer.Option(help="Warn of images that are larger.")] = 50.0,
    decode: Annotated[
        bool, typer.Option("--decode/--headers", help="Decode every image, or read its header alone.")
    ] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at the first samples only.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Look at so many samples drawn at random.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes; else one a core.")] = None,
    show: Annotated[int, typer.Option(min=0, help="Examples of each kind of finding.")] = 3,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on warnings too.")] = False,
) -> None:
    """Check conversations and every image of theirs; with an LLM, their length against its context.

    Exit status 0 where nothing is wrong, 1 where a run would stop or leave samples out.
    """
    given: dict[str, Any] = {
        "data": data,
        "image_folder": image_folder,
        "encoder": encoder,
        "connector": connector,
        "llm": llm,
        "model": model,
        "tiler": tiler,
        "max_length": max_length,
        "max_image_tokens": max_image_tokens,
    }
    settings = _settings(config, {key: value for key, value in given.items() if value is not None})
    if limit is not None and sample is not None:
        raise VlmError(f"--limit {limit} and --sample {sample} both choose samples; give one of them")
    # What is cheap to refuse comes first.
    opened = {name: _open(name, settings) for name in (settings.data, settings.eval_data) if name is not None}
    drawn = {name: _drawn(rows, sample, settings.seed) for name, rows in opened.items()}
    processor = _processor(settings)
    options = {"large": int(max_megapixels * 1e6), "decode": decode, "workers": _workers(workers)}
    checks: list[tuple[str, DataCheck]] = []
    for name, rows in opened.items():
        check = _check(rows, processor, drawn[name], limit, **options)
        print_report(name, check, show=show, first=not checks, decoded=decode)
        checks.append((name, check))
    if as_json is not None:
        write_json(as_json, checks)
        typer.echo(f"written to {as_json}", err=True)
    if any(check.errors or (strict and check.warnings) for _, check in checks):
        raise typer.Exit(1)


def _settings(path: Path | None, given: dict[str, Any]) -> TrainConfig:
    from vlm_encoders.training.config import TrainConfig

    # Nothing is written there; a file for training may name its own.
    if path is not None:
        return TrainConfig.from_toml(path, **{"output": "."} | given)
    if "data" not in given:
        raise VlmError("there is nothing to check; give --data, or a TOML file that names it")
    return TrainConfig(**{"output": "."} | given)


def _processor(settings: TrainConfig) -> VLMProcessor | None:
    """Make what counts tokens, None where no LLM is named."""
    if settings.model is None and settings.llm is None:
        return None
    quiet_libraries()
    from vlm_encoders.tiny import llm_folder
    from vlm_encoders.vlm.build_processor import build_processor, saved_processor

    if settings.model is not None:
        processor = saved_processor(settings.model)
        processor.max_length = settings.max_length or processor.max_length
        processor.max_image_tokens = settings.max_image_tokens or processor.max_image_tokens
        return processor
    if settings.encoder is None or settings.connector is None:
        raise VlmError("lengths are counted with --encoder and --connector beside --llm; give all three, or leave it")
    assert settings.llm is not None
    return build_processor(
        settings.encoder,
        settings.connector,
        llm_folder() if settings.llm == "tiny" else settings.llm,
        tiler=settings.tiler,
        max_length=settings.max_length,
        max_image_tokens=settings.max_image_tokens,
    )


def _open(name: str, settings: TrainConfig) -> Opened:
    from vlm_encoders.training.feeding.sources.opening import open_records

    opened = open_records(name, settings.image_folder)
    if settings.image_folder is not None and not opened.image_folder.is_dir():
        folder = opened.image_folder
        raise VlmError(f"the image folder '{folder}' is no folder; give the one that image paths start from")
    return opened


def _check(
    opened: Opened, processor: VLMProcessor | None, drawn: list[int] | None, limit: int | None, **options: Any
) -> DataCheck:
    from vlm_encoders.cli.progress_bar import counting
    from vlm_encoders.training.feeding.data_check import check_conversations
    from vlm_encoders.training.feeding.sources.base import Records

    total = len(opened.rows) if isinstance(opened.rows, Records) else None
    wanted = [number for number in (total, limit, None if drawn is None else len(drawn)) if number is not None]
    with counting("checking", min(wanted, default=None)) as advance:
        return check_conversations(
            opened, indices=drawn, limit=limit, processor=processor, on_progress=advance, **options
        )


def _drawn(opened: Opened, sample: int | None, seed: int) -> list[int] | None:
    import random

    from vlm_encoders.training.feeding.sources.base import Records

    if sample is None:
        return None
    if not isinstance(opened.rows, Records):
        raise VlmError(f"--sample {sample} draws samples by their number, and a stream has none; use --limit {sample}")
    total = len(opened.rows)
    return sorted(random.Random(seed).sample(range(total), min(sample, total)))


def _workers(asked: int | None) -> int:
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if cores > 1 else 0
