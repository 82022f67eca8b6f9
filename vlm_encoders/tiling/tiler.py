"""What a tiler is: one object that plans, within a budget if asked, and knows the layout of its views."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from connectors.errors import VlmError
from connectors.tokens import TokenSpec
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.plan import Size, TilePlan

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Tiler"]


@dataclass(frozen=True)
class Tiler(ABC):
    """What turns an image into views: a plan of integers, then pixels, then tokens.

    Attributes:
        name: in checkpoints.
        native: whether views have sizes of their own, so that the encoder must pack them.
        resized_by_encoder: whether preprocessing brings the image to the encoder's view, whatever its size.
        tile_size: side of a view in px, the encoder's image size; of a native tiler it only
            names the encoder.
    """

    name: ClassVar[str]
    native: ClassVar[bool] = False
    resized_by_encoder: ClassVar[bool] = False
    tile_size: int

    @property
    def label(self) -> str:
        """The name that it was asked for by, for messages: a preset's, or the class's own."""
        return str(vars(self).get("_asked_for", self.name))

    @property
    @abstractmethod
    def layout(self) -> TileLayout:
        """What released models use with this tiler, where tokens have a grid."""

    @abstractmethod
    def ranked(self, image_size: Size) -> Iterator[TilePlan]:
        """Give the plans that this tiler may choose for an image of (height, width) px, the best first."""

    @property
    @abstractmethod
    def max_views(self) -> int | None:
        """The most views that an image can become; None where nothing bounds them."""

    @property
    def view_step(self) -> int | None:
        """What both sides of any view are a multiple of, px, under a native tiler; None under the others."""
        return None

    def plan(self, image_size: Size) -> TilePlan:
        """Plan the views of an image of (height, width) px."""
        return next(self.ranked(image_size))

    def plan_within(self, image_size: Size, max_tokens: int, count: Callable[[TilePlan], int]) -> TilePlan:
        """Plan the best views that stay within a budget.

        Args:
            image_size: (height, width) of the image, px.
            max_tokens: the most tokens that the image may cost the LLM.
            count: what a plan costs, such as the layout's `num_tokens` gives it.

        Raises:
            VlmError: even the smallest plan costs more.
        """
        least: int | None = None
        for plan in self.ranked(image_size):
            tokens = count(plan)
            if tokens <= max_tokens:
                return plan
            least = tokens if least is None else min(least, tokens)
        height, width = image_size
        raise VlmError(
            f"'{self.label}' needs at least {least} tokens for an image of {height}x{width} px, {max_tokens} are "
            "allowed; raise max_tokens, or use a connector with fewer tokens"
        )

    def cut(self, image: Image, plan: TilePlan) -> list[Image]:
        """Cut an image into the views of its plan; see `cut.cut`."""
        from vlm_encoders.tiling.cut import cut

        return cut(image, plan)

    def check(self, spec: EncoderSpec) -> None:
        """Refuse an encoder whose views are not this tiler's.

        Raises:
            VlmError: the sizes differ, so that each tile would be resized once more; or views have
                sizes of their own and the encoder takes one.
        """
        if self.native:
            if not spec.packs:
                raise VlmError(
                    f"'{self.label}' gives views of many sizes, {spec.name} takes one; use a tiler of square tiles, or "
                    "an encoder of native resolution with torch's own attention, such as siglip2-naflex-b-16"
                )
            return
        if not self.resized_by_encoder and spec.image_size != (self.tile_size, self.tile_size):
            height, width = spec.image_size
            use = f"use tile_size={height}" if height == width else "build the encoder for square views"
            raise VlmError(
                f"'{self.label}' cuts tiles of {self.tile_size} px, but {spec.name} sees {height}x{width} px; {use}"
            )

    @classmethod
    def told_by(cls, spec: EncoderSpec) -> dict[str, Any]:
        """Give the options that an encoder tells, where nobody says otherwise."""
        return {"tile_size": spec.image_size[0]}

    def layout_for(self, spec: TokenSpec) -> TileLayout:
        """Give the layout for tokens of this shape: queries have no rows, so their views follow one another."""
        return self.layout if spec.grid is not None else self.layout.without_rows()

    def config(self) -> dict[str, Any]:
        """Give what `tiler_from_config` makes this tiler of again; JSON can hold it."""
        return {"name": self.name, **asdict(self)}
