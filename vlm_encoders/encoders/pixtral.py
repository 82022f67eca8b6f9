"""Pixtral 12B's vision tower by transformers: the last block, without any norm behind it."""

from __future__ import annotations

from vlm_encoders.encoders.qwen import ROTARY
from vlm_encoders.encoders.rows import CLIP_COLOURS
from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

SPECS = (
    EncoderSpec(
        name="pixtral-12b",
        family="pixtral",
        backend="transformers",
        source="PixtralVisionModel",
        weights="mistral-community/pixtral-12b",
        image_size=(1024, 1024),
        positions=ROTARY,
        packs=True,
        stride=16,
        dim=1024,
        heads=16,
        mlp_dim=4096,
        gated_mlp=True,
        num_layers=24,
        parameters=403_489_792,
        licence="Apache-2.0",
        reference="https://arxiv.org/abs/2410.07073",
        # The class's own default is gelu.
        options=(("hidden_act", "silu"),),
        **CLIP_COLOURS,
    ),
)
