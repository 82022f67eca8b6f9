"""An image's part of the prompt: runs of image tokens, and marker text between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from connectors.tokens import TokenSpec
from vlm_encoders.tiling.markers import Markers
from vlm_encoders.tiling.plan import Page, TilePlan

__all__ = ["Piece", "lay_out"]

Piece: TypeAlias = str | int
"""A part of an image's prompt: marker text, or a run of so many image tokens."""


def lay_out(markers: Markers, plan: TilePlan, specs: Sequence[TokenSpec], joined: Sequence[int | None]) -> list[Piece]:
    """Lay the prompt of one image out, page by page.

    Args:
        markers: the text.
        plan: the image's views, as the connector reads them.
        specs: the tokens of a view of each page.
        joined: the tokens of each page whose views are read as one map; None where they follow
            one another.
    """
    pieces: list[Piece] = [markers.start]
    number = 0
    for place, (page, spec, length) in enumerate(zip(plan.pages, specs, joined, strict=True)):
        run = _rows(markers, spec) if length is None else [length]
        if plan.num_views == 1:
            pieces += [markers.single, *run, markers.single_end]
        elif length is not None:
            pieces += run
        elif place == plan.thumbnail_place:
            pieces += [markers.thumbnail.format(number=number), *run, markers.thumbnail_end.format(number=number)]
            number += 1
        else:
            pieces += _tiles(markers, page, run, number)
            number += page.num_views
    return _merged([*pieces, markers.end])


def _rows(markers: Markers, spec: TokenSpec) -> list[Piece]:
    if not markers.token_row or spec.grid is None:
        return [spec.num_tokens]
    rows, columns = spec.grid
    others: list[Piece] = [markers.token_row, columns]
    return [columns, *others * (rows - 1)]


def _tiles(markers: Markers, page: Page, run: Sequence[Piece], number: int) -> Iterator[Piece]:
    columns = page.grid[1]
    for place in range(page.num_views):
        row, column = divmod(place, columns)
        where = {"row": row + 1, "column": column + 1, "row0": row, "column0": column, "number": number + place}
        yield markers.tile.format(**where)
        yield from run
        yield markers.tile_end.format(**where)
        yield markers.row_end if column == columns - 1 else markers.between


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Join what lies side by side, and leave out what is empty."""
    merged: list[Piece] = []
    for piece in (piece for piece in pieces if piece):
        if merged and type(merged[-1]) is type(piece):
            merged[-1] += piece  # type: ignore[operator]
        else:
            merged.append(piece)
    return merged
