"""Images of any size to tokens without an LLM: planned, cut and encoded in chunks that bound memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from connectors.base import Connector, Option
from connectors.errors import VlmError
from connectors.tokens import PackedTokens, TokenSpec, VisualTokens
from vlm_encoders.encoder import Encoder
from vlm_encoders.preprocess import ImageLike
from vlm_encoders.preprocess.forms import as_list
from vlm_encoders.tiling import TilePlan, Tiler, build_tiler
from vlm_encoders.tiling.counts import Budgets, TokenCounts, budgets_of
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.pixels import TilePixels
from vlm_encoders.vlm.embed import check_chunk, embed_packed, embed_views, join_image, view_tokens

__all__ = ["encode_images"]

_Asked: TypeAlias = tuple[ImageLike, int | None]
"""An image, and the most tokens that it may become."""


@torch.no_grad()
def encode_images(
    encoder: Encoder,
    images: ImageLike | Sequence[ImageLike],
    tiler: str | Tiler = "whole",
    *,
    connector: Connector | None = None,
    max_tokens: Budgets = None,
    chunk_tokens: int | None = None,
) -> list[Tensor]:
    """Encode images as a tiler plans them, without tracking gradients.

    Pixels are made chunk by chunk too, so that what an image needs beside its levels and its
    tokens is bounded by a chunk, however many tiles it has. Where scales are joined (S2), the
    encoder's tokens of one image are held together.

    Args:
        encoder: the encoder, on the device to compute on.
        images: one or several.
        tiler: its name with options, such as `internvl:max_tiles=6`, or a tiler.
        connector: maps the tokens, with the tiler's layout; None leaves them as the encoder gives
            them, and newlines out.
        max_tokens: the most tokens that an image may become, or one number for each image; None for
            no such limit.
        chunk_tokens: the most tokens, prefix included, that the encoder sees at once, but one view at
            least; None for all.

    Returns:
        One (n, D) tensor for each image, in the order of the tiler's layout.

    Raises:
        VlmError: an image cannot be read, the tiler's views are not the encoder's, or no plan stays
            within `max_tokens`.
    """
    many = as_list(images)
    if not many:
        raise VlmError("there is no image to encode; give one or more")
    check_chunk(chunk_tokens)
    if isinstance(tiler, str):
        tiler = build_tiler(tiler, encoder.spec)
    tiler.check(encoder.spec)
    mapped = _AsTheyAre() if connector is None else connector
    layout = tiler.layout_for(mapped.out_spec(tiler.layout.connector_spec(encoder.token_spec)))
    changes: dict[str, Any] = {"markers": {}}
    if layout.newline and mapped.newline is None:
        changes |= {"newline": False, "rows": True}
    layout = TileLayout.from_config(layout.config() | changes)
    counts = TokenCounts(encoder.spec, mapped, tiler, layout)
    job = _Job(encoder, mapped, counts, chunk_tokens)
    visual = job.run(zip(many, budgets_of(max_tokens, len(many)), strict=True))
    return layout.arrange(visual, job.plans, mapped.newline if layout.newline else None)


class _Job:
    """What one call works with.

    Attributes:
        plans: of the images, in order, once they have been encoded.
    """

    def __init__(self, encoder: Encoder, connector: Connector, counts: TokenCounts, chunk_tokens: int | None) -> None:
        self.encoder, self.connector, self.counts = encoder, connector, counts
        self.chunk_tokens = math.inf if chunk_tokens is None else chunk_tokens
        self.plans: list[TilePlan] = []

    def run(self, images: Iterable[_Asked]) -> VisualTokens | PackedTokens:
        """Encode chunk by chunk."""
        if self.counts.tiler.native:
            packs = [self._pack(batch) for batch in self._batches(self._parts(images))]
            return PackedTokens.join([view for pack in packs for view in pack.split()])
        if self.counts.layout.scales:
            done = [self._scales(image) for image in images]
        else:
            done = [self._views(batch) for batch in self._batches(self._parts(images))]
        return VisualTokens(torch.cat([each.tokens for each in done]), done[0].grid)

    def _parts(self, images: Iterable[_Asked]) -> Iterator[Tensor]:
        """Give the views of all images, (n, 3, H, W) of one size or (n, L), no more than a chunk holds."""
        pixels = TilePixels(self.encoder.spec)
        for image, most in images:
            levels = pixels.load(image)
            plan = self.counts.plan(pixels.size(levels), most)
            self.plans.append(plan)
            yield from pixels.stream(levels, plan, min(self._views_at_once, plan.num_views))

    def _batches(self, parts: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """Put parts together, in their order, as long as they fit in a chunk."""
        batch: list[Tensor] = []
        room: float = 0
        for part in parts:
            tokens = len(part) * self._tokens(part)
            if batch and tokens > room:
                yield batch
                batch = []
            room = (room if batch else self.chunk_tokens) - tokens
            batch.append(part)
        yield batch

    def _views(self, batch: Sequence[Tensor]) -> VisualTokens:
        return embed_views(self.encoder, self.connector, self.counts.layout, torch.cat(self._here(batch)), ())

    def _pack(self, batch: Sequence[Tensor]) -> PackedTokens:
        return embed_packed(self.encoder, self.connector, [view for part in self._here(batch) for view in part])

    def _scales(self, image: _Asked) -> VisualTokens:
        """Encode the views of one image chunk by chunk, and join its scales."""
        plain = TileLayout(unpad=False, newline=False)
        batches = self._batches(self._parts([image]))
        parts = [embed_views(self.encoder, _AsTheyAre(), plain, torch.cat(self._here(each)), ()) for each in batches]
        whole = VisualTokens(torch.cat([part.tokens for part in parts]), parts[0].grid)
        return join_image(self.connector, self.counts.layout, whole, self.plans[-1], self._views_at_once)

    def _here(self, batch: Sequence[Tensor]) -> list[Tensor]:
        device = next(self.encoder.parameters()).device
        return [part.to(device) for part in batch]

    @property
    def _views_at_once(self) -> int:
        if self.counts.tiler.native:
            return 1
        return int(max(1, min(self.chunk_tokens // view_tokens(self.encoder.spec), sys.maxsize)))

    def _tokens(self, part: Tensor) -> int:
        """Count the tokens of a view of a part."""
        size = (part.shape[-2], part.shape[-1]) if self.counts.tiler.native else None
        return view_tokens(self.encoder.spec, size)


class _AsTheyAre(Connector):
    """Tokens as the encoder gives them, without their prefix."""

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Drop the prefix."""
        return VisualTokens(visual.tokens, visual.grid)

    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        """Drop the prefix."""
        return packed.with_tokens(packed.tokens)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Keep the shape."""
        return TokenSpec(spec.num_tokens, spec.dim, spec.grid)

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, *args: Any, **options: Any) -> Self:
        """Make one."""
        return cls()

    def options(self) -> dict[str, Option]:
        """There are none."""
        return {}
