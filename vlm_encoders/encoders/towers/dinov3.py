"""DINOv3's ViT: rotary positions, so any size, and registers behind the CLS token."""

from __future__ import annotations

from typing import Any

from vlm_encoders.encoders.towers.base import Tower
from vlm_encoders.spec import PrefixKind

__all__ = ["Dinov3"]


class Dinov3(Tower):
    """Source: transformers' `DINOv3ViTModel`."""

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
