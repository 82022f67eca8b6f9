"""Vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL by transformers: the last block, in front of the merger.

A view has sides of whole 2 x 2 patches: multiples of 28 px, of 32 px in Qwen3-VL.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_encoders.encoders.rows import CLIP_COLOURS
from vlm_encoders.spec import EncoderSpec

__all__ = ["ROTARY", "ROTARY_AND_TABLE", "SPECS"]

ROTARY = "rotary angles of the rows and columns, in float32"
ROTARY_AND_TABLE = (
    "a learned table, resampled bilinearly in float32 with aligned corners, and rotary angles of the rows and columns"
)

_QWEN2 = EncoderSpec(
    name="qwen2-vl-7b",
    family="qwen2_vl",
    backend="transformers",
    source="Qwen2VisionTransformerPretrainedModel",
    weights="Qwen/Qwen2-VL-7B-Instruct",
    image_size=(448, 448),
    positions=ROTARY,
    packs=True,
    stride=14,
    dim=1280,
    heads=16,
    mlp_dim=5120,
    num_layers=32,
    parameters=631_183_360,
    licence="Apache-2.0",
    reference="https://arxiv.org/abs/2409.12191",
    **CLIP_COLOURS,
)

SPECS = (
    replace(_QWEN2, name="qwen2-vl-2b", weights="Qwen/Qwen2-VL-2B-Instruct"),
    _QWEN2,
    replace(
        _QWEN2,
        name="qwen2.5-vl-7b",
        family="qwen2_5_vl",
        source="Qwen2_5_VisionTransformerPretrainedModel",
        weights="Qwen/Qwen2.5-VL-7B-Instruct",
        mlp_dim=3420,
        gated_mlp=True,
        windowed=True,
        parameters=631_975_680,
        reference="https://arxiv.org/abs/2502.13923",
    ),
    replace(
        _QWEN2,
        name="qwen3-vl-8b",
        family="qwen3_vl",
        source="Qwen3VLVisionModel",
        weights="Qwen/Qwen3-VL-8B-Instruct",
        image_size=(512, 512),
        trained_size=(768, 768),
        positions=ROTARY_AND_TABLE,
        stride=16,
        dim=1152,
        mlp_dim=4304,
        num_layers=27,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        parameters=415_891_440,
        reference="https://arxiv.org/abs/2511.21631",
    ),
)
