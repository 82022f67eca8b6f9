"""Pixtral's vision tower by transformers: rotary places of any grid, without the mask between images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_encoders.encoders.pack_views import ViewTokens
from vlm_encoders.encoders.qwen import ROTARY
from vlm_encoders.encoders.towers.packing import PackingTower
from vlm_encoders.spec import EncoderSpec

__all__ = ["Pixtral"]


class Pixtral(PackingTower):
    """Source: transformers' `PixtralVisionModel`.

    The library packs all images into one sequence with a mask between them, so that attention
    costs the square of them all. Views of one size need neither sequence nor mask, and in a
    pack of many sizes each attends to itself.
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
        views = self.embed(network, pixels, spec)
        return self.through(network, views.hidden, views.rotary)

    def embed(self, network: Any, pixels: Tensor, spec: EncoderSpec) -> ViewTokens:
        """Make normed patches, and the angles of their rows and columns."""
        maps = network.patch_conv(pixels.to(network.patch_conv.weight.dtype))
        rows, columns = maps.shape[-2:]
        embedded = network.ln_pre(maps.flatten(2).transpose(1, 2))
        places = torch.cartesian_prod(
            torch.arange(rows, device=pixels.device), torch.arange(columns, device=pixels.device)
        )
        return ViewTokens(embedded, (rows, columns), network.patch_positional_embedding(embedded, places))

    def through(self, network: Any, hidden: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        """Run the blocks."""
        found = network.transformer(hidden, attention_mask=None, position_embeddings=rotary)
        last: Tensor = found.last_hidden_state
        return last
