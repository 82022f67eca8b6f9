"""Perception Encoder by timm: core for whole images, lang for language models, spatial for dense tasks.

timm's configs cut the middle out and resize bicubically; the release squashes views and
resizes bilinearly (its `core/vision_encoder/transforms.py`), and so do these rows.
"""

from __future__ import annotations

from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_SIZES = {  # timm's word, width, heads
    "t": ("tiny", 192, 3),
    "s": ("small", 384, 6),
    "b": ("base", 768, 12),
    "l": ("large", 1024, 16),
    "g": ("gigantic", 1536, 16),
}


def _pe(name: str, parameters: int, layers: int, *, mlp_dim: int = 0, final_norm: bool = True) -> EncoderSpec:
    kind, size, patch, side = name.split("-")[1:5]
    model, dim, heads = _SIZES[size]
    source = f"vit_pe_{kind}_{model}_patch{patch}_{side}.fb"
    return EncoderSpec(
        name=name,
        family="pe",
        backend="timm",
        source=source,
        weights=f"timm/{source}",
        image_size=(int(side), int(side)),
        positions="a learned table, resampled bicubically and antialiased in float32 for another size; rotary angles",
        stride=int(patch),
        dim=dim,
        heads=heads,
        mlp_dim=mlp_dim or 4 * dim,
        num_layers=layers,
        num_prefix=0 if size == "g" else 1,
        final_norm=final_norm,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bilinear",
        parameters=parameters,
        licence="Apache-2.0",
        reference="https://arxiv.org/abs/2504.13181",
    )


SPECS = (
    _pe("pe-core-t-16-384", 5_597_568, 12),
    _pe("pe-core-s-16-384", 21_811_968, 12),
    _pe("pe-core-b-16-224", 85_799_424, 12),
    _pe("pe-core-l-14-336", 303_507_456, 24),
    _pe("pe-core-g-14-448", 1_851_736_576, 50, mlp_dim=8960),
    _pe("pe-lang-l-14-448", 291_415_040, 23, final_norm=False),
    _pe("pe-lang-g-14-448", 1_740_922_624, 47, mlp_dim=8960, final_norm=False),
    _pe("pe-spatial-t-16-512", 5_683_200, 12, final_norm=False),
    _pe("pe-spatial-s-16-512", 21_983_232, 12, final_norm=False),
    _pe("pe-spatial-b-16-512", 86_433_792, 12, final_norm=False),
    _pe("pe-spatial-l-14-448", 303_964_160, 24, final_norm=False),
    _pe("pe-spatial-g-14-448", 1_851_887_104, 50, mlp_dim=8960, final_norm=False),
)
