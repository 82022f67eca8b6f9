"""I-JEPA and TIPSv2 by transformers: the last block behind the final norm.

I-JEPA has no prefix; TIPSv2's two CLS tokens learnt from captions of the web and from
written ones. I-JEPA's colours are ImageNet's, as in its paper; the hub's preprocessor
files say mean 0.5 instead.
"""

from __future__ import annotations

from typing import Any

from vlm_encoders.encoders.rows import BICUBIC, IMAGENET, vit_row
from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_HUGE = EncoderSpec(
    name="ijepa-vit-h-14-1k",
    family="ijepa",
    backend="transformers",
    source="IJepaModel",
    weights="facebook/ijepa_vith14_1k",
    image_size=(224, 224),
    positions=BICUBIC,
    stride=14,
    dim=1280,
    heads=16,
    mlp_dim=5120,
    num_layers=32,
    final_norm=True,
    interpolation="bilinear",
    parameters=630_762_240,
    licence="CC-BY-NC-4.0",
    reference="https://arxiv.org/abs/2301.08243",
    options=(("layer_norm_eps", 1e-6),),
    **IMAGENET,
)
_GIANT: dict[str, Any] = {"stride": 16, "dim": 1408, "num_layers": 40, "mlp_dim": 6144}
_TIPS = EncoderSpec(
    name="tipsv2-vit-b-14",
    family="tipsv2",
    backend="transformers",
    source="Tipsv2VisionModel",
    weights="google/tipsv2-b14",
    image_size=(448, 448),
    positions="a learned table, resampled bilinearly in float32 with antialiasing",
    packs=True,
    stride=14,
    dim=768,
    heads=12,
    mlp_dim=3072,
    num_layers=12,
    num_prefix=2,
    prefix_kinds=("cls", "cls"),
    final_norm=True,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    interpolation="bilinear",
    parameters=86_315_520,
    licence="as on its model card",
    reference="https://github.com/google-deepmind/tips",
)

SPECS = (
    _HUGE,
    vit_row(_HUGE, "ijepa-vit-h-14-22k", "facebook/ijepa_vith14_22k", "h", 630_762_240),
    vit_row(_HUGE, "ijepa-vit-h-16-1k", "facebook/ijepa_vith16_1k", "h", 631_668_480, side=448, stride=16),
    vit_row(_HUGE, "ijepa-vit-g-16-22k", "facebook/ijepa_vitg16_22k", "h", 1_011_368_576, **_GIANT),
    _TIPS,
)
