"""What is said of a tiler's plan, in a table and above its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from textwrap import wrap

from connectors.tokens import TokenSpec
from vlm_encoders.tiling.counts import TokenCounts, marks_in
from vlm_encoders.tiling.layout import Piece
from vlm_encoders.tiling.plan import Size, TilePlan

__all__ = ["TilePanel", "caption", "headline", "short_prompt"]

_WIDTH = 74
_HEADLINE = 43
_SHOWN = 160


@dataclass(frozen=True)
class TilePanel:
    """One tiler's plan for an image, and what it costs.

    Attributes:
        name: the tiler's, as it was asked for.
        connector: its recipe.
        counts: of the encoder, the connector and the tiler.
        plan: for the image.
    """

    name: str
    connector: str
    counts: TokenCounts
    plan: TilePlan

    @cached_property
    def specs(self) -> list[TokenSpec]:
        """The tokens of one view of each page."""
        return self.counts.page_specs(self.plan)

    @cached_property
    def pieces(self) -> list[Piece]:
        """The image's part of the prompt."""
        return self.counts.pieces(self.plan)

    @property
    def image_tokens(self) -> int:
        """Image tokens of the whole image."""
        return self.counts.total(self.plan)

    @property
    def markers(self) -> int:
        """Marks of text, see `marks_in`."""
        return marks_in(self.pieces)

    @property
    def page_tokens(self) -> list[int | None]:
        """Tokens of a view of each page; None for one that is joined to another before the connector."""
        read = self.counts.layout.joined(self.plan).pages
        pages = zip(self.plan.pages, self.specs, strict=True)
        return [spec.num_tokens if page in read else None for page, spec in pages]

    @property
    def view_tokens(self) -> list[int]:
        """The different numbers of tokens that views have, in order."""
        return list(dict.fromkeys(tokens for tokens in self.page_tokens if tokens is not None))

    def first_view(self, place: int) -> int:
        """Give the number of a page's first view, counted from 1."""
        return 1 + sum(page.num_views for page in self.plan.pages[:place])

    def content(self, place: int) -> tuple[float, float, float, float]:
        """Say where the image lies on a page's canvas: top, left, height, width in px; a crop reaches beyond it."""
        if self.plan.resize is None:
            return self.plan.pages[place].content
        from vlm_encoders.preprocess.sizes import place as placed

        spec = self.counts.encoder
        if self.plan.resize != "encoder":
            spec = spec.altered(resize=self.plan.resize, crop_pct=1.0)
        at = placed(spec, self.plan.image_size)
        scales = [after / before for after, before in zip(at.resized, at.canvas, strict=True)]
        (top, left), (height, width) = (
            [side * scale for side, scale in zip(sides, scales, strict=True)] for sides in (at.margin, at.image)
        )
        return top - at.start[0], left - at.start[1], height, width

    def page_words(self, place: int) -> str:
        """Say what a page beside the main one is."""
        page = self.plan.pages[place]
        what = "thumbnail" if place == self.plan.thumbnail_place else f"{_by(page.grid)} of"
        return f"{what} {_by(page.view)}"


def headline(panel: TilePanel) -> str:
    """Say the tiler and the total."""
    told = f": {_some(panel.image_tokens, 'token')}"
    if panel.markers:
        told += f" + {_some(panel.markers, 'mark')}"
    room = _HEADLINE - len(told)
    return (panel.name if len(panel.name) <= room else f"{panel.name[: room - 3]}...") + told


def caption(panel: TilePanel) -> list[str]:
    """Say in lines what is drawn, and how the tokens add up."""
    plan = panel.plan
    # A headline that is too long loses the options, which tell panels of one tiler apart.
    whole = [] if panel.name in headline(panel) else [panel.name]
    lines = [*whole, f"{panel.counts.encoder.name} + {panel.connector}", f"{_px(plan.image_size)} in {_views(panel)}"]
    if plan.resize is not None:
        lines[-1] += f", by {panel.counts.encoder.resize if plan.resize == 'encoder' else plan.resize}"
    elif plan.padded:
        lines.append(f"resized to {_by(plan.content[2:])} on a canvas of {_px(plan.canvas)}")
    elif plan.main.num_views > 1:
        lines.append(f"resized to {_px(plan.canvas)}")
    lines.append(_sum(panel))
    return [part for line in lines for part in wrap(line, _WIDTH)]


def short_prompt(pieces: Sequence[Piece], longest: int = _SHOWN) -> str:
    r"""Write a prompt layout in one line: runs as (576), line breaks as \n, a long middle left out."""
    words = [f"({piece})" if isinstance(piece, int) else piece.replace("\n", "\\n") for piece in pieces]
    if sum(map(len, words)) <= longest:
        return "".join(words)
    head = _until(words, longest * 2 // 3)
    tail = _until(words[::-1], longest // 3)
    left_out = len(words) - head - tail
    return f"{''.join(words[:head])} ...{left_out} pieces... {''.join(words[len(words) - tail :])}"


def _until(words: Sequence[str], longest: int) -> int:
    """Count the first words that stay within a length, at least one."""
    length = 0
    for number, word in enumerate(words):
        length += len(word)
        if number and length > longest:
            return number
    return len(words)


def _views(panel: TilePanel) -> str:
    plan = panel.plan
    if plan.num_views == 1:
        return f"1 view of {_px(plan.main.view)}"
    parts = [f"{_by(page.grid)} of {_px(page.view)}" for page in plan.pages]
    if plan.thumbnail_place is not None:
        parts[plan.thumbnail_place] = "a thumbnail"
    return f"{plan.num_views} views: {' and '.join(parts)}"


def _sum(panel: TilePanel) -> str:
    """Say how the tokens of the views come to those of the image."""
    plan, specs = panel.plan, panel.specs
    if plan.num_views == 1 and specs[0].num_tokens == panel.image_tokens:
        return "queries without a grid" if specs[0].grid is None else f"{_by(specs[0].grid)} tokens"
    pages = zip(plan.pages, panel.page_tokens, strict=True)
    counts = [(page.num_views, tokens) for page, tokens in pages if tokens is not None]
    told = " + ".join(f"{views} x {tokens}" for views, tokens in counts)
    if len(counts) < len(plan.pages):
        return f"{len(plan.pages)} scales joined: {told} = {panel.image_tokens:,}"
    seen = sum(views * tokens for views, tokens in counts)
    return f"{told} = {seen:,}" + ("" if seen == panel.image_tokens else f", {_layout(panel)}: {panel.image_tokens:,}")


def _layout(panel: TilePanel) -> str:
    layout = panel.counts.layout
    specs = panel.counts.specs(panel.plan)
    uncapped = replace(layout, cap=None).num_tokens(panel.plan, specs)
    bare = replace(layout, newline=False, rows=True).num_tokens(panel.plan, specs)
    said = {
        "padding dropped": layout.unpad and panel.plan.padded,
        "brought down": uncapped != panel.image_tokens,
        "row ends added": bare != panel.image_tokens,
    }
    return ", ".join(words for words, true in said.items() if true)


def _by(pair: Sequence[float]) -> str:
    return f"{pair[0]}x{pair[1]}"


def _px(size: Size) -> str:
    return f"{_by(size)} px"


def _some(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' * (count != 1)}"
