"""ViT, DINO and MAE by `ViTModel`, DeiT with its distillation token, I-JEPA without any prefix."""

from __future__ import annotations

from vlm_encoders.encoders.towers.base import Tower

__all__ = ["DeiT", "IJepa", "ViT"]


class ViT(Tower):
    """Source: transformers' `ViTModel`; it reads MAE's checkpoints too, whose own class shuffles the patches."""

    source = "ViTModel"
    config = "ViTConfig"
    family = "vit"
    arguments = {"add_pooling_layer": False}  # noqa: RUF012
    dropped = (
        r"(classifier|pooler|lm_head|decoder\w*|mask_token|head)\b|(vit\.)?(pooler|layernorm)\.|(.*\.)?mask_token$"
    )
    tables = "embeddings"
    asked = True
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
    bilinear = True


class DeiT(ViT):
    """Source: transformers' `DeiTModel`."""

    source = "DeiTModel"
    config = "DeiTConfig"
    family = "deit"
    dropped = (
        r"(cls_classifier|distillation_classifier|classifier|pooler|decoder)\b"
        r"|(deit\.)?(pooler|layernorm)\.|(.*\.)?mask_token$"
    )
    kinds = ("cls", "distillation")
    resize = "crop"
    bilinear = False
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)


class IJepa(ViT):
    """Source: transformers' `IJepaModel`."""

    source = "IJepaModel"
    config = "IJepaConfig"
    family = "ijepa"
    dropped = r"(classifier|pooler)\b|(ijepa\.)?(pooler|layernorm)\.|(.*\.)?mask_token$"
    kinds = ()
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
