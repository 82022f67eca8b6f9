"""Scenes of handwritten digits on a 4x4 board, and questions about them.

A scene is a 64x64 px picture; its 16 cells are blank or hold one digit image of
scikit-learn's `load_digits` (8x8 px, 17 levels of ink).

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from connectors.errors import VlmError

if TYPE_CHECKING:
    from PIL import Image

Split: TypeAlias = Literal["train", "held_out"]
Question: TypeAlias = Literal["read", "row", "count"]

QUESTIONS: tuple[Question, ...] = get_args(Question)
ROWS = COLUMNS = 4
CELL_SIDE = 16
SIDE = ROWS * CELL_SIDE
DIGIT_SIDE = 14
BLANK = -1
PAPER = 255
LINE = 205
FULL_INK = 16

_HELD_OUT = 397
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Scene:
    """What stands on the 16 cells, row by row.

    Attributes:
        cells: The digit of each cell, or `BLANK`.
        sources: The digit image of each cell as an index into `load_digits`, or `BLANK`.
    """

    cells: tuple[int, ...]
    sources: tuple[int, ...]


@cache
def _load() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise VlmError("the demo data needs scikit-learn; pip install 'vlm-encoders[demo]'") from error
    digits = load_digits()
    return digits.images.astype(np.float32), digits.target.astype(np.int64)


def digit_images() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Give all digit images (1797, 8, 8), ink from 0 to 16, and their digits.

    Raises:
        VlmError: scikit-learn is not installed.
    """
    images, digits = _load()
    return images.copy(), digits.copy()


def split_indices(split: Split) -> npt.NDArray[np.int64]:
    """Give the digit images of a split, as indices into `load_digits`.

    The 397 held-out images are drawn once with a fixed seed; no training of the
    embedded encoder sees them.

    Raises:
        VlmError: The split has another name, or scikit-learn is not installed.
    """
    if split not in get_args(Split):
        raise VlmError(f"unknown split {split!r}; use 'train' or 'held_out'")
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(_load()[1]))
    return np.sort(order[:_HELD_OUT] if split == "held_out" else order[_HELD_OUT:])


def random_cells(rng: np.random.Generator) -> tuple[int, ...]:
    """Put two to four digits on random cells."""
    digits = rng.integers(0, 10, size=rng.integers(2, 5))
    cells = np.full(ROWS * COLUMNS, BLANK)
    cells[rng.choice(len(cells), size=len(digits), replace=False)] = digits
    return tuple(cells.tolist())


def random_scene(split: Split, rng: np.random.Generator) -> Scene:
    """Make a scene of digit images of one split.

    Raises:
        VlmError: The split has another name, or scikit-learn is not installed.
    """
    indices = split_indices(split)
    digits = _load()[1][indices]
    cells = random_cells(rng)
    sources = (BLANK if digit == BLANK else int(rng.choice(indices[digits == digit])) for digit in cells)
    return Scene(cells, tuple(sources))


def draw(scene: Scene) -> "Image.Image":
    """Draw a scene as an RGB picture of 64x64 px: dark ink on ruled white paper."""
    from PIL import Image

    picture = np.full((SIDE, SIDE), PAPER, dtype=np.uint8)
    picture[::CELL_SIDE] = picture[:, ::CELL_SIDE] = LINE
    for place, source in enumerate(scene.sources):
        if source != BLANK:
            paper = np.uint8(PAPER - np.rint(_load()[0][source] * (PAPER / FULL_INK)))
            digit = Image.fromarray(paper).resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BILINEAR)
            row, column = (CELL_SIDE * index + 1 for index in divmod(place, COLUMNS))
            picture[row : row + DIGIT_SIDE, column : column + DIGIT_SIDE] = np.asarray(digit)
    return Image.fromarray(picture).convert("RGB")


def ask(question: Question, cells: Sequence[int], rng: np.random.Generator) -> tuple[str, str]:
    """Word a question about the cells and its answer.

    Raises:
        VlmError: The question has another name.
    """
    if question == "read":
        digits = [str(cell) for cell in cells if cell != BLANK]
        return "Which digits do you see, in reading order?", " ".join(digits)
    rows = np.reshape(cells, (ROWS, COLUMNS))
    if question == "count":
        return "How many digits are in each row?", " ".join(map(str, (rows != BLANK).sum(1)))
    if question == "row":
        row = int(rng.choice(np.flatnonzero((rows != BLANK).any(1))))
        return f"What is in row {row + 1}?", " ".join("blank" if cell == BLANK else str(cell) for cell in rows[row])
    raise VlmError(f"unknown question {question!r}; use one of {', '.join(QUESTIONS)}")
