"""SigLIP and the fixed-size SigLIP 2: no prefix, and the pooling head is not built."""

from __future__ import annotations

from vlm_encoders.encoders.towers.base import Tower

__all__ = ["Siglip"]


class Siglip(Tower):
    """Source: transformers' `SiglipVisionModel`."""

    source = "SiglipVisionModel"
    config = "SiglipVisionConfig"
    family = "siglip"
    fixed = {"vision_use_head": False}  # noqa: RUF012
    layers = "encoder.layers"
    norm = "post_layernorm"
    dropped = r"(text_model|logit_scale|logit_bias)\b|(vision_model\.)?(head|post_layernorm)\.|(.*\.)?position_ids$"
    tables = "embeddings"
    asked = True
    kinds = ()
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
