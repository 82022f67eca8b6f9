"""`vlm-encoders budget`: what an image costs the LLM, before anything is downloaded."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connectors.errors import VlmError
from vlm_encoders.cli.console import count, print_table

if TYPE_CHECKING:
    from vlm_encoders.budget import TokenBudget
    from vlm_encoders.released_budget import ReleasedBudget

__all__ = ["budget", "print_budgets", "print_released"]

RECIPES = (
    "mlp",
    "pixel_shuffle:factor=2+mlp",
    "avg_pool:factor=2+mlp",
    "avg_pool:grid=3x3+mlp",
    "perceiver:queries=32+linear",
    "qformer:queries=32+linear",
)


def budget(
    encoder: Annotated[list[str] | None, typer.Option(help="Encoder name; may be given again.")] = None,
    connector: Annotated[list[str] | None, typer.Option(help="Connector recipe; may be given again.")] = None,
    tiler: Annotated[list[str] | None, typer.Option(help="whole, anyres or internvl; may be given again.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture whose size counts.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in px, in place of a picture.")] = None,
    llm_dim: Annotated[int, typer.Option(help="Width of the LLM.")] = 4096,
    released: Annotated[bool, typer.Option("--released", help="Add what released models would take.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare token budgets of encoders, connectors and tilers; nothing is downloaded."""
    from vlm_encoders.budget import token_budget
    from vlm_encoders.released_budget import released_budgets

    image_size = _image_size(image, size)
    rows = [
        (cutter, token_budget(name, recipe, tiler=cutter, image_size=image_size, llm_dim=llm_dim))
        for name in encoder or ["clip-vit-l-14-336"]
        for recipe in connector or RECIPES
        for cutter in tiler or ["whole"]
    ]
    if as_json:
        typer.echo(json.dumps([{"tiler": cutter, **asdict(row)} for cutter, row in rows], indent=2))
        return
    print_budgets(rows)
    if released:
        height, width = rows[0][1].image_size
        typer.echo("")
        typer.echo(f"Released models, on an image of {height}x{width} px:")
        print_released(released_budgets(rows[0][1].image_size))


def print_budgets(rows: list[tuple[str, TokenBudget]]) -> None:
    """Print token budgets as a table, one row each."""
    headers = ("encoder", "connector", "tiler", "views", "per view", "tokens", "trained", "encoder FLOPs")
    cells = [
        (
            row.encoder,
            row.connector,
            cutter,
            str(row.views),
            str(row.per_view),
            str(row.total),
            count(row.connector_parameters),
            "-" if row.encoder_flops is None else count(row.encoder_flops),
        )
        for cutter, row in rows
    ]
    print_table(headers, cells, right=(3, 4, 5, 6, 7))


def print_released(rows: list[ReleasedBudget]) -> None:
    """Print what one image costs in released models."""
    cells = [(row.name, str(row.views), str(row.per_view), str(row.total), row.source) for row in rows]
    print_table(("model", "views", "per view", "tokens", "source"), cells, right=(1, 2, 3))


def _image_size(image: Path | None, size: str | None) -> tuple[int, int] | None:
    if image is not None and size is not None:
        raise VlmError(f"both a picture ({image}) and a size ({size}) were given; give one")
    if image is not None:
        from vlm_encoders.preprocess import load_image

        picture = load_image(image)
        return picture.height, picture.width
    if size is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if match is None:
        raise VlmError(f"'{size}' is no size; write HEIGHTxWIDTH in px, such as 480x640")
    return int(match[1]), int(match[2])
