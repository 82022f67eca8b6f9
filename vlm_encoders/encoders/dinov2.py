"""DINOv2 with and without registers by transformers.

Tokens are the last block's behind the final norm. Views are 224 px, as the released
image processor makes them, though the position table is of 518 px: transformers
interpolates it, without antialiasing in the models without registers, where timm
antialiases (0.3 % apart off 518 px).
"""

from __future__ import annotations

from dataclasses import replace

from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_SMALL = EncoderSpec(
    name="dinov2-vit-s-14",
    family="dinov2",
    backend="transformers",
    source="Dinov2Model",
    weights="facebook/dinov2-small",
    image_size=(224, 224),
    trained_size=(518, 518),
    stride=14,
    dim=384,
    heads=6,
    mlp_dim=1536,
    num_layers=12,
    num_prefix=1,
    final_norm=True,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    resize="crop",
    crop_pct=224 / 256,
    parameters=22_056_192,
    licence="Apache-2.0",
    reference="https://arxiv.org/abs/2304.07193",
)
_BASE = replace(
    _SMALL,
    name="dinov2-vit-b-14",
    weights="facebook/dinov2-base",
    dim=768,
    heads=12,
    mlp_dim=3072,
    parameters=86_579_712,
)
_LARGE = replace(
    _BASE,
    name="dinov2-vit-l-14",
    weights="facebook/dinov2-large",
    dim=1024,
    heads=16,
    mlp_dim=4096,
    num_layers=24,
    parameters=304_367_616,
)


def _with_registers(spec: EncoderSpec, size: str, parameters: int) -> EncoderSpec:
    return replace(
        spec,
        name=f"{spec.name}-reg",
        source="Dinov2WithRegistersModel",
        weights=f"facebook/dinov2-with-registers-{size}",
        num_prefix=5,
        parameters=parameters,
        reference="https://arxiv.org/abs/2309.16588",
        options=(("num_register_tokens", 4),),
    )


SPECS = (
    _SMALL,
    _BASE,
    _LARGE,
    _with_registers(_SMALL, "small", 22_057_728),
    _with_registers(_BASE, "base", 86_582_784),
    _with_registers(_LARGE, "large", 304_371_712),
)
