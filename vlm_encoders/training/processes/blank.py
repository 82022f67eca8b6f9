"""What a process runs where it has no image, or no batch: the same modules as the others, with weight 0.

Processes that share gradients or weights wait for each other at each module. One whose batch is text alone, or
whose samples were all bad, would leave the others waiting for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from connectors.tokens import VisualTokens
from vlm_encoders.vlm.embed import dtype_of

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["anchor", "blank_batch", "has_images", "is_supervised"]


def has_images(batch: dict[str, Any]) -> bool:
    """Say whether a batch reaches the encoder or the connector."""
    views = batch.get("pixel_values")
    return batch.get("visual") is not None or (views is not None and len(views) > 0)


def is_supervised(batch: dict[str, Any]) -> bool:
    """Say whether a batch has a token that counts for the loss."""
    return bool((batch["labels"][:, 1:] != -100).any())


def blank_batch(model: VisionLanguageModel) -> dict[str, Any]:
    """Make a batch of two tokens of text, the second supervised."""
    token = 1 if model.image_token_id == 0 else 0
    ids = torch.full((1, 2), token, device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def anchor(model: VisionLanguageModel, *, images: bool) -> Tensor:
    """Give a zero () that depends on all that trains before the LLM.

    Args:
        model: what trains.
        images: whether the batch has images, so that encoder and connector run on them; else they run
            on a blank view.
    """
    zero = torch.zeros((), device=model.device)
    for parameter in model.connector.parameters():
        # Not all of a connector runs on all images, such as the vector at row ends. ZeRO-3 gathers the rest of it
        # only where it runs.
        if parameter.requires_grad and (parameter is model.newline or not hasattr(parameter, "ds_id")):
            zero = zero + (parameter.float() * 0.0).sum()
    return zero if images else zero + _blank_view(model)


def _blank_view(model: VisionLanguageModel) -> Tensor:
    """Run encoder and connector on a blank view, without layout: where scales are joined, a plan would be needed."""
    encoder, connector = model.encoder, model.connector
    pixels = torch.zeros(1, *encoder.pixel_shape, device=model.device, dtype=dtype_of(encoder))
    encoded = (encoder(pixels).tokens.float() * 0.0).sum()
    spec = model.layout.connector_spec(encoder.token_spec)
    dtype = dtype_of(connector) or encoded.dtype
    tokens = encoded.to(dtype).expand(1, spec.num_tokens, spec.dim)
    prefix = tokens[:, :1].expand(1, spec.num_prefix, spec.dim) if spec.num_prefix else None
    mapped: VisualTokens = connector(VisualTokens(tokens, spec.grid, prefix))
    return (mapped.tokens.float() * 0.0).sum()
