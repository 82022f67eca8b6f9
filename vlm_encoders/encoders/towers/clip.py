"""CLIP and MetaCLIP 2: no token is behind the final norm, which serves the CLS token's loss."""

from __future__ import annotations

from vlm_encoders.encoders.towers.base import Tower

__all__ = ["Clip", "MetaClip2"]


class Clip(Tower):
    """Source: transformers' `CLIPVisionModel`."""

    source = "CLIPVisionModel"
    config = "CLIPVisionConfig"
    family = "clip"
    layers = "encoder.layers"
    norm = "post_layernorm"
    norm_inside = False
    dropped = (
        r"(text_model|text_projection|visual_projection|logit_scale)\b"
        r"|(vision_model\.)?post_layernorm\.|(.*\.)?position_ids$"
    )
    tables = "embeddings"
    asked = True
    feature_layer = -2
    final_norm = False
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    resize = "crop"


class MetaClip2(Clip):
    """Source: transformers' `MetaClip2VisionModel`."""

    source = "MetaClip2VisionModel"
    config = "MetaClip2VisionConfig"
