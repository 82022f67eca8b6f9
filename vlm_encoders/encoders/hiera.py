"""Hiera by timm, as MAE trained it: four stages without convolutions or windows of their own, and no last norm."""

from __future__ import annotations

from vlm_encoders.spec import EncoderSpec, Stage

__all__ = ["SPECS"]


def _hiera(size: str, model: str, width: int, parameters: int) -> EncoderSpec:
    return EncoderSpec(
        name=f"hiera-{size}-224",
        family="hiera",
        backend="timm",
        source=f"hiera_{model}_224.mae",
        weights=f"timm/hiera_{model}_224.mae",
        image_size=(224, 224),
        positions="a learned table; another size resamples it, bicubic and antialiased, in float32",
        stride=32,
        dim=8 * width,
        stages=tuple(Stage(width << place, 4 << place) for place in range(4)),
        num_layers=4,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        resize="crop",
        crop_pct=0.9,
        parameters=parameters,
        licence="CC-BY-NC-4.0",
        reference="https://arxiv.org/abs/2306.00989",
    )


SPECS = (
    _hiera("t", "tiny", 96, 27_139_680),
    _hiera("s", "small", 96, 34_237_536),
    _hiera("b", "base", 96, 50_754_432),
    _hiera("b-plus", "base_plus", 112, 68_997_824),
    _hiera("l", "large", 144, 212_584_608),
    _hiera("h", "huge", 256, 670_726_656),
)
