"""InternViT: no norm behind the last block, and sizes in pairs."""

from __future__ import annotations

from typing import Any

from connectors.errors import VlmError
from vlm_encoders.encoders.towers.base import Tower
from vlm_encoders.spec import EncoderSpec

__all__ = ["InternViT"]


class InternViT(Tower):
    """Source: transformers' `InternVLVisionModel`."""

    source = "InternVLVisionModel"
    config = "InternVLVisionConfig"
    family = "internvit"
    fixed = {"use_mask_token": False}  # noqa: RUF012
    layers = "encoder.layer"
    dropped = r"(.*\.)?mask_token$|(vision_tower\.)?layernorm\."
    tables = "embeddings"
    final_norm = False

    def config_of(self, spec: EncoderSpec) -> dict[str, Any]:
        """Give ViT's entries, sizes as pairs."""
        side = self.side(spec)
        return super().config_of(spec) | {"image_size": [side, side], "patch_size": [spec.stride, spec.stride]}

    def spec_of(self, config: Any, owner: str) -> dict[str, Any]:
        """Give ViT's fields; whether there is a last norm is the config's to say.

        Raises:
            VlmError: the patches are not square.
        """
        high, wide = config.patch_size
        if high != wide:
            raise VlmError(f"{owner}: patches of {high}x{wide} px are not square; give a tower with square patches")
        return super().spec_of(config, owner) | {"stride": high, "final_norm": not config.use_mean_pooling}
