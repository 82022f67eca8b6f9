"""A sheet of pictures with their questions and answers, before and after training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from connectors.errors import VlmError

__all__ = ["AnswerCard", "draw_answers"]

COLUMNS = 4
RIGHT, WRONG = "#1a7f37", "#b42318"


@dataclass(frozen=True)
class AnswerCard:
    """One picture of the sheet.

    Attributes:
        image: the picture's file.
        question: what was asked.
        expected: the right answer.
        answers: (when, answer) pairs, such as ("before", "4 4") and ("after", "3 5 1").
    """

    image: Path
    question: str
    expected: str
    answers: tuple[tuple[str, str], ...]


def draw_answers(cards: Sequence[AnswerCard], path: Path, title: str) -> None:
    """Draw the cards to a picture file.

    Args:
        cards: what to draw, row by row.
        path: a .png or .svg file.
        title: of the sheet.

    Raises:
        VlmError: there is no card, or matplotlib is not installed.
    """
    if not cards:
        raise VlmError("there is no answer to draw; pass at least one card")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise VlmError("pictures need matplotlib; pip install 'vlm-encoders[report]'") from error
    from PIL import Image

    rows = math.ceil(len(cards) / COLUMNS)
    figure = Figure(figsize=(2.9 * COLUMNS, 3.7 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for place in axes:
        place.axis("off")
    for place, card in zip(axes, cards, strict=False):
        with Image.open(card.image) as picture:
            place.imshow(picture.convert("RGB"), interpolation="nearest")
        place.set_title(card.question, fontsize=9)
        for line, (when, text) in enumerate(card.answers):
            color = RIGHT if text == card.expected else WRONG
            shown = text if len(text) <= 28 else f"{text[:27]}..."
            height = -0.06 - 0.1 * line
            place.text(0, height, f"{when}: {shown or '(nothing)'}", color=color, fontsize=9, transform=place.transAxes)
        height = -0.06 - 0.1 * len(card.answers)
        place.text(0, height, f"true: {card.expected}", fontsize=9, transform=place.transAxes)
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.15)
