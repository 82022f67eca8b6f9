"""Tokens by plan: the views of an image become one sequence for the LLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from connectors.errors import TokenShapeError, VlmError
from connectors.tokens import PackedTokens, TokenSpec, VisualTokens, require_grid
from vlm_encoders.tiling.joined_map import cap_grid, shown_window
from vlm_encoders.tiling.markers import Markers
from vlm_encoders.tiling.plan import TilePlan
from vlm_encoders.tiling.prompt import Piece, lay_out

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PageSpecs", "Piece", "TileLayout"]

PageSpecs: TypeAlias = "TokenSpec | Sequence[TokenSpec]"
"""The tokens of a view as the connector gives them: the same on all pages, or one spec a page."""


@dataclass(frozen=True)
class TileLayout:
    """How the tokens of thumbnail and tiles become one sequence.

    With `unpad`, `newline` or `rows`, the tiles are joined to one map of the image that is
    read row by row; without, the views follow one another. Prefix tokens are
    left out: the connector `keep_prefix` makes them tokens.

    Attributes:
        unpad: drop the rows or columns of tokens that show padding.
        newline: end each row of the joined map, and a whole image, with the
            learned newline vector.
        rows: read the joined map row by row, with neither of them.
        cap: tiles whose tokens the joined map may have; a larger one is brought down bilinearly.
        markers: text between the runs of image tokens.
        scales: pages of a plan whose maps are joined channel by channel before the connector; 0 where
            each view goes through it as it is.
        joined_on: which of these pages the others are averaged or spread to the grid of.

    Source: LLaVA-NeXT's `spatial_unpad` (unpad and newline), and `flat`, InternVL (neither).
    """

    unpad: bool
    newline: bool
    rows: bool = False
    cap: int | None = None
    markers: Markers = field(default_factory=Markers)
    scales: int = 0
    joined_on: Literal["first", "last"] = "last"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TileLayout:
        """Make the layout whose `config` this is.

        Raises:
            VlmError: it is none.
        """
        try:
            return cls(**{**config, "markers": Markers(**config.get("markers", {}))})
        except TypeError as error:
            raise VlmError(
                f"the layout cannot be read ({error}); update vlm-encoders, or save the model again"
            ) from error

    def config(self) -> dict[str, Any]:
        """Give what `from_config` makes this layout of again; JSON can hold it."""
        return asdict(self)

    @property
    def by_rows(self) -> bool:
        """Whether tiles are joined to one map."""
        return self.unpad or self.newline or self.rows

    def without_rows(self) -> TileLayout:
        """Give the same layout for tokens that have no rows: view after view."""
        markers = replace(self.markers, token_row="")
        return replace(self, unpad=False, newline=False, rows=False, cap=None, markers=markers)

    def check(self, spec: TokenSpec) -> None:
        """Refuse tokens without a grid where rows are needed.

        Raises:
            TokenShapeError: the connector gives queries, and the layout wants rows.
        """
        if spec.grid is None and (self.by_rows or self.markers.token_row):
            wants = [name for name in ("unpad", "newline", "rows") if getattr(self, name)] or ["marked rows of tokens"]
            raise TokenShapeError(
                f"a layout with {' and '.join(wants)} needs rows, but the connector gives {spec.num_tokens} queries "
                "without a grid; use TileLayout(unpad=False, newline=False), which puts tile after tile"
            )

    def num_tokens(self, plan: TilePlan, spec: PageSpecs) -> int:
        """Count the image tokens that one image costs the LLM, without computing any; markers are text.

        Args:
            plan: the image's views.
            spec: the tokens of one view as the connector gives them, or of one view of each page.

        Raises:
            TokenShapeError: the tokens have no grid, and the layout wants rows.
        """
        plan = self.joined(plan)
        specs = self._specs(plan, spec)
        return sum(self._page_length(plan, place, each) for place, each in enumerate(specs))

    def pieces(self, plan: TilePlan, spec: PageSpecs) -> list[Piece]:
        """Lay the prompt of one image out: marker text, and runs of image tokens between.

        Args:
            plan: the image's views.
            spec: as in `num_tokens`, which is the sum of the runs.

        Raises:
            TokenShapeError: the tokens have no grid, and the layout wants rows.
        """
        plan = self.joined(plan)
        specs = self._specs(plan, spec)
        by_rows = [plan.grid is None or (self.by_rows and each.grid is not None) for each in specs]
        lengths = [
            self._page_length(plan, place, each) if rows else None
            for place, (each, rows) in enumerate(zip(specs, by_rows, strict=True))
        ]
        return lay_out(self.markers, plan, specs, lengths)

    def connector_spec(self, spec: TokenSpec) -> TokenSpec:
        """State the tokens of a view as the connector reads them: as wide as all joined scales, without prefix.

        Raises:
            TokenShapeError: the encoder's tokens have no grid, and scales are to be joined.
        """
        return TokenSpec(spec.num_tokens, spec.dim * self.scales, require_grid(spec.grid)) if self.scales else spec

    def joined(self, plan: TilePlan) -> TilePlan:
        """Give the plan of what the connector reads: where scales are joined, the page that they are joined on."""
        if not self.scales or len(plan.pages) == 1:
            return plan
        return replace(plan, pages=(plan.pages[0 if self.joined_on == "first" else -1],))

    def gather(self, visual: VisualTokens, plans: Sequence[TilePlan]) -> VisualTokens:
        """Bring the encoder's tokens (V, N, D) to what the connector reads; see `scales.join_scales`."""
        from vlm_encoders.tiling.scales import join_scales

        return join_scales(visual, plans, self.scales, self.joined_on) if self.scales else visual

    def arrange(
        self, visual: VisualTokens | PackedTokens, plans: Sequence[TilePlan], newline: Tensor | None = None
    ) -> list[Tensor]:
        """Make one sequence (n_i, H) for each image, n_i as `num_tokens` counts.

        Args:
            visual: (V, N, H), the views of all images, image by image; packed where views differ.
            plans: the plan of each image.
            newline: (H,), the learned vector, where the layout has newlines.

        Raises:
            TokenShapeError: the views are not those of the plans, or the newline
                vector is missing or of another width.

        Source: transformers `LlavaNextModel.pack_image_features`.
        """
        from vlm_encoders.tiling.arrange import arrange_views

        return arrange_views(self, visual, plans, newline)

    def most_tokens(self, tile_tokens: int) -> int | None:
        """Give the tokens that the joined map of tiles of so many tokens is brought down to; None for no limit."""
        return None if self.cap is None else self.cap * tile_tokens

    def _specs(self, plan: TilePlan, spec: PageSpecs) -> list[TokenSpec]:
        specs = [spec] * len(plan.pages) if isinstance(spec, TokenSpec) else list(spec)
        if len(specs) != len(plan.pages):
            raise TokenShapeError(f"the plan has {len(plan.pages)} pages, got {len(specs)} token specs; give one each")
        for each in specs:
            self.check(each)
        return specs

    def _page_length(self, plan: TilePlan, place: int, spec: TokenSpec) -> int:
        if plan.grid is None:
            return spec.num_tokens + self.newline
        if place != plan.main_place or spec.grid is None or not self.by_rows:
            return spec.num_tokens * plan.pages[place].num_views
        window = shown_window(plan, spec.grid, unpad=self.unpad)
        rows, columns = cap_grid(window.rows, window.columns, self.most_tokens(spec.num_tokens))
        return rows * (columns + self.newline)
