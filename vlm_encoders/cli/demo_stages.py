"""`vlm-encoders demo --stages`: Stage 1, then Stage 2, judged on held-out data as they go."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from connectors.errors import VlmError
from vlm_encoders.cli.console import print_table, quiet_libraries

if TYPE_CHECKING:
    from vlm_encoders.tiny.two_stages import Curve, Judged

__all__ = ["show_stages"]


def show_stages(output: Path, connector: str, steps: int | None, seed: int) -> None:
    """Train both stages, print how good the model was on the way, and draw the curves.

    Args:
        output: folder for data, checkpoints and the picture.
        connector: recipe of the connector.
        steps: of each stage; None for the demo's own.
        seed: of data, initial weights and order.

    Raises:
        VlmError: the recipe does not fit, or scikit-learn is not installed.
    """
    quiet_libraries()
    from vlm_encoders.tiny.two_stages import STAGE_STEPS, train_two_stages

    started = time.monotonic()
    lengths = STAGE_STEPS if steps is None else (steps, steps)
    typer.echo(
        f"Stage 1 trains the projector for {lengths[0]} steps, Stage 2 goes on with the whole LLM for {lengths[1]}."
    )
    curve = train_two_stages(output, connector, steps=lengths, seed=seed, on_judged=_say)
    typer.echo("")
    print_table(
        ("after", "step", "trained", "held-out loss", "held-out answers right"), _rows(curve), right=(1, 2, 3, 4)
    )
    (output / "stages.json").write_text(json.dumps(asdict(curve)) + "\n", encoding="utf-8")
    picture = output / "stages.svg"
    try:
        _draw(curve, picture)
    except VlmError as error:
        typer.echo(f"(no picture of the curves: {error})")
    else:
        typer.echo(f"the curves: {picture}")
    typer.echo(f"both stages took {time.monotonic() - started:.0f} s; all of it is in {output}")


def _say(judged: Judged) -> None:
    typer.echo(f"{judged.stage}, step {judged.step}: {judged.accuracy:.1%} of the held-out answers right", err=True)


def _rows(curve: Curve) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for judged in curve.judged:
        stage = "no training" if judged.step == 0 else judged.stage
        trained = "-" if judged.step == 0 else f"{curve.trained[judged.stage]:,}"
        rows.append((stage, str(judged.step), trained, f"{judged.loss:.3f}", f"{judged.accuracy:.1%}"))
    return rows


def _draw(curve: Curve, picture: Path) -> None:
    from vlm_encoders.report.training_figure import draw_training

    draw_training(
        picture,
        curve.losses,
        [(judged.step, judged.loss, judged.accuracy) for judged in curve.judged],
        [("Stage 1", 0), ("Stage 2", curve.boundary)],
        "The embedded parts: Stage 1 trains the projector, Stage 2 the LLM too",
    )
