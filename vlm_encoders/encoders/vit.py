"""ViT and MAE by transformers' `ViTModel`: the last block behind the final norm, CLS apart.

ViT's views are squashed bilinearly, as its released image processors do. MAE's are
cut out of the middle, as its authors evaluate; its own class hides and shuffles patches.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_encoders.encoders.rows import BICUBIC, HALVES, IMAGENET, vit_row
from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_BASE = EncoderSpec(
    name="vit-b-16-224",
    family="vit",
    backend="transformers",
    source="ViTModel",
    weights="google/vit-base-patch16-224-in21k",
    image_size=(224, 224),
    positions=BICUBIC,
    stride=16,
    dim=768,
    heads=12,
    mlp_dim=3072,
    num_layers=12,
    num_prefix=1,
    final_norm=True,
    interpolation="bilinear",
    parameters=85_798_656,
    licence="Apache-2.0",
    reference="https://arxiv.org/abs/2010.11929",
    **HALVES,
)
_MAE = replace(
    _BASE,
    name="mae-vit-b-16",
    weights="facebook/vit-mae-base",
    interpolation="bicubic",
    resize="crop",
    crop_pct=224 / 256,
    licence="CC-BY-NC-4.0",
    reference="https://arxiv.org/abs/2111.06377",
    **IMAGENET,
)

SPECS = (
    vit_row(_BASE, "vit-s-16-224", "WinKawaks/vit-small-patch16-224", "s", 21_665_664),
    _BASE,
    vit_row(_BASE, "vit-b-16-384", "google/vit-base-patch16-384", "b", 86_090_496, side=384),
    vit_row(_BASE, "vit-b-32-384", "google/vit-base-patch32-384", "b", 87_528_192, side=384, stride=32),
    vit_row(_BASE, "vit-l-16-224", "google/vit-large-patch16-224-in21k", "l", 303_301_632),
    vit_row(_BASE, "vit-l-16-384", "google/vit-large-patch16-384", "l", 303_690_752, side=384),
    vit_row(_BASE, "vit-h-14-224", "google/vit-huge-patch14-224-in21k", "h", 630_764_800, stride=14),
    _MAE,
    vit_row(_MAE, "mae-vit-l-16", "facebook/vit-mae-large", "l", 303_301_632),
    vit_row(_MAE, "mae-vit-h-14", "facebook/vit-mae-huge", "h", 630_764_800, stride=14),
)
