"""Pixtral's vision tower by transformers: rotary places of any grid; views of one size in a plain batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_encoders.encoders.qwen import ROTARY
from vlm_encoders.encoders.towers.base import Tower
from vlm_encoders.spec import EncoderSpec

__all__ = ["Pixtral"]


class Pixtral(Tower):
    """Source: transformers' `PixtralVisionModel`.

    The library packs all images into one sequence with a mask between them; views of one
    size need neither, and attention then costs no more for many than for each alone.
    """

    source = "PixtralVisionModel"
    config = "PixtralVisionConfig"
    family = "pixtral"
    layers = "transformer.layers"
    norm = ""
    dropped = r"(multi_modal_projector|language_model|lm_head)\b"
    positions = ROTARY
    kinds = ()
    final_norm = False
    free = True
    loose = ("image_size", "head_dim")
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)

    def mlp_spec(self, config: Any) -> dict[str, Any]:
        """Give the hidden width of the gated MLP."""
        return {"mlp_dim": config.intermediate_size, "gated_mlp": True}

    def told(self, config: Any) -> tuple[str, ...]:
        """Add what follows from other entries."""
        return (*super().told(config), "head_dim")

    def last_hidden(self, network: Any, pixels: Tensor, spec: EncoderSpec) -> Tensor:
        """Run the network's parts over a batch (B, N, D)."""
        maps = network.patch_conv(pixels.to(network.patch_conv.weight.dtype))
        rows, columns = maps.shape[-2:]
        embedded = network.ln_pre(maps.flatten(2).transpose(1, 2))
        places = torch.cartesian_prod(
            torch.arange(rows, device=pixels.device), torch.arange(columns, device=pixels.device)
        )
        angles = network.patch_positional_embedding(embedded, places)
        hidden: Tensor = network.transformer(
            embedded, attention_mask=None, position_embeddings=angles
        ).last_hidden_state
        return hidden
