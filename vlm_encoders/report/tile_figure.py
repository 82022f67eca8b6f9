"""A picture of how tilers cut an image: one panel a tiler, the image on its canvas, views in order, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from connectors.errors import VlmError
from vlm_encoders.report.tile_words import TilePanel, caption, headline
from vlm_encoders.report.token_map import check_drawing
from vlm_encoders.tiling.plan import Page

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["draw_tiles"]

ACROSS = 3
LONGEST = 1600
# Inches, from the outside in.
_EDGE, _GAP, _PANEL, _SIDE, _TALLEST, _THINNEST, _LINE, _HEAD = 0.25, 0.35, 4.6, 1.0, 3.8, 0.3, 0.155, 0.24
_SIDES = 4
_TILE, _PADDING, _HATCH = "#e8710a", "#30363d", "#6e7681"
_SMALLEST = 5.0
_DPI = 150


class _Place(NamedTuple):
    """A rectangle on the sheet, inches from its top left."""

    top: float
    left: float
    height: float
    width: float


def draw_tiles(picture: Image, panels: Sequence[TilePanel], path: Path) -> None:
    """Draw each panel's plan over the picture.

    Args:
        picture: the upright RGB image that the plans were made for, or one of its shape.
        panels: one a tiler.
        path: a .png, .svg, .pdf or .jpg file; one that is there is written over.

    Raises:
        VlmError: there is no panel, or the file cannot be written.
    """
    if not panels:
        raise VlmError("there is no plan to draw; give at least one tiler")
    check_drawing(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    small = picture.copy()
    small.thumbnail((LONGEST, LONGEST))
    across = min(ACROSS, len(panels))
    rows = [panels[start : start + across] for start in range(0, len(panels), across)]
    texts = [max(map(_text_height, row)) for row in rows]
    heights = [text + max(map(_body_height, row)) for text, row in zip(texts, rows, strict=True)]
    size = (2 * _EDGE + across * _PANEL + (across - 1) * _GAP, 2 * _EDGE + sum(heights) + _GAP * (len(rows) - 1))
    figure = Figure(figsize=size, facecolor="white")
    FigureCanvasAgg(figure)
    top = _EDGE
    for row, text, height in zip(rows, texts, heights, strict=True):
        for column, panel in enumerate(row):
            left = _EDGE + column * (_PANEL + _GAP)
            _write_head(figure, panel, top, left)
            _draw_pages(figure, small, panel, top + text, left)
        top += height + _GAP
    try:
        figure.savefig(path, dpi=_DPI)
    except OSError as error:
        raise VlmError(f"cannot write '{path}': {error}; give a file in a folder that exists and has space") from error


def _write_head(figure: Any, panel: TilePanel, top: float, left: float) -> None:
    _note(figure, top, left, headline(panel), 11, "bold")
    for number, line in enumerate(caption(panel)):
        _note(figure, top + _HEAD + number * _LINE, left, line, 8)


def _draw_pages(figure: Any, picture: Image, panel: TilePanel, top: float, left: float) -> None:
    main = _main_size(panel)
    _draw_page(figure, picture, panel, panel.plan.main_place, _Place(top, left, *main))
    left += main[1] + 0.15
    for place in _sides(panel):
        tall, wide = _fitted(panel.plan.pages[place].canvas, _SIDE, _SIDE)
        _draw_page(figure, picture, panel, place, _Place(top, left, tall, wide))
        _note(figure, top + tall + 0.03, left, panel.page_words(place), 6.5)
        top += tall + 2 * _LINE


def _note(figure: Any, top: float, left: float, words: str, size: float, weight: str = "normal") -> None:
    width, height = figure.get_size_inches()
    colour = "#424a53" if weight == "normal" else "black"
    figure.text(left / width, 1 - top / height, words, va="top", fontsize=size, fontweight=weight, color=colour)


def _draw_page(figure: Any, picture: Image, panel: TilePanel, place: int, at: _Place) -> None:
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches()
    page = panel.plan.pages[place]
    axes = figure.add_axes((at.left / width, 1 - (at.top + at.height) / height, at.width / width, at.height / height))
    rows, columns = page.canvas
    axes.add_patch(Rectangle((0, 0), columns, rows, facecolor=_PADDING, edgecolor=_HATCH, hatch="////", linewidth=0))
    top, left, tall, wide = panel.content(place)
    axes.imshow(picture, extent=(left, left + wide, top + tall, top), aspect="auto", zorder=1)
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=_TILE, linewidth=1.2)
    px = at.width / columns, at.height / rows
    if panel.counts.tiler.native:
        _draw_tokens(axes, page, panel.specs[place].grid, px)
    _draw_views(axes, page, px)
    _number_views(axes, panel, place, px)


def _draw_views(axes: Any, page: Page, px: tuple[float, float]) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    if page.num_views == 1:
        return
    points = 72 * min(page.view[1] * px[0], page.view[0] * px[1])
    boxes = [Rectangle((box.left, box.top), box.width, box.height) for box in page.boxes]
    for colour, line in (("white", 2.2), (_TILE, 1.2)):
        thin = min(line, points / 12)
        axes.add_collection(PatchCollection(boxes, facecolor="none", edgecolor=colour, linewidth=thin, zorder=3))
    if page.overlap:
        # Where views overlap the tint lies twice.
        axes.add_collection(PatchCollection(boxes, facecolor=_TILE, edgecolor="none", alpha=0.18, zorder=2))


def _number_views(axes: Any, panel: TilePanel, place: int, px: tuple[float, float]) -> None:
    page, count = panel.plan.pages[place], panel.page_tokens[place]
    last = panel.first_view(place) + page.num_views - 1
    # Where views overlap, numbers stand as near to each other as the views' starts.
    wide, tall = (72 * (side - page.overlap) * scale for side, scale in zip(page.view[::-1], px, strict=True))
    size = min(13.0, 0.42 * tall, 1.1 * wide / len(str(last)))
    if size < _SMALLEST:
        return
    tokens = "" if count is None else f"{count} token{'s' * (count > 1)}"
    counted = min(0.62 * size, 1.1 * wide / len(tokens)) if tokens else 0.0
    for number, box in enumerate(page.boxes, panel.first_view(place)):
        middle = (box.left + box.width / 2, box.top + box.height / 2)
        _write(axes, middle, str(number), size, "bottom" if counted >= _SMALLEST else "center")
        if counted >= _SMALLEST:
            _write(axes, middle, tokens, counted, "top")


def _write(axes: Any, at: tuple[float, float], words: str, size: float, vertical: str) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=0.22 * size, foreground="black")]
    how = {"ha": "center", "va": vertical, "color": "white", "path_effects": halo, "zorder": 4}
    axes.text(*at, words, fontsize=size, fontweight="bold", **how)


def _draw_tokens(axes: Any, page: Page, grid: tuple[int, int] | None, px: tuple[float, float]) -> None:
    """Draw the tokens of views that do not overlap as a light grid, where its lines would not run together."""
    height, width = page.canvas
    if grid is None or page.overlap:
        return
    rows, columns = (tokens * views for tokens, views in zip(grid, page.grid, strict=True))
    how = {"colors": "white", "alpha": 0.5, "linewidth": 0.35, "zorder": 2}
    if 72 * height * px[1] / rows >= 2:
        axes.hlines([height * row / rows for row in range(1, rows)], 0, width, **how)
    if 72 * width * px[0] / columns >= 2:
        axes.vlines([width * column / columns for column in range(1, columns)], 0, height, **how)


def _text_height(panel: TilePanel) -> float:
    return _HEAD + _LINE * len(caption(panel)) + 0.06


def _body_height(panel: TilePanel) -> float:
    stack = sum(_fitted(panel.plan.pages[place].canvas, _SIDE, _SIDE)[0] + 2 * _LINE for place in _sides(panel))
    return max(_main_size(panel)[0], stack)


def _main_size(panel: TilePanel) -> tuple[float, float]:
    across = _PANEL - _SIDE - 0.15 if _sides(panel) else _PANEL
    return _fitted(panel.plan.canvas, _TALLEST, across)


def _fitted(canvas: tuple[int, int], tallest: float, widest: float) -> tuple[float, float]:
    """Fit a canvas into a field, inches; what would be a line is drawn thicker than it is."""
    scale = min(tallest / canvas[0], widest / canvas[1])
    return max(canvas[0] * scale, _THINNEST), max(canvas[1] * scale, _THINNEST)


def _sides(panel: TilePanel) -> list[int]:
    """Choose the pages that are drawn small beside the main one."""
    others = [place for place in range(len(panel.plan.pages)) if place != panel.plan.main_place]
    return others[:_SIDES]
