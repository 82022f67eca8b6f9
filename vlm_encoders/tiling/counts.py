"""What images cost, and the best plan within a budget: the one place where image tokens are counted."""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from connectors.errors import VlmError
from connectors.tokens import TokenSpec
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling.layout import PageSpecs, Piece, TileLayout
from vlm_encoders.tiling.plan import Size, TilePlan
from vlm_encoders.tiling.tiler import Tiler

if TYPE_CHECKING:
    from connectors.base import Connector

__all__ = ["Budgets", "TokenCounts", "budgets_of", "is_special", "marks_in", "marks_of"]

Budgets: TypeAlias = int | Sequence[int | None] | None
"""The most tokens of each image, of all alike, or no limit."""

_MARK = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]|\n|[^\s<\[]+|[<\[]")
_SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")


class TokenCounts:
    """Counts the image tokens of an encoder, a connector and a tiler; it holds no weights.

    Args:
        encoder: the encoder's spec.
        connector: for its shapes alone.
        tiler: plans the views.
        layout: arranges them.
        count_marks: what the markers of a prompt cost; None for one token a mark.

    Raises:
        VlmError: the tiler gives views that the connector cannot take.
    """

    def __init__(
        self,
        encoder: EncoderSpec,
        connector: Connector,
        tiler: Tiler,
        layout: TileLayout,
        count_marks: Callable[[Sequence[Piece]], int] | None = None,
    ) -> None:
        self.encoder = encoder
        self.tiler = tiler
        self.layout = layout
        self._fixed = connector.out_spec(layout.connector_spec(encoder.token_spec()))
        self._known: dict[Size, TokenSpec] = {}
        self._connector = _without_weights(connector) if tiler.native else None
        self._count_marks = count_marks or marks_in
        self._check_views()

    def specs(self, plan: TilePlan) -> PageSpecs:
        """Give the tokens of one view of each page, as the connector gives them.

        Raises:
            VlmError: a view has a size that the encoder or the connector does not take.
        """
        if self._connector is None:
            return self._fixed
        for page in plan.pages:
            if page.view not in self._known:
                tokens = self.layout.connector_spec(self.encoder.token_spec(page.view))
                self._known[page.view] = self._connector.out_spec(tokens)
        return [self._known[page.view] for page in plan.pages]

    def page_specs(self, plan: TilePlan) -> list[TokenSpec]:
        """Give `specs`, one for each page."""
        specs = self.specs(plan)
        return [specs] * len(plan.pages) if isinstance(specs, TokenSpec) else list(specs)

    def total(self, plan: TilePlan) -> int:
        """Count the image tokens of a plan, markers apart."""
        return self.layout.num_tokens(plan, self.specs(plan))

    def cost(self, plan: TilePlan) -> int:
        """Count all that a plan costs the LLM: image tokens and markers."""
        marks = self._count_marks(self.pieces(plan)) if self.layout.markers else 0
        return self.total(plan) + marks

    def pieces(self, plan: TilePlan) -> list[Piece]:
        """Give the image's part of the prompt: marker text, and runs of image tokens."""
        return self.layout.pieces(plan, self.specs(plan))

    def plan(self, image_size: Size, max_tokens: int | None = None) -> TilePlan:
        """Plan an image of (height, width) px, by the tiler alone or within a budget, markers included.

        Raises:
            VlmError: no plan stays within `max_tokens`.
        """
        if max_tokens is None:
            return self.tiler.plan(image_size)
        return self.tiler.plan_within(image_size, max_tokens, self.cost)

    def _check_views(self) -> None:
        """Refuse a connector that takes no view of an odd number of patches, before the first such image comes."""
        step = self.tiler.view_step
        if self._connector is None or step is None:
            return
        odd = (37 * step, 41 * step)
        try:
            self._connector.out_spec(self.layout.connector_spec(self.encoder.token_spec(odd)))
        except VlmError as error:
            raise VlmError(
                f"'{self.tiler.label}' gives views of any multiple of {step} px, which the connector does not take: "
                f"{error}; or give the tiler merge=, the tokens of a side that the connector joins to one"
            ) from error


def budgets_of(max_tokens: Budgets, images: int) -> list[int | None]:
    """Give the budget of each image.

    Args:
        max_tokens: one number for all, one for each, or None for no limit.
        images: how many there are.

    Raises:
        VlmError: there is not one for each, or one is no whole number.
    """
    several: list[Any] = list(max_tokens) if isinstance(max_tokens, (list, tuple)) else [max_tokens] * images
    if len(several) != images:
        raise VlmError(f"{images} images have {len(several)} budgets; give max_tokens once, or for each image")
    try:
        budgets = [None if each is None else operator.index(each) for each in several]
    except TypeError:
        budgets = [0]
    if any(each is not None and each < 1 for each in budgets):
        raise VlmError(f"a budget is a whole number of tokens from 1, or one for each image, got {max_tokens!r}")
    return budgets


def marks_in(pieces: Iterable[Piece]) -> int:
    """Count the marks in the text between runs of image tokens: what they cost where each is one token.

    A mark is a word in `<>`, one in capitals in `[]`, a line break, or any other word. Tokenizers of the
    models that a preset is named after have the first two as special tokens; some join two line breaks to one.
    """
    return sum(len(marks_of(piece)) for piece in pieces if isinstance(piece, str))


def marks_of(text: str) -> list[str]:
    """Give the marks of a text in order."""
    return _MARK.findall(text)


def is_special(mark: str) -> bool:
    """Say whether a mark is one that models have as a token of its own, in `<>` or in capitals in `[]`."""
    return _SPECIAL.fullmatch(mark) is not None


def _without_weights(connector: Connector) -> Connector:
    """Copy a connector whose tensors hold nothing, so that data-loader workers get its shapes alone."""
    import torch

    tensors = [*connector.parameters(), *connector.buffers()]
    empty = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
    return copy.deepcopy(connector, dict(empty))
