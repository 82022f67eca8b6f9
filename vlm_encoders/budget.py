"""What one image costs the language model: arithmetic only, nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from connectors.tokens import Grid
from vlm_encoders.cost import chain_flops, encoder_flops, measure_connector, meta_chain, num_parameters
from vlm_encoders.registry import encoder_spec
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling import Tiler, build_tiler
from vlm_encoders.tiling.counts import TokenCounts, marks_in
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.plan import Size, TilePlan

if TYPE_CHECKING:
    from connectors.chain import Chain

__all__ = ["TokenBudget", "encoder_flops", "image_counts", "measure_connector", "token_budget"]


@dataclass(frozen=True)
class TokenBudget:
    """The tokens, operations and bytes of one image.

    A FLOP is one addition or multiplication; only matrix products are counted, as
    in `torch.utils.flop_counter`.

    Attributes:
        encoder: its name.
        connector: its recipe.
        views: pictures that the encoder sees.
        per_view: tokens of a view behind the connector, of a tile where views differ.
        total: the token budget: all image tokens that the LLM gets, newline vectors included,
            markers not.
        image_size: (height, width) of the image in px.
        encoder_tokens: N of that view before the connector, without prefix.
        grid: (rows, columns) of that view's tokens behind the connector; None for queries.
        dim: H, width of the LLM.
        connector_parameters: of the connector with its newline vector: Stage 1 trains them.
        encoder_parameters: of the whole tower; None if unknown.
        encoder_flops: for all views, each of its own size, up to the feature layer; None
            where the encoder is no plain vision transformer.
        connector_flops: for all that the connector reads.
        pixel_bytes: of the views' pixels.
        embedding_bytes: of the image embeddings.
        kv_cache_bytes: of their keys and values in all layers of the LLM; None
            without `llm_layers`.
        markers: marks of text around the image and between its views, such as `<img>` or a
            line break: what they cost beside `total` in a tokenizer that has each as one token.
    """

    encoder: str
    connector: str
    views: int
    per_view: int
    total: int
    image_size: Size
    encoder_tokens: int
    grid: Grid | None
    dim: int
    connector_parameters: int
    encoder_parameters: int | None
    encoder_flops: int | None
    connector_flops: int
    pixel_bytes: int
    embedding_bytes: int
    kv_cache_bytes: int | None
    markers: int = 0


def token_budget(
    encoder: str | EncoderSpec,
    connector: str,
    *,
    image_size: Size | None = None,
    tiler: str | Tiler | None = None,
    layout: TileLayout | None = None,
    llm_dim: int = 4096,
    llm_layers: int | None = None,
    kv_dim: int | None = None,
    value_bytes: int = 2,
    max_tokens: int | None = None,
) -> TokenBudget:
    """Count what one image costs.

    Args:
        encoder: its name, or its spec.
        connector: its recipe, such as `pixel_shuffle:factor=2+mlp`.
        image_size: (height, width) of the image in px; None for one of the view's size.
        tiler: its name with options, such as `internvl:max_tiles=6`, or a tiler; None for the
            whole image as one view.
        layout: how views become one sequence; None for the tiler's own.
        llm_dim: H, width of the LLM.
        llm_layers: layers of the LLM, for the bytes of its cache.
        kv_dim: width of a layer's keys (key heads x head width); None for `llm_dim`,
            which is right without grouped queries.
        value_bytes: bytes of one number; 2 is bfloat16.
        max_tokens: the most tokens that the image may cost, markers included: the tiler's best
            plan within them is counted; None for its own choice.

    Raises:
        VlmError: a name is unknown, the tiler's views are not the encoder's, or no plan stays
            within `max_tokens`.
        TokenShapeError: the connector cannot take the tokens, or the layout not the connector's.
    """
    spec = encoder_spec(encoder) if isinstance(encoder, str) else encoder
    if not isinstance(tiler, Tiler):
        tiler = build_tiler("whole" if tiler is None else tiler, spec)
    counts = image_counts(spec, connector, tiler, layout=layout, llm_dim=llm_dim)
    plan = counts.plan(image_size or spec.image_size, max_tokens)
    total = counts.total(plan)
    out = counts.page_specs(plan)[plan.main_place]
    tokens = spec.token_spec(plan.main.view) if tiler.native else spec.token_spec()
    chain = meta_chain(connector, counts.layout.connector_spec(spec.token_spec()), llm_dim)
    per_layer = 2 * total * (llm_dim if kv_dim is None else kv_dim) * value_bytes
    return TokenBudget(
        encoder=spec.name,
        connector=connector,
        image_size=plan.image_size,
        views=plan.num_views,
        encoder_tokens=tokens.num_tokens,
        per_view=out.num_tokens,
        total=total,
        grid=out.grid,
        dim=llm_dim,
        connector_parameters=num_parameters(chain) + llm_dim * counts.layout.newline,
        encoder_parameters=spec.parameters or None,
        encoder_flops=_encoder_flops(spec, plan, native=tiler.native),
        connector_flops=_connector_flops(chain, counts, plan),
        pixel_bytes=_num_pixels(spec, plan, native=tiler.native) * value_bytes,
        embedding_bytes=total * llm_dim * value_bytes,
        kv_cache_bytes=None if llm_layers is None else per_layer * llm_layers,
        markers=marks_in(counts.pieces(plan)),
    )


def image_counts(
    spec: EncoderSpec, connector: str, tiler: Tiler, *, layout: TileLayout | None = None, llm_dim: int = 64
) -> TokenCounts:
    """Make what plans and counts images, without weights; the width of the LLM changes no count.

    Args:
        spec: of the encoder.
        connector: its recipe.
        tiler: plans the views.
        layout: how views become one sequence; None for the tiler's own.
        llm_dim: H, width of the LLM.

    Raises:
        VlmError: the recipe cannot be read, or the tiler's views are not the encoder's.
        TokenShapeError: the connector cannot take the tokens, or the layout not the connector's.
    """
    tiler.check(spec)
    chosen = tiler.layout if layout is None else layout
    chain = meta_chain(connector, chosen.connector_spec(spec.token_spec()), llm_dim)
    if layout is None:
        chosen = tiler.layout_for(chain.out_spec(chosen.connector_spec(spec.token_spec())))
    return TokenCounts(spec, chain, tiler, chosen)


def _connector_flops(chain: Chain, counts: TokenCounts, plan: TilePlan) -> int:
    total = 0
    # A layout that joins scales has fewer views to read than the encoder saw.
    for page in counts.layout.joined(plan).pages:
        tokens = counts.encoder.token_spec(page.view if counts.tiler.native else None)
        total += page.num_views * chain_flops(chain, counts.layout.connector_spec(tokens))
    return total


def _encoder_flops(spec: EncoderSpec, plan: TilePlan, *, native: bool) -> int | None:
    if not native:
        flops = encoder_flops(spec)
        return None if flops is None else flops * plan.num_views
    found = [(page.num_views, encoder_flops(spec.resized(page.view))) for page in plan.pages]
    counted = [views * flops for views, flops in found if flops is not None]
    return sum(counted) if len(counted) == len(found) else None


def _num_pixels(spec: EncoderSpec, plan: TilePlan, *, native: bool) -> int:
    """Count the numbers in the pixels of all views."""
    if not native:
        return plan.num_views * spec.num_pixels
    return sum(3 * height * width for height, width in plan.views)
