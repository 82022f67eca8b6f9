"""What one image costs the language model: arithmetic only, nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from connectors.tokens import Grid, TokenSpec
from vlm_encoders.registry import encoder_spec
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling.anyres import Tiler, build_tiler
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.plan import Size

__all__ = ["TokenBudget", "encoder_flops", "measure_connector", "token_budget"]


@dataclass(frozen=True)
class TokenBudget:
    """The tokens, operations and bytes of one image.

    A FLOP is one addition or multiplication; only matrix products are counted, as
    in `torch.utils.flop_counter`.

    Attributes:
        encoder: its name.
        connector: its recipe.
        views: pictures that the encoder sees.
        per_view: tokens of a view behind the connector.
        total: the token budget: all that the image costs the LLM, newlines included.
        image_size: (height, width) of the image in px.
        encoder_tokens: N of a view before the connector, without prefix.
        grid: (rows, columns) of a view's tokens behind the connector; None for queries.
        dim: H, width of the LLM.
        connector_parameters: of the connector with its newline vector: Stage 1 trains them.
        encoder_parameters: of the whole tower; None if unknown.
        encoder_flops: for all views, up to the feature layer; None where the encoder
            is no plain vision transformer.
        connector_flops: for all views.
        pixel_bytes: of the views' pixels.
        embedding_bytes: of the image embeddings.
        kv_cache_bytes: of their keys and values in all layers of the LLM; None
            without `llm_layers`.
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
) -> TokenBudget:
    """Count what one image costs.

    Args:
        encoder: its name, or its spec.
        connector: its recipe, such as `pixel_shuffle:factor=2+mlp`.
        image_size: (height, width) of the image in px; None for one of the view's size.
        tiler: its name, or one with options; None for the whole image as one view.
        layout: how views become one sequence; None for the tiler's own.
        llm_dim: H, width of the LLM.
        llm_layers: layers of the LLM, for the bytes of its cache.
        kv_dim: width of a layer's keys (key heads x head width); None for `llm_dim`,
            which is right without grouped queries.
        value_bytes: bytes of one number; 2 is bfloat16.

    Raises:
        VlmError: a name is unknown, or the tiler's tiles are not the encoder's views.
        TokenShapeError: the connector cannot take the tokens, or the layout not the connector's.
    """
    spec = encoder_spec(encoder) if isinstance(encoder, str) else encoder
    if not isinstance(tiler, Tiler):
        tiler = build_tiler("whole" if tiler is None else tiler, spec.image_size[0])
    tiler.check(spec)
    plan = tiler.plan(image_size or spec.image_size)
    tokens = spec.token_spec()
    out, parameters, connector_flops = measure_connector(connector, tokens, llm_dim)
    layout = layout or tiler.layout_for(out)
    total = layout.num_tokens(plan, out)
    per_layer = 2 * total * (llm_dim if kv_dim is None else kv_dim) * value_bytes
    flops = encoder_flops(spec)
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
        connector_parameters=parameters + llm_dim * layout.newline,
        encoder_parameters=spec.parameters or None,
        encoder_flops=None if flops is None else flops * plan.num_views,
        connector_flops=connector_flops * plan.num_views,
        pixel_bytes=plan.num_views * spec.num_pixels * value_bytes,
        embedding_bytes=total * llm_dim * value_bytes,
        kv_cache_bytes=None if llm_layers is None else per_layer * llm_layers,
    )


def encoder_flops(spec: EncoderSpec) -> int | None:
    """Count the FLOPs of one view up to the feature layer, in a plain vision transformer.

    With T = P + N tokens of width W and an MLP of hidden width M, a block takes
    8 T W^2 (queries, keys, values, output) + 4 T^2 W (attention) + 4 T W M (MLP; half as
    much again with a gate), and the patch embedding 6 N stride^2 W.

    Returns:
        FLOPs, two for one multiply-add; those of all parts in a joint; None for towers of
        stages, windows or convolutions.
    """
    if spec.encodings:
        counts = [(encoder_flops(part), times) for part, times in spec.encodings]
        return None if any(each is None for each, _ in counts) else sum((each or 0) * times for each, times in counts)
    width = spec.width
    if spec.stages or spec.windowed or not spec.mlp_dim:
        return None
    tokens = spec.token_spec()
    length = tokens.num_prefix + tokens.num_tokens
    matrices = 6 if spec.gated_mlp else 4
    block = 8 * length * width**2 + 4 * length**2 * width + matrices * length * width * spec.mlp_dim
    return spec.kept_layers * block + 6 * tokens.num_tokens * spec.stride**2 * width


@cache
def measure_connector(recipe: str, tokens: TokenSpec, llm_dim: int) -> tuple[TokenSpec, int, int]:
    """Measure a connector on the meta device, where nothing is computed.

    Args:
        recipe: the connector's.
        tokens: of one view, as the encoder gives them.
        llm_dim: H, width of the LLM.

    Returns:
        Its output for one view, its parameters, and its FLOPs.

    Raises:
        VlmError: the recipe cannot be read, or does not fit.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from connectors.recipe import build_connector
    from connectors.tokens import VisualTokens

    with torch.device("meta"):
        # Frozen in place of no_grad: the counter trips over a view of a parameter under no_grad.
        chain = build_connector(recipe, tokens, llm_dim).requires_grad_(requires_grad=False)
        prefix = torch.empty(1, tokens.num_prefix, tokens.dim) if tokens.num_prefix else None
        with FlopCounterMode(display=False) as counter:
            chain(VisualTokens(torch.empty(1, tokens.num_tokens, tokens.dim), tokens.grid, prefix))
    parameters = sum(parameter.numel() for parameter in chain.parameters())
    return chain.out_spec(tokens), parameters, counter.get_total_flops()
