"""EVA by timm: EVA-02 and EVA-L for images alone, EVA-CLIP with EVA-01's and EVA-02's towers.

EVA-02 has rotary angles and, up to its large size, gated MLPs. The towers for images alone
end without a norm. EVA-CLIP was trained on the whole shorter side, so its rows cut nothing
off it; timm's configs keep 0.9 of it at 224 px.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_TABLE = "a learned table, which another size resamples bicubically and antialiased in float32"
_BASE = EncoderSpec(
    name="eva02-b-14-448",
    family="eva02",
    backend="timm",
    source="eva02_base_patch14_448.mim_in22k_ft_in22k",
    weights="timm/eva02_base_patch14_448.mim_in22k_ft_in22k",
    image_size=(448, 448),
    positions=f"{_TABLE}, and rotary angles",
    stride=14,
    dim=768,
    heads=12,
    mlp_dim=2048,
    gated_mlp=True,
    num_layers=12,
    num_prefix=1,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    parameters=86_347_008,
    licence="MIT",
    reference="https://arxiv.org/abs/2303.11331",
)
_CLIP = replace(
    _BASE, family="eva-clip", final_norm=True, resize="crop", crop_pct=1.0, reference="https://arxiv.org/abs/2303.15389"
)
# Width, heads, MLP width, blocks.
_TINY = (192, 3, 512, 12)
_SMALL = (384, 6, 1024, 12)
_MIDDLE = (768, 12, 2048, 12)
_LARGE = (1024, 16, 2730, 24)
_FIRST_LARGE = (1024, 16, 4096, 24)
_GIANT = (1408, 16, 6144, 40)
_ENORMOUS = (1792, 16, 15360, 64)


def _row(base: EncoderSpec, name: str, source: str, parameters: int, shape: tuple[int, int, int, int]) -> EncoderSpec:
    # EVA-01's towers, and EVA-02's largest, have plain MLPs; EVA-01's have no rotary angles.
    dim, heads, mlp_dim, layers = shape
    gated, first = shape in {_TINY, _SMALL, _MIDDLE, _LARGE}, not source.startswith("eva02")
    patch, side = map(int, name.split("-")[-2:])
    return replace(
        base,
        name=name,
        source=source,
        weights=f"timm/{source}",
        image_size=(side, side),
        stride=patch,
        dim=dim,
        heads=heads,
        mlp_dim=mlp_dim,
        gated_mlp=gated,
        num_layers=layers,
        positions=_TABLE if first else base.positions,
        parameters=parameters,
    )


_SMALL_VIEWS = replace(_BASE, resize="crop", crop_pct=0.9)
SPECS = (
    _row(_SMALL_VIEWS, "eva02-t-14-224", "eva02_tiny_patch14_224.mim_in22k", 5_501_760, _TINY),
    _row(_SMALL_VIEWS, "eva02-s-14-224", "eva02_small_patch14_224.mim_in22k", 21_620_352, _SMALL),
    _row(_SMALL_VIEWS, "eva02-b-14-224", "eva02_base_patch14_224.mim_in22k", 85_757_184, _MIDDLE),
    _row(_SMALL_VIEWS, "eva02-l-14-224", "eva02_large_patch14_224.mim_m38m", 303_266_752, _LARGE),
    _BASE,
    _row(_BASE, "eva02-l-14-448", "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", 304_053_184, _LARGE),
    _row(
        replace(_BASE, family="eva", reference="https://arxiv.org/abs/2211.07636"),
        "eva-l-14-336", "eva_large_patch14_336.in22k_ft_in1k", 303_504_384, _FIRST_LARGE,
    ),
    _row(_CLIP, "eva-clip-b-16-224", "eva02_base_patch16_clip_224.merged2b", 85_869_312, _MIDDLE),
    _row(_CLIP, "eva-clip-l-14-224", "eva02_large_patch14_clip_224.merged2b", 303_317_952, _LARGE),
    _row(_CLIP, "eva-clip-l-14-336", "eva02_large_patch14_clip_336.merged2b", 303_645_632, _LARGE),
    _row(_CLIP, "eva-clip-g-14-224", "eva_giant_patch14_clip_224.laion400m", 1_011_146_112, _GIANT),
    _row(_CLIP, "eva-clip-g-plus-14-224", "eva_giant_patch14_clip_224.merged2b", 1_011_146_112, _GIANT),
    _row(_CLIP, "eva-clip-e-14-224", "eva02_enormous_patch14_clip_224.laion2b", 4_348_720_896, _ENORMOUS),
    _row(_CLIP, "eva-clip-e-plus-14-224", "eva02_enormous_patch14_clip_224.laion2b_plus", 4_348_720_896, _ENORMOUS),
)  # fmt: skip
