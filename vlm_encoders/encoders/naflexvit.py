"""NaFlexViT by timm: ViTs trained on views of many sizes and shapes, with four registers and no CLS token.

timm says no more of their pixels than 384 px; a view of another shape is as good.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_BASE = EncoderSpec(
    name="naflexvit-b-16",
    family="naflexvit",
    backend="timm",
    source="naflexvit_base_patch16_gap.e300_s576_in1k",
    weights="timm/naflexvit_base_patch16_gap.e300_s576_in1k",
    image_size=(384, 384),
    positions="a learned table, brought to each view's grid in the forward pass, bicubic and antialiased, in float32",
    packs=True,
    stride=16,
    dim=768,
    heads=12,
    mlp_dim=3072,
    num_layers=12,
    num_prefix=4,
    prefix_kinds=("register",) * 4,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    resize="crop",
    parameters=85_863_168,
    licence="Apache-2.0",
    reference="https://huggingface.co/timm/naflexvit_base_patch16_gap.e300_s576_in1k",
)


def _variant(suffix: str, model: str, parameters: int) -> EncoderSpec:
    source = f"naflexvit_base_patch16_{model}.e300_s576_in1k"
    return replace(
        _BASE,
        name=f"naflexvit-b-16-{suffix}",
        source=source,
        weights=f"timm/{source}",
        parameters=parameters,
        reference=f"https://huggingface.co/timm/{source}",
    )


SPECS = (
    _BASE,
    # Trained on views that keep their shape; the second has a table each for rows and columns.
    _variant("par", "par_gap", 85_863_168),
    _variant("parfac", "parfac_gap", 85_691_136),
)
