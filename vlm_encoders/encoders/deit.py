"""DeiT, its distilled form with two prefix tokens, and DINO, all by transformers.

Colours are ImageNet's and views the middle of a side of 256 for 224 px, as in the
papers; the hub's preprocessor files of DeiT and DINO say mean 0.5 instead.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_encoders.encoders.rows import BICUBIC, IMAGENET, vit_row
from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_BASE = EncoderSpec(
    name="deit-b-16-224",
    family="deit",
    backend="transformers",
    source="ViTModel",
    weights="facebook/deit-base-patch16-224",
    image_size=(224, 224),
    positions=BICUBIC,
    stride=16,
    dim=768,
    heads=12,
    mlp_dim=3072,
    num_layers=12,
    num_prefix=1,
    final_norm=True,
    resize="crop",
    crop_pct=224 / 256,
    parameters=85_798_656,
    licence="Apache-2.0",
    reference="https://arxiv.org/abs/2012.12877",
    **IMAGENET,
)
_DISTILLED = replace(
    _BASE,
    name="deit-distilled-b-16-224",
    source="DeiTModel",
    weights="facebook/deit-base-distilled-patch16-224",
    num_prefix=2,
    prefix_kinds=("cls", "distillation"),
    parameters=85_800_192,
)
_DINO = replace(
    _BASE,
    name="dino-vit-b-16",
    family="dino",
    weights="facebook/dino-vitb16",
    reference="https://arxiv.org/abs/2104.14294",
)

SPECS = (
    vit_row(_BASE, "deit-t-16-224", "facebook/deit-tiny-patch16-224", "t", 5_524_416),
    vit_row(_BASE, "deit-s-16-224", "facebook/deit-small-patch16-224", "s", 21_665_664),
    _BASE,
    vit_row(_BASE, "deit-b-16-384", "facebook/deit-base-patch16-384", "b", 86_090_496, side=384),
    vit_row(_DISTILLED, "deit-distilled-t-16-224", "facebook/deit-tiny-distilled-patch16-224", "t", 5_524_800),
    vit_row(_DISTILLED, "deit-distilled-s-16-224", "facebook/deit-small-distilled-patch16-224", "s", 21_666_432),
    _DISTILLED,
    vit_row(
        _DISTILLED, "deit-distilled-b-16-384", "facebook/deit-base-distilled-patch16-384", "b", 86_092_032, side=384
    ),
    vit_row(_DINO, "dino-vit-s-16", "facebook/dino-vits16", "s", 21_665_664),
    vit_row(_DINO, "dino-vit-s-8", "facebook/dino-vits8", "s", 21_670_272, stride=8),
    _DINO,
    vit_row(_DINO, "dino-vit-b-8", "facebook/dino-vitb8", "b", 85_807_872, stride=8),
)
