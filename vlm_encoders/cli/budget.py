"""`vlm-encoders budget`: what an image costs the LLM, before anything is downloaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlm_encoders.cli.console import count, print_table
from vlm_encoders.cli.values import preset_of, read_image_size

if TYPE_CHECKING:
    from vlm_encoders.budget import TokenBudget
    from vlm_encoders.released_budget import ReleasedBudget
    from vlm_encoders.spec import EncoderSpec

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
    tiler: Annotated[
        list[str] | None,
        typer.Option(
            help="Tiler with its options, such as internvl:max_tiles=6; may be given again. Without --encoder it "
            "comes with the pair that it was released with; 'vlm-encoders list --tilers' lists them."
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Picture whose size counts.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in px, in place of a picture.")] = None,
    llm_dim: Annotated[int, typer.Option(help="Width of the LLM.")] = 4096,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="The most tokens that the picture may cost, marks included.")
    ] = None,
    released: Annotated[bool, typer.Option("--released", help="Add what released models would take.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare token budgets of encoders, connectors and tilers; nothing is downloaded."""
    from vlm_encoders.budget import token_budget
    from vlm_encoders.released_budget import released_budgets

    image_size = read_image_size(image, size)
    rows = [
        (
            cutter,
            token_budget(name, recipe, tiler=cutter, image_size=image_size, llm_dim=llm_dim, max_tokens=max_tokens),
        )
        for name, recipe, cutter in _combinations(encoder, connector, tiler)
    ]
    if as_json:
        typer.echo(json.dumps([{"tiler": cutter, **asdict(row)} for cutter, row in rows], indent=2))
        return
    print_budgets(rows)
    if image_size is None:
        typer.echo("")
        typer.echo("For an image of the encoder's own view; give --size HEIGHTxWIDTH or --image for another.")
    if released:
        height, width = rows[0][1].image_size
        typer.echo("")
        typer.echo(f"Released models, on an image of {height}x{width} px:")
        print_released(released_budgets(rows[0][1].image_size))


def _combinations(
    encoders: list[str] | None, recipes: list[str] | None, tilers: list[str] | None
) -> list[tuple[str | EncoderSpec, str, str]]:
    """Give (encoder, recipe, tiler) of each row: what was asked for, or what a tiler was released with."""
    if tilers and not encoders:
        pairs = [(preset_of(name), name) for name in tilers]
        return [(preset.spec(), recipe, name) for preset, name in pairs for recipe in recipes or [preset.connector]]
    return [
        (name, recipe, tiler)
        for name in encoders or ["clip-vit-l-14-336"]
        for recipe in recipes or RECIPES
        for tiler in tilers or ["whole"]
    ]


def print_budgets(rows: list[tuple[str, TokenBudget]]) -> None:
    """Print token budgets as a table, one row each."""
    headers = ["encoder", "connector", "tiler", "views", "per view", "tokens", "trained", "encoder FLOPs"]
    cells = [
        [
            row.encoder,
            row.connector,
            cutter,
            str(row.views),
            str(row.per_view),
            str(row.total),
            count(row.connector_parameters),
            "-" if row.encoder_flops is None else count(row.encoder_flops),
        ]
        for cutter, row in rows
    ]
    _add_marks(headers, cells, [row.markers for _, row in rows])
    print_table(headers, cells, right=range(3, len(headers)))


def print_released(rows: list[ReleasedBudget]) -> None:
    """Print what one image costs in released models."""
    headers = ["model", "views", "per view", "tokens", "source"]
    cells = [[row.name, str(row.views), str(row.per_view), str(row.total), row.source] for row in rows]
    _add_marks(headers, cells, [row.markers for row in rows])
    print_table(headers, cells, right=range(1, len(headers) - 1))


def _add_marks(headers: list[str], rows: list[list[str]], markers: list[int]) -> None:
    """Put a column of marks behind that of tokens, where there are any."""
    if not any(markers):
        return
    place = headers.index("tokens") + 1
    headers.insert(place, "marks")
    for row, number in zip(rows, markers, strict=True):
        row.insert(place, str(number))
