"""For tests, ours and plugins': the contract of encoders, and LLMs of a few thousand weights."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from connectors.errors import UnknownNameError, VlmError
from connectors.registry import nearest
from connectors.tokens import VisualTokens
from vlm_encoders.encoder import Encoder
from vlm_encoders.registry import chosen_spec, create_encoder

__all__ = ["LLM_FAMILIES", "check_encoder", "tiny_llm"]

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_GEMMA: dict[str, Any] = {**_GROUPED, "head_dim": 8}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", _GEMMA),
    "gemma2": ("Gemma2", {**_GEMMA, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", {**_GEMMA, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gpt_neox": ("GPTNeoX", {}),
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": 16}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", _GROUPED),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 8}),
}
LLM_FAMILIES = tuple(_FAMILIES)
"""What `tiny_llm` can build."""


def check_encoder(name: str, *, device: str = "meta", **options: Any) -> None:
    """Hold an encoder, built with random weights, to its spec and to the contract.

    Tokens match the spec in number, width, grid and prefix, at the given batch; no
    block behind the feature layer is kept; `forward` lets gradients through to every
    parameter, none of which is idle, and `encode` tracks none. Where the spec says that views of
    many sizes are packed, the same holds for a pack of three.

    Args:
        name: as `create_encoder` takes it.
        device: "meta" computes shapes alone and so is quick for any size.
        **options: for `create_encoder`.

    Raises:
        VlmError: the encoder breaks the contract; the sentence says where.
    """
    with torch.device(device):
        encoder = create_encoder(name, pretrained=False, **options)
    spec = encoder.spec
    _check_blocks(encoder)
    pixels = torch.zeros(2, *encoder.pixel_shape, device=device, dtype=next(encoder.parameters()).dtype)
    visual = encoder(pixels)
    _check_tokens(encoder, visual, batch=2)
    _check_gradients(encoder, visual)
    # Packs are refused, rather than slow, where attention is not torch's own.
    if spec.packs and dict(spec.options).get("attn_implementation", "sdpa") == "sdpa":
        _check_packed(encoder, pixels)
    encoded = encoder.encode([Image.new("RGB", (50, 40), (200, 30, 90))])
    _check_tokens(encoder, encoded, batch=1)
    _require(not encoded.tokens.requires_grad, f"{name}: encode tracks gradients; leave encode to the base class")
    _require(encoder.origin.get("name") == name, f"{name}: its origin {encoder.origin} does not name it")
    known = chosen_spec(name, **spec.choices).token_spec()
    _require(known == encoder.token_spec, f"{name}: the table says {known}, the encoder {encoder.token_spec}")


def tiny_llm(family: str = "llama", *, seed: int = 0, vocab_size: int = 64, **options: Any) -> nn.Module:
    """Build a causal LM of two layers of width 32 with random weights, in eval mode.

    Args:
        family: one of `LLM_FAMILIES`.
        seed: of the weights; torch's own random state stays as it is.
        vocab_size: number of ids.
        **options: of the family's config, over the small ones.

    Raises:
        UnknownNameError: there is no such family.
    """
    import transformers

    if family not in _FAMILIES:
        raise UnknownNameError(f"no tiny LLM '{family}'; {nearest(family, list(_FAMILIES))}")
    stem, special = _FAMILIES[family]
    # Gemma 3 has a text config of its own beside that of the whole model.
    config_class = getattr(transformers, "Gemma3TextConfig" if family == "gemma3" else f"{stem}Config")
    config = config_class(**(_SHAPE | special | {"vocab_size": vocab_size} | options))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        llm: nn.Module = getattr(transformers, f"{stem}ForCausalLM")(config)
    return llm.eval()


def _check_tokens(encoder: Encoder, visual: VisualTokens, batch: int) -> None:
    name, expected = encoder.spec.name, encoder.token_spec
    _require(visual.spec == expected, f"{name}: the spec says {expected}, the tokens are {visual.spec}")
    _require(len(visual.tokens) == batch, f"{name}: {batch} views in, {len(visual.tokens)} out")


def _check_packed(encoder: Encoder, pixels: Tensor) -> None:
    """Hold a pack of three views to the contract."""
    spec = encoder.spec
    # Four tokens fill the blocks and windows by which some networks order them.
    side = 4 * max((stage.stride for stage in spec.stages), default=spec.stride)
    sizes = ((side, 2 * side), (side, side), (side, 2 * side))
    encoder.zero_grad()
    packed = encoder.forward_packed([pixels.new_zeros(3, *size) for size in sizes])
    for size, visual in zip(sizes, packed.split(), strict=True):
        expected = spec.token_spec(size)
        _require(visual.spec == expected, f"{spec.name}: at {size} px in a pack it gives {visual.spec}, not {expected}")
    prefix = None if packed.prefix is None else packed.prefix.flatten(0, 1)[None]
    _check_gradients(encoder, VisualTokens(packed.tokens[None], prefix=prefix))


def _check_gradients(encoder: Encoder, visual: VisualTokens) -> None:
    name = encoder.spec.name
    _require(visual.tokens.requires_grad, f"{name}: forward lets no gradient through; remove no_grad from it")
    parts = [visual.tokens] if visual.prefix is None else [visual.tokens, visual.prefix]
    torch.cat(parts, dim=1).sum().backward()
    idle = [key for key, parameter in encoder.named_parameters() if parameter.grad is None]
    # Data-parallel training stops at a parameter that no gradient reaches.
    _require(not idle, f"{name}: no token depends on {', '.join(idle[:3])}; drop what the tokens do not use")


def _check_blocks(encoder: Encoder) -> None:
    # create_encoder has counted them.
    name, blocks = encoder.spec.name, encoder.blocks()
    _require(len({id(block) for block in blocks}) == len(blocks), f"{name}: blocks() gives a block twice")
    own = {id(parameter) for parameter in encoder.parameters()}
    theirs = [parameter for block in blocks for parameter in block.parameters()]
    _require(
        all(isinstance(block, nn.Module) for block in blocks) and all(id(parameter) in own for parameter in theirs),
        f"{name}: blocks() gives parameters that are not the encoder's own",
    )


def _require(condition: bool, sentence: str) -> None:  # noqa: FBT001
    if not condition:
        raise VlmError(sentence)
