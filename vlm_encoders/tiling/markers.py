"""Text around an image and between its views: what tells the LLM where each view stands."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Markers"]


@dataclass(frozen=True)
class Markers:
    """Text that stands between runs of image tokens; "" stands for none.

    `{row}` and `{column}` are the place of a tile, from 1, `{row0}` and `{column0}` from 0; `{number}`
    counts the views.

    Attributes:
        start: in front of the image.
        end: behind it.
        tile: in front of each tile, where the image has several views.
        tile_end: behind each tile.
        between: between two tiles of a row.
        row_end: behind each row of tiles.
        thumbnail: in front of the thumbnail.
        thumbnail_end: behind it.
        single: in front of the one view of an image that is not tiled.
        single_end: behind it.
        token_row: between two rows of tokens of a view.
    """

    start: str = ""
    end: str = ""
    tile: str = ""
    tile_end: str = ""
    between: str = ""
    row_end: str = ""
    thumbnail: str = ""
    thumbnail_end: str = ""
    single: str = ""
    single_end: str = ""
    token_row: str = ""

    def __bool__(self) -> bool:
        """Say whether there is any text."""
        return any(getattr(self, field.name) for field in fields(self))
