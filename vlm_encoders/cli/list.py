"""`vlm-encoders list`: the encoders and connectors that have a name."""

from __future__ import annotations

from typing import Annotated

import typer

from connectors.errors import UnknownNameError
from vlm_encoders.cli.console import count, print_table

__all__ = ["list_names"]


def list_names(
    pattern: Annotated[str, typer.Argument(help="Shell pattern of the name, such as '*-l-14*'.")] = "*",
    family: Annotated[str | None, typer.Option(help="Only encoders of this family.")] = None,
    connectors: Annotated[bool, typer.Option("--connectors", help="List connectors instead.")] = False,
) -> None:
    """List encoders (or connectors), with what they cost; nothing is downloaded."""
    if connectors:
        from connectors.base import list_connectors

        names = list_connectors(pattern)
        if not names:
            raise UnknownNameError(f"no connector matches '{pattern}'; known are {', '.join(list_connectors())}")
        typer.echo("\n".join(names))
        return
    from vlm_encoders.registry import encoder_spec, list_encoders

    rows = []
    for name in list_encoders(pattern, family):
        spec = encoder_spec(name)
        tokens = spec.token_spec()
        grid = "" if tokens.grid is None else f"{tokens.grid[0]}x{tokens.grid[1]}"
        size = f"{spec.image_size[0]}x{spec.image_size[1]}"
        cost = (str(tokens.num_tokens), grid, str(tokens.num_prefix), str(tokens.dim), count(spec.parameters))
        rows.append((name, spec.family, size, *cost, spec.licence))
    if not rows:
        known = ", ".join(sorted({encoder_spec(name).family for name in list_encoders()}))
        raise UnknownNameError(f"no encoder matches '{pattern}' in {family or 'any family'}; families are {known}")
    headers = ("encoder", "family", "px", "tokens", "grid", "prefix", "width", "params", "licence")
    print_table(headers, rows, right=(3, 5, 6, 7))
