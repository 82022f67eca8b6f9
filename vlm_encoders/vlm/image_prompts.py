"""The images of a sample: their plans, their part of the prompt, and their views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from connectors.errors import VlmError
from vlm_encoders.preprocess import ImageLike
from vlm_encoders.tiling.counts import Budgets, TokenCounts, budgets_of, is_special, marks_of
from vlm_encoders.tiling.layout import Piece
from vlm_encoders.tiling.markers import Markers
from vlm_encoders.tiling.pixels import TilePixels
from vlm_encoders.tiling.plan import Size, TilePlan
from vlm_encoders.tiling.tiler import Tiler
from vlm_encoders.vlm.batch import join_views
from vlm_encoders.vlm.chat import Message
from vlm_encoders.vlm.placeholders import check_places

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_encoders.preprocess.load import Levels

__all__ = ["ImagePrompts", "MarkCounter", "PlannedImage", "check_markers"]


class PlannedImage(NamedTuple):
    """An image of a sample: its levels, its plan, and its part of the prompt."""

    levels: Levels
    plan: TilePlan
    pieces: list[Piece]


class ImagePrompts:
    """Plans the images of a sample, and writes them into its text; it holds no weights.

    Args:
        pixels: makes the views.
        counts: of encoder, connector and tiler.
        image_token: what stands in the text for a run of image tokens.
    """

    def __init__(self, pixels: TilePixels, counts: TokenCounts, image_token: str) -> None:
        self.pixels = pixels
        self.counts = counts
        self.image_token = image_token

    def plan(self, images: Sequence[ImageLike], max_tokens: Budgets) -> list[PlannedImage]:
        """Load and plan images, each within its budget.

        Raises:
            VlmError: an image cannot be read, the budgets are not those of the images, or no plan
                stays within one.
        """
        planned = []
        for image, most in zip(images, budgets_of(max_tokens, len(images)), strict=True):
            levels = self.pixels.load(image)
            plan = self.counts.plan(self.pixels.size(levels), most)
            planned.append(PlannedImage(levels, plan, self.counts.pieces(plan)))
        return planned

    def plan_sizes(self, sizes: Sequence[Size], max_tokens: Budgets) -> list[list[Piece]]:
        """Give the part of the prompt of images of (height, width) px, each within its budget, without the images.

        Raises:
            VlmError: as `plan`.
        """
        budgets = budgets_of(max_tokens, len(sizes))
        plans = [self.counts.plan(size, most) for size, most in zip(sizes, budgets, strict=True)]
        return [self.counts.pieces(plan) for plan in plans]

    def write(self, messages: Sequence[Message], images: Sequence[Sequence[Piece]]) -> Sequence[Message]:
        """Put markers around the placeholders, with one placeholder for each run of image tokens.

        Args:
            messages: the conversation.
            images: each image's part of the prompt.

        Raises:
            VlmError: the messages do not hold one placeholder an image.
        """
        check_places(sum(message["content"].count(self.image_token) for message in messages), len(images))
        if not self.counts.layout.markers:
            return messages
        texts = iter(
            "".join(piece if isinstance(piece, str) else self.image_token for piece in pieces) for pieces in images
        )
        return [
            {**message, "content": _replace_each(message["content"], self.image_token, texts)} for message in messages
        ]

    def runs(self, images: Sequence[Sequence[Piece]]) -> list[int]:
        """Count the image tokens of each placeholder that `write` leaves."""
        counts = [[piece for piece in pieces if isinstance(piece, int)] for pieces in images]
        if self.counts.layout.markers:
            return [run for image in counts for run in image]
        return [sum(image) for image in counts]

    def views(self, planned: Sequence[PlannedImage]) -> Tensor | list[Tensor] | None:
        """Make the pixels of all views: (V, 3, S, S), a list where they have sizes of their own, None of no image."""
        made = [self.pixels(image.levels, image.plan) for image in planned]
        return join_views(made, native=self.counts.tiler.native)


class MarkCounter:
    """Counts the tokens of the markers in an image's part of a prompt, as a tokenizer writes them.

    Args:
        tokenizer: the LLM's.
        image_token: what stands for a run of image tokens.
    """

    def __init__(self, tokenizer: Any, image_token: str) -> None:
        self._tokenizer = tokenizer
        self._image_token = image_token
        self._known: dict[str, int] = {}

    def __call__(self, pieces: Sequence[Piece]) -> int:
        """Count them."""
        text = "".join(piece if isinstance(piece, str) else self._image_token for piece in pieces)
        if text not in self._known:
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            self._known[text] = len(ids) - sum(isinstance(piece, int) for piece in pieces)
        return self._known[text]


def check_markers(tiler: Tiler, markers: Markers, tokenizer: Any, image_token: str) -> None:
    """Refuse markers that a tokenizer cannot write: each mark such as `<img>` is to be one token.

    Args:
        tiler: whose markers they are.
        markers: of the layout.
        tokenizer: the LLM's.
        image_token: what stands for an image.

    Raises:
        VlmError: a marker holds the image token, is no token of its own, or is lost.
    """
    for field in fields(markers):
        text = getattr(markers, field.name).format(row=1, column=1, row0=0, column0=0, number=1)
        if image_token in text:
            raise VlmError(f"the marker {text!r} holds {image_token}, which stands for an image; use another mark")
        for mark in marks_of(text):
            ids = tokenizer(mark, add_special_tokens=False)["input_ids"]
            single = len(ids) == 1 or (ids and not is_special(mark))
            if not single or tokenizer.unk_token_id in ids:
                wrote = f"{len(ids)} tokens" if len(ids) != 1 else "the unknown token"
                raise VlmError(
                    f"'{tiler.label}' marks images by {mark!r}, which the tokenizer writes as {wrote}; leave its marks "
                    f"out by '{tiler.label}:markers=false', or add them to the tokenizer and the LLM's embeddings"
                )


def _replace_each(text: str, placeholder: str, texts: Iterator[str]) -> str:
    first, *others = text.split(placeholder)
    return first + "".join(next(texts) + other for other in others)
