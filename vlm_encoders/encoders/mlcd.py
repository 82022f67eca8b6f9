"""MLCD's bigG by transformers: CLIP's shape with rotary positions, so any size, read as CLIP is."""

from __future__ import annotations

from dataclasses import replace

from vlm_encoders.encoders.rows import CLIP_COLOURS
from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_FIRST = EncoderSpec(
    name="mlcd-vit-bigg-14-336",
    family="mlcd",
    backend="transformers",
    source="MLCDVisionModel",
    weights="DeepGlint-AI/mlcd-vit-bigG-patch14-336",
    image_size=(336, 336),
    positions="rotary angles of the rows and columns, in float32",
    stride=14,
    dim=1664,
    heads=16,
    mlp_dim=8192,
    num_layers=48,
    num_prefix=1,
    feature_layer=-2,
    resize="crop",
    parameters=1_842_349_748,
    licence="MIT",
    reference="https://arxiv.org/abs/2407.17331",
    **CLIP_COLOURS,
)

SPECS = (
    _FIRST,
    replace(
        _FIRST,
        name="mlcd-vit-bigg-14-448",
        weights="DeepGlint-AI/mlcd-vit-bigG-patch14-448",
        image_size=(448, 448),
    ),
)
