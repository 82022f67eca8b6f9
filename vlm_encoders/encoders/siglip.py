"""SigLIP and the fixed-size SigLIP 2 by transformers.

Tokens are `last_hidden_state`: the last block and the final norm, as in PaliGemma.
There is no CLS token, and the MAP head is not built. Fixed-size SigLIP 2 releases are
of SigLIP's class; they were released with a bilinear resize.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_BASE_224 = EncoderSpec(
    name="siglip-b-16-224",
    family="siglip",
    backend="transformers",
    source="SiglipVisionModel",
    weights="google/siglip-base-patch16-224",
    image_size=(224, 224),
    stride=16,
    dim=768,
    heads=12,
    mlp_dim=3072,
    num_layers=12,
    final_norm=True,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    parameters=85_797_120,
    licence="Apache-2.0",
    reference="https://arxiv.org/abs/2303.15343",
)
_SO400M_384 = replace(
    _BASE_224,
    name="siglip-so400m-14-384",
    weights="google/siglip-so400m-patch14-384",
    image_size=(384, 384),
    stride=14,
    dim=1152,
    heads=16,
    mlp_dim=4304,
    num_layers=27,
    parameters=412_987_248,
)
_V2 = "https://arxiv.org/abs/2502.14786"

SPECS = (
    _BASE_224,
    replace(
        _BASE_224,
        name="siglip-b-16-384",
        weights="google/siglip-base-patch16-384",
        image_size=(384, 384),
        parameters=86_088_960,
    ),
    _SO400M_384,
    replace(
        _BASE_224,
        name="siglip2-b-16-224",
        weights="google/siglip2-base-patch16-224",
        interpolation="bilinear",
        reference=_V2,
    ),
    replace(
        _SO400M_384,
        name="siglip2-so400m-14-384",
        weights="google/siglip2-so400m-patch14-384",
        interpolation="bilinear",
        reference=_V2,
    ),
)
