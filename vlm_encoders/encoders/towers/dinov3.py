"""DINOv3's ViT: rotary positions, so any size, and registers behind the CLS token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_encoders.encoders.pack_views import ViewTokens
from vlm_encoders.encoders.towers.packing import PackingTower
from vlm_encoders.spec import EncoderSpec, PrefixKind

__all__ = ["Dinov3"]


class Dinov3(PackingTower):
    """Source: transformers' `DINOv3ViTModel`.

    In training the library may shift, stretch and rescale the angles at random: a draw for each
    size of view in a pack, so that there a pack is not what its views are alone.
    """

    source = "DINOv3ViTModel"
    config = "DINOv3ViTConfig"
    family = "dinov3"
    layers = "model.layer"
    norm = "norm"
    idle = ("embeddings.mask_token",)
    dropped = r"classifier\.|norm\."
    positions = "rotary angles of the patches' centres, from -1 to 1 along each side, in float32"
    bilinear = True

    def prefix_of(self, config: Any) -> tuple[PrefixKind, ...]:
        """CLS, then the registers."""
        return ("cls", *("register",) * config.num_register_tokens)

    def mlp_spec(self, config: Any) -> dict[str, Any]:
        """Give the hidden width, and whether it is gated."""
        return {"mlp_dim": config.intermediate_size, "gated_mlp": config.use_gated_mlp}

    def embed(self, network: Any, pixels: Tensor, spec: EncoderSpec) -> ViewTokens:
        """Make patches behind the prefix, whose own angles are 0: to turn by them changes no bit."""
        rows, columns = pixels.shape[2] // spec.stride, pixels.shape[3] // spec.stride
        pixels = pixels.to(network.embeddings.patch_embeddings.weight.dtype)
        cosine, sine = network.rope_embeddings(pixels)
        prefix = (spec.num_prefix, cosine.shape[1])
        rotary = torch.cat([cosine.new_ones(prefix), cosine]), torch.cat([sine.new_zeros(prefix), sine])
        return ViewTokens(network.embeddings(pixels), (rows, columns), rotary)

    def through(self, network: Any, hidden: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        """Run the blocks and the norm."""
        normed: Tensor = network.norm(network.model(hidden, position_embeddings=rotary).last_hidden_state)
        return normed
