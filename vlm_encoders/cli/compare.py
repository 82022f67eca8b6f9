"""`vlm-encoders compare`: connectors trained on the same data, order and seeds."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connectors.errors import VlmError
from vlm_encoders.cli.claim import check_claim, claim_folder
from vlm_encoders.cli.console import count, print_table, quiet_libraries
from vlm_encoders.cli.settings import build_parts, check_files

if TYPE_CHECKING:
    from vlm_encoders.compare import Build, Compared, HeldOut
    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["compare"]

STEPS = 400
_REMOVED = ("data", "train", "compare.json")
RECIPES = ["mlp", "pixel_shuffle:factor=2+mlp", "perceiver:queries=16,heads=4,head_dim=32,kv_heads=2+linear"]


def compare(
    connector: Annotated[list[str] | None, typer.Option(help="Connector recipe; may be given again.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each, from seeds 0, 1, ...")] = 1,
    steps: Annotated[int | None, typer.Option(help="Steps of Stage 1; 400, or what the file says.")] = None,
    control: Annotated[bool, typer.Option(help="Add average pooling + MLP at each number of tokens.")] = True,
    output: Annotated[Path, typer.Option(help="Folder for data, runs and the table.")] = Path("runs/compare"),
    config: Annotated[Path | None, typer.Option(help="TOML file of TrainConfig settings, for your own parts.")] = None,
) -> None:
    """Train connectors by Stage 1 on equal terms, on the embedded parts or your own; judge them on held-out data."""
    for name, value in (("seeds", seeds), ("steps", 1 if steps is None else steps)):
        if value < 1:
            raise VlmError(f"--{name} {value} trains nothing; give at least 1")
    settings = None if config is None else _own_settings(config, output, steps)
    check_claim(output, "compare")
    quiet_libraries()
    build = _build_tiny if settings is None else _builder(settings)
    recipes = _fitting(connector or RECIPES, build, control=control)
    # Nothing of an earlier run goes before all is known to be right.
    claim_folder(output, "compare", _REMOVED)
    settings, held_out = _embedded(output, steps or STEPS) if settings is None else (settings, _held_out(settings))
    from vlm_encoders.compare import compare_connectors

    rows: list[Compared] = []
    try:
        for number, recipe in enumerate(recipes, start=1):
            typer.echo(f"{number}/{len(recipes)} {recipe}", err=True)
            rows.append(compare_connectors(recipe, build, settings, held_out, seeds=range(seeds)))
            (output / "compare.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    finally:
        # What was trained is told, too, when a later one fails or is stopped.
        if rows:
            _print(rows)
            typer.echo(f"loss and accuracy are of held-out data; every number is in {output / 'compare.json'}")


def _build_tiny(recipe: str, seed: int) -> tuple[VisionLanguageModel, VLMProcessor]:
    from vlm_encoders.tiny.stage1 import build_tiny

    return build_tiny(recipe, seed=seed)


def _embedded(output: Path, steps: int) -> tuple[TrainConfig, HeldOut]:
    from vlm_encoders.tiny.stage1 import tiny_run
    from vlm_encoders.training.feeding.data import ConversationDataset

    run = tiny_run(output, steps=steps)
    return run.config, lambda processor: ConversationDataset(run.held_out, run.held_out.parent, processor)


def _own_settings(path: Path, output: Path, steps: int | None) -> TrainConfig:
    from vlm_encoders.training.config import TrainConfig

    settings = TrainConfig.from_toml(path, output=str(output / "train"), **({} if steps is None else {"steps": steps}))
    if settings.encoder is None or settings.llm is None or settings.eval_data is None:
        raise VlmError(f"{path}: a comparison needs encoder, llm and eval_data; the connectors come from --connector")
    if settings.stage != "stage-1":
        raise VlmError(f"{path}: connectors are compared by stage-1, the file says '{settings.stage}'; leave it out")
    check_files(settings)
    inputs = {"data": settings.data, "eval_data": settings.eval_data, "llm": settings.llm, "config": str(path)}
    for name, place in {**inputs, "image_folder": str(settings.images)}.items():
        for folder in (output / each for each in _REMOVED):
            if Path(place).resolve().is_relative_to(folder.resolve()):
                raise VlmError(
                    f"{name} '{place}' lies in '{folder}', which compare removes; move it, or give another --output"
                )
    return settings


def _builder(settings: TrainConfig) -> Build:
    return lambda recipe, seed: build_parts(replace(settings, connector=recipe, seed=seed))


def _held_out(settings: TrainConfig) -> HeldOut:
    from vlm_encoders.training.feeding.data import ConversationDataset

    unseen = settings.eval_data or ""
    return lambda processor: ConversationDataset(unseen, settings.images, processor)


def _fitting(recipes: list[str], build: Build, *, control: bool) -> list[str]:
    """Refuse a recipe that cannot train here before the first one does, and put the controls behind theirs."""
    from connectors.recipe import parse_recipe
    from vlm_encoders.budget import measure_connector
    from vlm_encoders.compare import pooling_control

    for recipe in recipes:
        parse_recipe(recipe)
    model, _ = build("linear", 0)
    spec, width = model.layout.connector_spec(model.encoder.token_spec), model.token_spec.dim
    found: list[str] = []
    for recipe in recipes:
        out, parameters, _ = measure_connector(recipe, spec, width)
        if not parameters:
            raise VlmError(f"connector '{recipe}' has no parameter that Stage 1 could train; end it with linear or mlp")
        found += [recipe, *filter(None, [pooling_control(spec, out.num_tokens) if control else None])]
    return list(dict.fromkeys(found))


def _print(rows: list[Compared]) -> None:
    headers = ("connector", "tokens", "parameters", "held-out loss", "accuracy", "spread", "seconds")
    cells = [
        (
            row.recipe,
            str(row.tokens),
            count(row.parameters),
            f"{row.loss:.3f}",
            f"{row.accuracy:.1%}",
            "-" if len(row.seeds) == 1 else f"{row.spread:.1%}",
            f"{row.seconds:.0f}",
        )
        for row in rows
    ]
    print_table(headers, cells, right=(1, 2, 3, 4, 5, 6))
