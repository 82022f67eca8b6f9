"""The sheet of answers shows its pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from connectors.errors import VlmError
from vlm_encoders.report.answers import AnswerCard, draw_answers


def test_every_card_is_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "red.png"
    Image.new("RGB", (64, 64), (255, 0, 0)).save(picture)
    cards = [AnswerCard(picture, "what?", "7", (("before", "x" * 60), ("after", "7")))] * 5
    draw_answers(cards, tmp_path / "sheet.png", "answers")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    red = (pixels == (255, 0, 0)).all(-1)
    half = len(red) // 2
    assert red[:half].sum() > 3.5 * red[half:].sum() > 0


def test_no_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VlmError, match="no answer to draw"):
        draw_answers([], tmp_path / "sheet.png", "answers")
