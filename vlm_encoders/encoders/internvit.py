"""InternViT 2.5 by transformers' `InternVLVisionModel`: the last block, behind which there is no norm.

The hub's repositories hold the authors' own layout, which is renamed while it is loaded.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_encoders.encoders.rows import BICUBIC, IMAGENET
from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_SMALL = EncoderSpec(
    name="internvit-300m-14-448",
    family="internvit",
    backend="transformers",
    source="InternVLVisionModel",
    weights="OpenGVLab/InternViT-300M-448px-V2_5",
    image_size=(448, 448),
    positions=BICUBIC,
    stride=14,
    dim=1024,
    heads=16,
    mlp_dim=4096,
    num_layers=24,
    num_prefix=1,
    parameters=304_012_288,
    licence="MIT",
    reference="https://arxiv.org/abs/2412.05271",
    options=(("attention_bias", True),),
    **IMAGENET,
)

SPECS = (
    _SMALL,
    replace(
        _SMALL,
        name="internvit-6b-14-448",
        weights="OpenGVLab/InternViT-6B-448px-V2_5",
        dim=3200,
        heads=25,
        mlp_dim=12800,
        num_layers=45,
        parameters=5_536_496_000,
        options=(("use_qk_norm", True), ("norm_type", "rms_norm")),
    ),
)
