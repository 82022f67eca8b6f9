"""Pictures beside maps of their tokens, one column an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from connectors.errors import VlmError
from connectors.tokens import Grid, VisualTokens
from vlm_encoders.preprocess import load_image

__all__ = ["TokenColumn", "check_drawing", "draw_token_maps", "token_colours"]

KINDS = (".png", ".svg", ".pdf", ".jpg")
CLIPPED = 2.0
LONGEST = 640
WRAPPED = 40
_INSTALL = "pictures need matplotlib; pip install 'vlm-encoders[report]'"


@dataclass(frozen=True, eq=False)
class TokenColumn:
    """What one encoder made of all pictures.

    Attributes:
        name: the encoder's.
        visual: tokens (B, N, D), one picture after another.
        resize: how a picture became a view, as in `EncoderSpec`.
        view: (height, width) of a view, px.
    """

    name: str
    visual: VisualTokens
    resize: str
    view: Grid


def check_drawing(path: Path) -> None:
    """Refuse a file that cannot be drawn, before anything is encoded.

    Raises:
        VlmError: its folder is missing, its ending is no picture's, or matplotlib is not installed.
    """
    if path.suffix.lower() not in KINDS:
        raise VlmError(f"'{path}' does not end like a picture; use {', '.join(KINDS)}")
    if not path.absolute().parent.is_dir():
        raise VlmError(f"the folder of '{path}' does not exist; make it first")
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise VlmError(_INSTALL) from error


def draw_token_maps(images: Sequence[Path], columns: Sequence[TokenColumn], path: Path) -> None:
    """Draw each picture beside the maps of its tokens: a row a picture, a column an encoder.

    Args:
        images: the pictures' files, in the order of the tokens.
        columns: what the encoders made of them.
        path: a .png, .svg, .pdf or .jpg file.

    Raises:
        VlmError: an encoder's tokens have no grid, or the file cannot be written.
    """
    check_drawing(path)
    for column in columns:
        if column.visual.grid is None:
            raise VlmError(
                f"{column.name}: its {column.visual.tokens.shape[1]} tokens have no grid and so no map; leave --show "
                "out, or join encoders by fuse=channel"
            )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * (1 + len(columns)), 3.4 * len(images) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(len(images), 1 + len(columns), squeeze=False)
    for row, image in enumerate(images):
        picture = load_image(image)
        picture.thumbnail((LONGEST, LONGEST))
        _place(places[row][0], picture, _short(Path(image).name, WRAPPED))
        _frame(places[row][0], picture, columns)
        for column, place in zip(columns, places[row][1:], strict=True):
            _draw_map(place, column, row)
    figure.supxlabel(
        "colours: the first three principal components of each map's own tokens; "
        "dashed: the part of the picture that a view by crop shows",
        fontsize=8,
    )
    try:
        figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.15)
    except OSError as error:
        raise VlmError(f"cannot write '{path}': {error}; give a file in a folder that exists and has space") from error


def token_colours(tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Colour tokens (N, D) by their first three principal components: (N, 3) from 0 to 1.

    Each component is stretched from its 2nd to its 98th percentile, and its sign is such that
    the largest weight is positive, so that the same tokens always get the same colours. A
    component without spread is grey.
    """
    centred = tokens.astype(np.float64)
    centred -= centred.mean(axis=0)
    _, strengths, axes = np.linalg.svd(centred, full_matrices=False)
    colours = np.full((len(tokens), 3), 0.5)
    floor = 1e-9 * max(float(strengths[0]), 1e-30) if len(strengths) else 0.0
    for component, axis in enumerate(axes[:3]):
        if strengths[component] <= floor or strengths[0] == 0:
            continue
        values = centred @ (axis * np.sign(axis[np.abs(axis).argmax()]))
        low, high = np.percentile(values, (CLIPPED, 100 - CLIPPED))
        if high > low:
            colours[:, component] = np.clip((values - low) / (high - low), 0, 1)
    return colours


def _draw_map(place: Any, column: TokenColumn, row: int) -> None:
    rows, columns = column.visual.grid or (1, 1)
    tokens = column.visual.tokens[row].detach().float().cpu().numpy()
    name = _short(fill(column.name, WRAPPED, break_on_hyphens=False), 3 * WRAPPED)
    title = f"{name}\n{rows}x{columns} grid, {len(tokens)} tokens, view by {column.resize}"
    height, width = column.view
    # Swin's last tokens may reach past the view, so the map has the view's shape, not the grid's.
    _place(place, token_colours(tokens).reshape(rows, columns, 3), title, extent=(0, width, height, 0))


def _frame(place: Any, picture: Any, columns: Sequence[TokenColumn]) -> None:
    """Draw a frame around what a centre crop leaves of the picture."""
    from matplotlib.patches import Rectangle

    for height, width in dict.fromkeys(column.view for column in columns if column.resize == "crop"):
        scale = min(picture.height / height, picture.width / width)
        rows, across = height * scale, width * scale
        if rows < picture.height - 1 or across < picture.width - 1:
            corner = ((picture.width - across) / 2 - 0.5, (picture.height - rows) / 2 - 0.5)
            place.add_patch(Rectangle(corner, across, rows, fill=False, edgecolor="red", linestyle="--"))


def _place(place: Any, picture: Any, title: str, **options: Any) -> None:
    place.imshow(picture, interpolation="nearest", **options)
    place.set_title(title, fontsize=9)
    place.axis("off")


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
