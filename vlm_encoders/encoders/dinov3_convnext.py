"""DINOv3's ConvNeXts by transformers: the last stage behind the final norm, or any stage's map."""

from __future__ import annotations

from vlm_encoders.encoders.rows import IMAGENET
from vlm_encoders.spec import EncoderSpec, Stage

__all__ = ["SPECS"]

_SHAPES = {"tiny": (96, 9), "small": (96, 27), "base": (128, 27), "large": (192, 27)}


def _row(size: str, parameters: int) -> EncoderSpec:
    width, depth = _SHAPES[size]
    widths = tuple(width << place for place in range(4))
    return EncoderSpec(
        name=f"dinov3-convnext-{size[0]}",
        family="dinov3",
        backend="transformers",
        source="DINOv3ConvNextModel",
        weights=f"facebook/dinov3-convnext-{size}-pretrain-lvd1689m",
        image_size=(224, 224),
        positions="none: convolutions alone",
        packs=True,
        stride=32,
        dim=widths[-1],
        block_dim=width,
        stages=tuple(Stage(width << place, 4 << place) for place in range(4)),
        num_layers=4,
        final_norm=True,
        interpolation="bilinear",
        parameters=parameters,
        licence="DINOv3 License",
        reference="https://arxiv.org/abs/2508.10104",
        options=(("hidden_sizes", widths), ("depths", (3, 3, depth, 3))),
        **IMAGENET,
    )


SPECS = (_row("tiny", 27_820_128), _row("small", 49_454_688), _row("base", 87_566_464), _row("large", 196_230_336))
