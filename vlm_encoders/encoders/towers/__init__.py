"""Vision classes of transformers: how each is built, cut, read and loaded; one module a family."""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm_encoders.encoders.towers.base import Tower

__all__ = ["MODEL_TYPES", "SOURCES", "tower", "tower_of"]

SOURCES = {
    "Aimv2VisionModel": "aimv2:Aimv2",
    "BeitModel": "beit:Beit",
    "CLIPVisionModel": "clip:Clip",
    "ConvNextModel": "convnext:ConvNext",
    "DINOv3ConvNextModel": "convnext:DinoConvNext",
    "DINOv3ViTModel": "dinov3:Dinov3",
    "DeiTModel": "vit:DeiT",
    "Dinov2Model": "dinov2:Dinov2",
    "Dinov2WithRegistersModel": "dinov2:Dinov2WithRegisters",
    "HieraModel": "hiera:Hiera",
    "IJepaModel": "vit:IJepa",
    "InternVLVisionModel": "internvit:InternViT",
    "MLCDVisionModel": "mlcd:Mlcd",
    "MetaClip2VisionModel": "clip:MetaClip2",
    "PixtralVisionModel": "pixtral:Pixtral",
    "Qwen2VisionTransformerPretrainedModel": "qwen:Qwen2",
    "Qwen2_5_VisionTransformerPretrainedModel": "qwen25:Qwen25",
    "Qwen3VLVisionModel": "qwen25:Qwen3",
    "RadioModel": "radio:Radio",
    "Sam2VisionModel": "sam2:Sam2",
    "Sam3ViTModel": "sam3:Sam3",
    "SamVisionModel": "sam:Sam",
    "Siglip2VisionModel": "naflex:NaFlex",
    "SiglipVisionModel": "siglip:Siglip",
    "SwinModel": "swin:Swin",
    "Swinv2Model": "swinv2:Swinv2",
    "Tipsv2VisionModel": "dinov2:Tipsv2",
    "ViTModel": "vit:ViT",
}
"""The class's name, as in `EncoderSpec.source`, and its tower: module and class of this package."""

MODEL_TYPES = {
    "aimv2": "Aimv2VisionModel",
    "aimv2_vision_model": "Aimv2VisionModel",
    "beit": "BeitModel",
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "convnext": "ConvNextModel",
    "deit": "DeiTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_convnext": "DINOv3ConvNextModel",
    "dinov3_vit": "DINOv3ViTModel",
    "hiera": "HieraModel",
    "ijepa": "IJepaModel",
    "internvl_vision": "InternVLVisionModel",
    "metaclip_2": "MetaClip2VisionModel",
    "metaclip_2_vision_model": "MetaClip2VisionModel",
    "mlcd": "MLCDVisionModel",
    "mlcd_vision_model": "MLCDVisionModel",
    "pixtral": "PixtralVisionModel",
    "qwen2_5_vl_vision": "Qwen2_5_VisionTransformerPretrainedModel",
    "qwen2_vl_vision": "Qwen2VisionTransformerPretrainedModel",
    "qwen3_vl_vision": "Qwen3VLVisionModel",
    "radio": "RadioModel",
    "sam": "SamVisionModel",
    "sam2_vision_model": "Sam2VisionModel",
    "sam3_vit_model": "Sam3ViTModel",
    "sam_vision_model": "SamVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "swin": "SwinModel",
    "swinv2": "Swinv2Model",
    "tipsv2": "Tipsv2VisionModel",
    "tipsv2_vision_model": "Tipsv2VisionModel",
    "vit": "ViTModel",
    # The class of its own hides and shuffles patches.
    "vit_mae": "ViTModel",
}
"""`model_type` of a config.json and the class that reads it."""


@cache
def tower(source: str) -> Tower | None:
    """Find the tower of a class of transformers, None if there is none."""
    target = SOURCES.get(source)
    if target is None:
        return None
    module, _, name = target.partition(":")
    found: Tower = getattr(importlib.import_module(f"{__name__}.{module}"), name)()
    return found


def tower_of(model_type: str) -> Tower | None:
    """Find the tower of a config's `model_type`, None if there is none."""
    return tower(MODEL_TYPES.get(model_type, ""))
