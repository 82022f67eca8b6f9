"""AIMv2: RMS norms and gated MLPs without a prefix; fixed tables, or sines of any size in the native one."""

from __future__ import annotations

from typing import Any

from vlm_encoders.encoders.towers.base import Tower

__all__ = ["Aimv2"]


class Aimv2(Tower):
    """Source: transformers' `Aimv2VisionModel`."""

    source = "Aimv2VisionModel"
    config = "Aimv2VisionConfig"
    family = "aimv2"
    fixed = {"use_head": False}  # noqa: RUF012
    layers = "encoder.layers"
    norm = "rms_norm"
    dropped = (
        r"(text_model|text_projection|visual_projection|logit_scale)\b"
        r"|(vision_model\.)?(head|rms_norm)\.|(.*\.)?position_ids$"
    )
    positions = "a learned table of one size"
    kinds = ()
    sizes = "native"
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    resize = "crop"

    def mlp_spec(self, config: Any) -> dict[str, Any]:
        """Give the hidden width of the gated MLP."""
        return {"mlp_dim": config.intermediate_size, "gated_mlp": True}

    def spec_of(self, config: Any, owner: str) -> dict[str, Any]:
        """Give ViT's fields; the native one has no table, and so any size."""
        fields = super().spec_of(config, owner)
        if config.is_native:
            fields |= {"sizes": "any", "positions": "sines of the rows and columns, in the parameters' dtype"}
        return fields
