"""One view an image, in a size of its own: what encoders of native resolution see."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from connectors.errors import VlmError
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.spec_values import Interpolation
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.plan import Page, Size, TilePlan, check_sizes
from vlm_encoders.tiling.tiler import Tiler

__all__ = ["NativeTiler", "check_area", "last_holding"]


@dataclass(frozen=True)
class NativeTiler(Tiler):
    """One view of nearly the image's own shape; subclasses say of which size.

    Args:
        tile_size: side in px of the view that the encoder is named for; no view is held to it.
        patch: px that a view's sides must be a multiple of for the encoder, which tells it.
        merge: tokens of a side that the connector joins to one; sides are whole ones of these.
        interpolation: the filter of the resize.
    """

    tile_size: int = 448
    patch: int = 16
    merge: int = 1
    interpolation: Interpolation = "bicubic"

    native = True

    def __post_init__(self) -> None:
        """Refuse patches without pixels."""
        check_sizes((1, 1), self.tile_size)
        if self.patch < 1 or self.merge < 1:
            raise VlmError(f"'{self.name}' has patch={self.patch} and merge={self.merge}; use 1 or more")

    @property
    def multiple(self) -> int:
        """What both sides of a view are a multiple of, px."""
        return self.patch * self.merge

    @property
    def view_step(self) -> int:
        """As `multiple`."""
        return self.multiple

    @property
    def layout(self) -> TileLayout:
        """The tokens as they are."""
        return TileLayout(unpad=False, newline=False)

    @property
    def max_views(self) -> int:
        """One."""
        return 1

    @abstractmethod
    def view_size(self, image_size: Size) -> Size:
        """Give (height, width) of the view of an image, px."""

    @abstractmethod
    def smaller(self, image_size: Size, limit: int) -> Size:
        """Give the view under a limit, in the rule's own unit; neither side shrinks as the limit grows."""

    @abstractmethod
    def limit(self, image_size: Size) -> int:
        """Give the largest limit whose view is no longer on any side than `view_size`'s; 0 where none is."""

    def ranked(self, image_size: Size) -> Iterator[TilePlan]:
        """Give the view, and then ever smaller ones."""
        check_sizes(image_size, 1)
        size = self.view_size(image_size)
        yield self._plan(image_size, size)
        limit = self.limit(image_size)
        while limit > 0:
            before, size = size, self.smaller(image_size, limit)
            if size != before:
                yield self._plan(image_size, size)
            limit = self._next(image_size, limit)

    def plan_within(self, image_size: Size, max_tokens: int, count: Callable[[TilePlan], int]) -> TilePlan:
        """Plan the largest view within a budget: what `ranked` gives first, by bisection.

        Args:
            image_size: (height, width) of the image, px.
            max_tokens: the most tokens that the image may cost the LLM.
            count: what a plan costs; a smaller view may cost no more.

        Raises:
            VlmError: even the smallest view costs more.
        """
        plan = self.plan(image_size)
        if count(plan) <= max_tokens:
            return plan

        def fits(limit: int) -> bool:
            return count(self._plan(image_size, self.smaller(image_size, limit))) <= max_tokens

        best = last_holding(self.limit(image_size) + 1, fits)
        if best:
            return self._plan(image_size, self.smaller(image_size, best))
        height, width = image_size
        least = count(self._plan(image_size, self.smaller(image_size, 1)))
        raise VlmError(
            f"'{self.label}' needs at least {least} tokens for an image of {height}x{width} px, {max_tokens} are "
            "allowed; raise max_tokens, or use a connector with fewer tokens"
        )

    def check(self, spec: EncoderSpec) -> None:
        """Refuse an encoder that takes one size of view, or views of other multiples.

        Raises:
            VlmError: it does.
        """
        super().check(spec)
        if self.multiple % spec.side_step:
            raise VlmError(
                f"'{self.label}' makes views with sides of multiples of {self.multiple} px, {spec.name} takes "
                f"multiples of {spec.side_step}; use patch={spec.side_step}"
            )

    @classmethod
    def told_by(cls, spec: EncoderSpec) -> dict[str, Any]:
        """Give the options that an encoder tells: its patch too."""
        return super().told_by(spec) | {"patch": spec.side_step}

    def _next(self, image_size: Size, limit: int) -> int:
        """Give the largest limit whose view is smaller than that of `limit`; 0 where none is."""
        size = self.smaller(image_size, limit)
        return last_holding(limit, lambda below: self.smaller(image_size, below) != size)

    def _plan(self, image_size: Size, size: Size) -> TilePlan:
        return TilePlan(image_size, (Page.squashed((1, 1), size),), interpolation=self.interpolation)


def check_area(name: str, min_pixels: int, max_pixels: int) -> None:
    """Refuse bounds of an area that no view has.

    Raises:
        VlmError: one is not positive, or they cross.
    """
    if not 1 <= min_pixels <= max_pixels:
        raise VlmError(
            f"'{name}' has min_pixels={min_pixels} and max_pixels={max_pixels}; use 1 <= min_pixels <= max_pixels"
        )


def last_holding(end: int, holds: Callable[[int], bool]) -> int:
    """Find the last number from 1 to `end` - 1 for which `holds`, as it does for all before; 0 where for none."""
    low, high = 0, end
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low
