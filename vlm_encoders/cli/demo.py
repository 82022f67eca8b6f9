"""`vlm-encoders demo`: the whole way on the embedded parts, with no network."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connectors.errors import VlmError
from vlm_encoders.cli.budget import print_budgets, print_released
from vlm_encoders.cli.claim import claim_folder
from vlm_encoders.cli.console import print_table, quiet_libraries
from vlm_encoders.cli.demo_stages import show_stages

if TYPE_CHECKING:
    from vlm_encoders.training.evaluate import EvalResult
    from vlm_encoders.vlm.stages import Part

__all__ = ["demo"]

SHOWN = 8
STEPS = 400
NEXT = """\
Next, with your own images and real parts:
  vlm-encoders budget --encoder siglip-so400m-14-384 --connector mlp --connector pixel_shuffle:factor=3+mlp \\
      --tiler whole --tiler anyres --image YOUR_PHOTO.jpg
  vlm-encoders train --encoder clip-vit-l-14-336 --connector mlp --llm Qwen/Qwen2.5-0.5B-Instruct \\
      --data YOUR_CONVERSATIONS.json --image-folder YOUR_IMAGES --output runs/stage1
  vlm-encoders generate runs/stage1/model YOUR_PHOTO.jpg --prompt "What is in this picture?\""""


def demo(
    output: Annotated[Path, typer.Option(help="Folder for data, checkpoints and the model.")] = Path("runs/demo"),
    connector: Annotated[str, typer.Option(help="Connector recipe to train.")] = "mlp",
    steps: Annotated[int | None, typer.Option(help="Steps of Stage 1, 400 when left out.")] = None,
    seed: Annotated[int, typer.Option(help="Of data, initial weights and order.")] = 0,
    stages: Annotated[bool, typer.Option("--stages", help="Stage 1, then Stage 2, and the curves of both.")] = False,
) -> None:
    """Show the whole way in minutes: budgets, Stage 1, accuracy, a saved model that answers."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    claim_folder(output, "demo", ("data", "train", "model", "stage-1", "stage-2"))
    if stages:
        show_stages(output, connector, steps, seed)
        return
    started = time.monotonic()
    quiet_libraries()
    _title("1. What a picture costs the LLM")
    _show_budgets()
    _title(f"2. Plug the embedded encoder into the embedded LLM by '{connector}', for Stage 1")
    _train_and_compare(output, connector, STEPS if steps is None else steps, seed)
    _title("5. A fresh process loads the saved model and answers about a picture file")
    _ask_in_fresh_process(output)
    typer.echo(f"\nThe whole way took {time.monotonic() - started:.0f} s; all of it is in {output}.\n\n{NEXT}")


def _title(text: str) -> None:
    typer.echo(f"\n{text}\n{'=' * len(text)}")


def _show_budgets() -> None:
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise VlmError("the demo data needs scikit-learn; pip install 'vlm-encoders[demo]'") from error
    from vlm_encoders.budget import token_budget
    from vlm_encoders.released_budget import released_budgets
    from vlm_encoders.tiny.stage1 import RECIPES, TINY_ENCODER

    typer.echo("The embedded encoder, a 64x64 px picture, an LLM of width 128:")
    print_budgets([("whole", token_budget(TINY_ENCODER, recipe, llm_dim=128)) for recipe in RECIPES])
    height, width = load_sample_image("china.jpg").shape[:2]
    typer.echo(f"\nReleased models, on scikit-learn's photo china.jpg of {height}x{width} px:")
    print_released(released_budgets((height, width)))


def _train_and_compare(output: Path, recipe: str, steps: int, seed: int) -> None:
    from vlm_encoders.tiny.stage1 import build_tiny, tiny_run
    from vlm_encoders.training.evaluate import exact_match
    from vlm_encoders.training.trainer import Trainer
    from vlm_encoders.vlm.checkpoint import part_hashes
    from vlm_encoders.vlm.stages import STAGE_1, apply_stage

    model, processor = build_tiny(recipe, seed=seed)
    run = tiny_run(output, recipe, steps=steps, seed=seed)
    apply_stage(model, STAGE_1.with_lr(run.config.learning_rate))
    typer.echo(str(model.describe()))
    train_data, held_out = run.load(processor)
    before, hashes = exact_match(model, processor, held_out, batch_size=48), part_hashes(model)
    _title(f"3. Stage 1: the projector alone, {len(train_data)} pictures, {steps} steps")
    result = Trainer(model, processor, train_data, run.config).fit()
    typer.echo(
        f"{result.steps} steps in {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s, "
        f"loss {result.losses[0]:.2f} -> {result.losses[-1]:.3f}"
    )
    _title("4. What it learned, on handwriting that no training has seen")
    after = exact_match(model, processor, held_out, batch_size=48)
    _show_accuracy(before, after)
    _show_answers(before, after, run.held_out.parent, output)
    _show_moved(hashes, part_hashes(model))
    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")


def _show_accuracy(before: EvalResult, after: EvalResult) -> None:
    rows = []
    for kind in ("read", "row", "count", ""):
        name = kind or "all questions"
        rows.append((name, *(f"{_accuracy(result, kind):.1%}" for result in (before, after))))
    print_table(("exact match", "before", "after"), rows, right=(1, 2))


def _accuracy(result: EvalResult, kind: str) -> float:
    chosen = [prediction for prediction in result.predictions if prediction.id.endswith(kind)]
    return sum(prediction.answer == prediction.expected for prediction in chosen) / len(chosen)


def _show_answers(before: EvalResult, after: EvalResult, pictures: Path, output: Path) -> None:
    from vlm_encoders.report.answers import AnswerCard, draw_answers

    pairs = list(zip(before.predictions, after.predictions, strict=True))[:SHOWN]
    typer.echo("")
    rows = [(new.question, new.expected, old.answer or "(nothing)", new.answer) for old, new in pairs]
    print_table(("question", "true", "before", "after"), rows)
    cards = []
    for old, new in pairs:
        image = pictures / "images" / f"{new.id.rpartition('-')[0]}.png"
        cards.append(AnswerCard(image, new.question, new.expected, (("before", old.answer), ("after", new.answer))))
    sheet = output / "answers.png"
    try:
        draw_answers(cards, sheet, "Answers before and after Stage 1, on held-out handwriting")
    except VlmError as error:
        typer.echo(f"(no picture of the answers: {error})")
    else:
        typer.echo(f"these answers as a picture: {sheet}")


def _show_moved(before: Mapping[Part, str], after: Mapping[Part, str]) -> None:
    typer.echo("")
    rows = [
        (part, digest[:16], after[part][:16], "bit-identical" if digest == after[part] else "moved")
        for part, digest in before.items()
    ]
    print_table(("part", "SHA-256 before", "SHA-256 after", "weights"), rows)


def _ask_in_fresh_process(output: Path) -> None:
    picture = min((output / "data" / "held_out" / "images").glob("*.png"))
    question = "Which digits do you see, in reading order?"
    arguments = ["generate", str(output / "model"), str(picture), "--prompt", question]
    typer.echo(f'$ vlm-encoders generate {output / "model"} {picture} --prompt "{question}"')
    process = subprocess.run(  # noqa: S603 - our own command, on the files just written
        [sys.executable, "-m", "vlm_encoders", *arguments], capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise VlmError(f"the fresh process failed: {process.stderr.strip()[-400:]}")
    typer.echo(process.stdout.strip())
