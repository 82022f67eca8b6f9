"""`vlm-encoders list`: the encoders, connectors, tilers and stages that have a name."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated

import typer

from connectors.errors import UnknownNameError, VlmError
from vlm_encoders.cli.console import count, print_table
from vlm_encoders.cli.values import read_range

if TYPE_CHECKING:
    from vlm_encoders.spec import EncoderSpec
    from vlm_encoders.tiling.presets import Preset

__all__ = ["list_names", "tiler_words"]

_COUNTS = {2: "two", 3: "three"}


def list_names(
    pattern: Annotated[str, typer.Argument(help="Shell pattern of the name, such as '*-l-14*'.")] = "*",
    family: Annotated[str | None, typer.Option(help="Only encoders of this family.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Only with so many tokens a view: 576, 500-800 or -800.")] = None,
    dim: Annotated[str | None, typer.Option(help="Only with tokens of this width: 1024, 768-1024 or 768-.")] = None,
    licence: Annotated[str | None, typer.Option(help="Only where the licence holds this word, such as mit.")] = None,
    connectors: Annotated[bool, typer.Option("--connectors", help="List connectors instead.")] = False,
    tilers: Annotated[bool, typer.Option("--tilers", help="List tilers of large images instead.")] = False,
    stages: Annotated[bool, typer.Option("--stages", help="List training stages instead.")] = False,
) -> None:
    """List encoders (or connectors, tilers, or stages), with what they cost; nothing is downloaded."""
    asked = {"--family": family, "--tokens": tokens, "--dim": dim, "--licence": licence}
    given = {option: value for option, value in asked.items() if value is not None}
    others = {"connectors": connectors, "tilers": tilers, "stages": stages}
    if chosen := [kind for kind, wanted in others.items() if wanted]:
        _list_others(chosen, pattern, list(given))
        return
    from vlm_encoders.registry import encoder_spec, list_encoders

    least_tokens, most_tokens = read_range(tokens)
    least_dim, most_dim = read_range(dim)
    everything = [encoder_spec(name) for name in list_encoders()]
    named = [encoder_spec(name) for name in list_encoders(pattern, family)]
    found = [
        spec
        for spec in named
        if _within(spec.token_spec().num_tokens, least_tokens, most_tokens)
        and _within(spec.dim, least_dim, most_dim)
        and (licence is None or licence.lower() in spec.licence.lower())
    ]
    if not found:
        words = " ".join(f"{option} {value}" for option, value in given.items())
        hint = _hint(named or everything, given)
        part = f"*{pattern.lower()}*"
        if not named and list_encoders(part):
            hint = f"did you mean '{part}'; {hint}"
        raise UnknownNameError(f"no encoder matches '{pattern}' {words}".rstrip() + f"; {hint}")
    headers = ("encoder", "family", "px", "tokens", "grid", "prefix", "width", "params", "licence")
    print_table(headers, [_row(spec) for spec in found], right=(3, 5, 6, 7))


def _list_others(kinds: list[str], pattern: str, given: list[str]) -> None:
    if len(kinds) > 1:
        raise VlmError(f"{' and '.join(f'--{kind}' for kind in kinds)} are {_COUNTS[len(kinds)]} lists; ask for one")
    kind = kinds[0]
    if given:
        raise VlmError(f"{kind} are not chosen by {' and '.join(given)}; leave that out, or --{kind}")
    {"connectors": _list_connectors, "tilers": _list_tilers, "stages": _list_stages}[kind](pattern)


def _within(number: int, least: int, most: int | None) -> bool:
    return number >= least and (most is None or number <= most)


def _row(spec: EncoderSpec) -> tuple[str, ...]:
    tokens = spec.token_spec()
    grid = "" if tokens.grid is None else f"{tokens.grid[0]}x{tokens.grid[1]}"
    size = f"{spec.image_size[0]}x{spec.image_size[1]}"
    parameters = count(spec.parameters) if spec.parameters else "-"
    cost = (str(tokens.num_tokens), grid, str(tokens.num_prefix), str(tokens.dim), parameters)
    return (spec.name, spec.family, size, *cost, spec.licence)


def _hint(specs: list[EncoderSpec], given: Collection[str]) -> str:
    """Say what there is to choose from by the options given, as the end of a sentence."""
    counts = [spec.token_spec().num_tokens for spec in specs]
    widths = [spec.dim for spec in specs]
    said = [f"families are {', '.join(sorted({spec.family for spec in specs}))}"]
    if "--tokens" in given:
        said.append(f"tokens are {min(counts)}-{max(counts)}")
    if "--dim" in given:
        said.append(f"widths are {min(widths)}-{max(widths)}")
    if "--licence" in given:
        said.append(f"licences are {', '.join(sorted({spec.licence or 'unknown' for spec in specs}))}")
    return "; ".join(said)


def _list_connectors(pattern: str) -> None:
    from connectors.base import list_connectors
    from vlm_encoders.report.connector_card import connector_card
    from vlm_encoders.report.connector_examples import ENCODER, LLM_DIM

    names = list_connectors(pattern)
    if not names:
        raise UnknownNameError(f"no connector matches '{pattern}'; known are {', '.join(list_connectors())}")
    cards = [connector_card(name) for name in names]
    headers = ("connector", "recipe", "tokens", "grid", "params", "FLOPs", "choose it")
    rows = [
        (
            card.name,
            card.example.recipe,
            str(card.out.num_tokens),
            "" if card.out.grid is None else f"{card.out.grid[0]}x{card.out.grid[1]}",
            count(card.parameters),
            count(card.flops),
            card.cls.choose,
        )
        for card in cards
    ]
    print_table(headers, rows, right=(2, 4, 5))
    others = [f"{card.name} of {card.example.encoder}" for card in cards if card.example.encoder != ENCODER]
    other = f"; {', '.join(others)}" if others else ""
    # On stderr, so that a pipe gets the table alone.
    typer.echo(f"for one view of {ENCODER}, 24x24 tokens of width 1024, and an LLM of width {LLM_DIM}{other}", err=True)


def tiler_words(preset: Preset) -> str:
    """Say what a tiler does, and what tells it from others of its class."""
    summary = (preset.tiler.__doc__ or "").splitlines()[0].rstrip(".")
    options = [(key, value) for key, value in preset.options if key not in {"tile_size", "grids", "patch"}]
    words = ", ".join(f"{key}={str(value).lower()}" for key, value in options)
    return f"{summary} ({words})" if words else summary


def _list_tilers(pattern: str) -> None:
    from vlm_encoders.tiling import PRESETS

    names = [name for name in PRESETS if fnmatchcase(name, pattern)]
    if not names:
        raise UnknownNameError(f"no tiler matches '{pattern}'; known are {', '.join(PRESETS)}")
    rows = []
    for name in names:
        preset = PRESETS[name]
        encoder = preset.encoder if preset.image_size is None else f"{preset.encoder} at {preset.image_size} px"
        rows.append((name, encoder, preset.connector, tiler_words(preset), preset.source))
    print_table(("tiler", "encoder", "connector", "what it does", "source"), rows)


def _list_stages(pattern: str) -> None:
    from vlm_encoders.cli.info_stage import part_words, rates
    from vlm_encoders.vlm.published import PUBLISHED

    found = [stage for name, stage in PUBLISHED.items() if fnmatchcase(name, pattern)]
    if not found:
        raise UnknownNameError(f"no stage matches '{pattern}'; known are {', '.join(PUBLISHED)}")
    rows = [(stage.name, *part_words(stage.policy), rates(stage.policy), stage.source) for stage in found]
    print_table(("stage", "encoder", "connector", "llm", "learning rates", "source"), rows)
