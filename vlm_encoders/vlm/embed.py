"""Views to the tokens that the LLM reads: encoder and connector, in chunks that bound memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from connectors.base import Connector
from connectors.errors import TokenShapeError, VlmError
from connectors.tokens import PackedTokens, VisualTokens
from vlm_encoders.encoder import Encoder
from vlm_encoders.packing import pack
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.plan import Size, TilePlan

__all__ = [
    "check_chunk",
    "connect",
    "dtype_of",
    "embed_packed",
    "embed_views",
    "first_weight",
    "join_image",
    "view_tokens",
]


def embed_views(
    encoder: Encoder,
    connector: Connector,
    layout: TileLayout,
    pixel_values: Tensor,
    plans: Sequence[TilePlan],
    *,
    chunk_tokens: int | None = None,
) -> VisualTokens:
    """Encode views of one size and bring their tokens to the LLM's width.

    Args:
        encoder: sees the views.
        connector: reads their tokens, joined by `layout.gather` where the layout joins scales.
        layout: of the tiler that cut them.
        pixel_values: (V, 3, S, S).
        plans: of the images that the views are of.
        chunk_tokens: the most tokens, prefix included, that the encoder sees at once, but one view at
            least; None for all at once.

    Raises:
        TokenShapeError: scales are joined, and the views are not those of the plans.
        VlmError: `chunk_tokens` is no number of tokens.
    """
    check_chunk(chunk_tokens)
    views = len(pixel_values) if chunk_tokens is None else max(1, chunk_tokens // view_tokens(encoder.spec))
    chunks = pixel_values.split(views)
    dtype = dtype_of(encoder) or pixel_values.dtype
    encoded = (_like(encoder(chunk.to(dtype)), connector) for chunk in chunks)
    if not layout.scales:
        # Chunk by chunk to the end: what the encoder gives may be wider than what the LLM takes.
        return _joined(connector(chunk) for chunk in encoded)
    asked = sum(plan.num_views for plan in plans)
    if asked != len(pixel_values):
        raise TokenShapeError(
            f"{len(plans)} plans have {asked} views, got pixels of {len(pixel_values)}; pass the plans that they were "
            "cut with"
        )
    return _joined(join_image(connector, layout, tokens, plan, views) for tokens, plan in _by_image(encoded, plans))


def connect(
    connector: Connector, layout: TileLayout, visual: VisualTokens | PackedTokens, plans: Sequence[TilePlan]
) -> VisualTokens | PackedTokens:
    """Bring views that are encoded already to the LLM's width.

    Args:
        connector: reads their tokens.
        layout: joins scales where it has them.
        visual: the tokens as the encoder gives them.
        plans: of the images that the views are of.

    Raises:
        TokenShapeError: scales are joined, and the views are not those of the plans.
    """
    if isinstance(visual, PackedTokens):
        return connector.forward_packed(_packed_like(visual, connector))
    encoded = _like(visual, connector)
    if not layout.scales:
        mapped: VisualTokens = connector(encoded)
        return mapped
    return _joined(
        join_image(connector, layout, tokens, plan, len(visual.tokens)) for tokens, plan in _by_image([encoded], plans)
    )


def join_image(
    connector: Connector, layout: TileLayout, tokens: VisualTokens, plan: TilePlan, views: int
) -> VisualTokens:
    """Join the scales of one image and bring them to the LLM's width, so many views at a time.

    Args:
        connector: reads the joined tokens.
        layout: joins them.
        tokens: (V, N, D) of the image's views.
        plan: of the image.
        views: the most that the connector reads at once.
    """
    gathered = layout.gather(tokens, [plan])
    return _joined(connector(VisualTokens(part, gathered.grid)) for part in gathered.tokens.split(views))


def embed_packed(
    encoder: Encoder, connector: Connector, views: Sequence[Tensor], *, chunk_tokens: int | None = None
) -> PackedTokens:
    """Encode views of many sizes, pack by pack, and bring their tokens to the LLM's width.

    Args:
        encoder: packs the views.
        connector: reads their tokens.
        views: (3, H, W) each.
        chunk_tokens: the most tokens of a pack, prefix included, but one view at least; None for one
            pack.

    Raises:
        VlmError: `chunk_tokens` is no number of tokens.
    """
    check_chunk(chunk_tokens)
    dtype = dtype_of(encoder)
    lengths = [view_tokens(encoder.spec, (view.shape[-2], view.shape[-1])) for view in views]
    found: dict[int, VisualTokens] = {}
    for places in pack(lengths, sum(lengths) if chunk_tokens is None else chunk_tokens, allow_longer=True).packs:
        packed = encoder.forward_packed([views[place].to(dtype or views[place].dtype) for place in places])
        mapped = connector.forward_packed(_packed_like(packed, connector))
        found |= dict(zip(places, mapped.split(), strict=True))
    return PackedTokens.join([found[place] for place in range(len(views))])


def check_chunk(chunk_tokens: int | None) -> None:
    """Refuse what is no number of tokens.

    Raises:
        VlmError: it is below 1, or no whole number.
    """
    if chunk_tokens is not None and (not isinstance(chunk_tokens, int) or chunk_tokens < 1):
        raise VlmError(f"chunk_tokens is a whole number of tokens from 1, got {chunk_tokens!r}; leave it None for all")


def view_tokens(spec: EncoderSpec, view: Size | None = None) -> int:
    """Count the tokens of a view, prefix included, at another size if one is given (px)."""
    tokens = spec.token_spec(view)
    return tokens.num_tokens + tokens.num_prefix


def first_weight(module: nn.Module) -> nn.Parameter | None:
    """Give a parameter that tells a part's device and dtype, None where it has none."""
    # Checkpoints may hold the newline, which forward does not read, in another dtype than the rest.
    return next((parameter for name, parameter in module.named_parameters() if name != "newline"), None)


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """Give the dtype that a part computes in, None where it has no parameters."""
    first = first_weight(module)
    return None if first is None else first.dtype


def _like(visual: VisualTokens, connector: Connector) -> VisualTokens:
    """Bring tokens to the connector's dtype: a frozen encoder in bf16 before a connector that trains in fp32."""
    dtype = dtype_of(connector)
    if dtype is None or dtype == visual.tokens.dtype:
        return visual
    prefix = None if visual.prefix is None else visual.prefix.to(dtype)
    return VisualTokens(visual.tokens.to(dtype), visual.grid, prefix)


def _packed_like(packed: PackedTokens, connector: Connector) -> PackedTokens:
    dtype = dtype_of(connector) or packed.tokens.dtype
    return packed.with_tokens(packed.tokens.to(dtype), None if packed.prefix is None else packed.prefix.to(dtype))


def _by_image(chunks: Iterable[VisualTokens], plans: Sequence[TilePlan]) -> Iterator[tuple[VisualTokens, TilePlan]]:
    """Give the tokens of each image; those of the images before are let go."""
    held: list[Tensor] = []
    rest = iter(plans)
    plan = next(rest, None)
    for chunk in chunks:
        held.append(chunk.tokens)
        while plan is not None and sum(map(len, held)) >= plan.num_views:
            tokens = torch.cat(held)
            yield VisualTokens(tokens[: plan.num_views], chunk.grid), plan
            held = [tokens[plan.num_views :]]
            plan = next(rest, None)


def _joined(parts: Iterable[VisualTokens]) -> VisualTokens:
    several = list(parts)
    if len(several) == 1:
        return several[0]
    prefixes = [part.prefix for part in several if part.prefix is not None]
    tokens = torch.cat([part.tokens for part in several])
    return VisualTokens(tokens, several[0].grid, torch.cat(prefixes) if prefixes else None)
