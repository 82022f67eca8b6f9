"""What the sub-commands print: tables, and the libraries kept quiet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import typer

__all__ = ["count", "print_card", "print_table", "quiet_libraries"]


def print_card(card: Mapping[str, str]) -> None:
    """Print words in two columns: what is told, and what it is."""
    for key, value in card.items():
        typer.echo(f"{key + ':':<15}{value}")


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print rows in columns as wide as they need, never cut, so that they can be piped.

    Args:
        headers: a title for each column.
        rows: the cells, as text.
        right: indices of the columns to align at the right.
    """
    lines = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for number, line in enumerate(lines):
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        typer.echo("  ".join(cells).rstrip())
        if number == 0:
            typer.echo("  ".join("-" * width for width in widths))


def count(number: float) -> str:
    """Write a large number shortly: 303.2M, 4.1k."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:g}"


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notices out of the output."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("timm", "open_clip", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
