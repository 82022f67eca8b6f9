"""What encoders and connectors cost by their shapes alone: operations and parameters."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING

from connectors.tokens import TokenSpec, VisualTokens
from vlm_encoders.spec import EncoderSpec

if TYPE_CHECKING:
    from connectors.chain import Chain

__all__ = ["chain_flops", "encoder_flops", "measure_connector", "meta_chain", "num_parameters"]


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
    chain = meta_chain(recipe, tokens, llm_dim)
    return chain.out_spec(tokens), num_parameters(chain), chain_flops(chain, tokens)


@lru_cache(maxsize=64)
def meta_chain(recipe: str, tokens: TokenSpec, llm_dim: int) -> Chain:
    """Build a connector on the meta device, where it has shapes and no numbers; it is shared, so left as it is.

    Raises:
        VlmError: the recipe cannot be read, or does not fit.
    """
    import torch

    from connectors.recipe import build_connector

    with torch.device("meta"):
        # Frozen in place of no_grad: the counter trips over a view of a parameter under no_grad.
        return build_connector(recipe, tokens, llm_dim).requires_grad_(requires_grad=False)


def num_parameters(chain: Chain) -> int:
    """Count the parameters of a connector."""
    return sum(parameter.numel() for parameter in chain.parameters())


@lru_cache(maxsize=1024)
def chain_flops(chain: Chain, tokens: TokenSpec) -> int:
    """Count the FLOPs of one view of these tokens."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        prefix = torch.empty(1, tokens.num_prefix, tokens.dim) if tokens.num_prefix else None
        chain(VisualTokens(torch.empty(1, tokens.num_tokens, tokens.dim), tokens.grid, prefix))
    flops: int = counter.get_total_flops()
    return flops
