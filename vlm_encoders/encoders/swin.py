"""Swin and SwinV2 by timm: four stages, the last with one token for 32 x 32 px, behind the final norm.

Stochastic depth is off, so that an encoder in training mode gives the same tokens.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_encoders.spec import EncoderSpec, Stage

__all__ = ["SPECS"]


def _stages(width: int) -> tuple[Stage, ...]:
    return tuple(Stage(width << place, 4 << place) for place in range(4))


_TINY = EncoderSpec(
    name="swin-t-224",
    family="swin",
    backend="timm",
    source="swin_tiny_patch4_window7_224.ms_in22k_ft_in1k",
    weights="timm/swin_tiny_patch4_window7_224.ms_in22k_ft_in1k",
    image_size=(224, 224),
    positions="a bias for each offset within a window; another size keeps the window and its biases",
    stride=32,
    dim=768,
    block_dim=96,
    stages=_stages(96),
    heads=3,
    mlp_dim=384,
    windowed=True,
    num_layers=4,
    final_norm=True,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    resize="crop",
    crop_pct=0.9,
    parameters=27_519_354,
    licence="MIT",
    reference="https://arxiv.org/abs/2103.14030",
    options=(("drop_path_rate", 0.0),),
)
_WIDTHS = {"t": 96, "s": 96, "b": 128, "l": 192}


def _swin(name: str, source: str, parameters: int, *, base: EncoderSpec = _TINY) -> EncoderSpec:
    size, side = name.split("-")[1:]
    width = _WIDTHS[size]
    return replace(
        base,
        name=name,
        source=source,
        weights=f"timm/{source}",
        image_size=(int(side), int(side)),
        crop_pct=1.0 if side == "384" else 0.9,
        dim=8 * width,
        block_dim=width,
        stages=_stages(width),
        heads=width // 32,
        mlp_dim=4 * width,
        parameters=parameters,
    )


_V2 = replace(
    _TINY,
    family="swinv2",
    positions="a bias for each offset within a window, computed by a small MLP; another size keeps the window",
    reference="https://arxiv.org/abs/2111.09883",
)

SPECS = (
    _TINY,
    _swin("swin-s-224", "swin_small_patch4_window7_224.ms_in22k_ft_in1k", 48_837_258),
    _swin("swin-b-224", "swin_base_patch4_window7_224.ms_in22k", 86_743_224),
    _swin("swin-b-384", "swin_base_patch4_window12_384.ms_in22k", 86_878_584),
    _swin("swin-l-224", "swin_large_patch4_window7_224.ms_in22k", 194_995_476),
    _swin("swin-l-384", "swin_large_patch4_window12_384.ms_in22k", 195_198_516),
    _swin("swinv2-t-256", "swinv2_tiny_window8_256.ms_in1k", 27_578_154, base=_V2),
    _swin("swinv2-s-256", "swinv2_small_window16_256.ms_in1k", 48_959_418, base=_V2),
    _swin("swinv2-b-192", "swinv2_base_window12_192.ms_in22k", 86_893_816, base=_V2),
    _swin("swinv2-b-256", "swinv2_base_window12to16_192to256.ms_in22k_ft_in1k", 86_893_816, base=_V2),
    _swin("swinv2-b-384", "swinv2_base_window12to24_192to384.ms_in22k_ft_in1k", 86_893_816, base=_V2),
    _swin("swinv2-l-192", "swinv2_large_window12_192.ms_in22k", 195_202_932, base=_V2),
    _swin("swinv2-l-256", "swinv2_large_window12to16_192to256.ms_in22k_ft_in1k", 195_202_932, base=_V2),
    _swin("swinv2-l-384", "swinv2_large_window12to24_192to384.ms_in22k_ft_in1k", 195_202_932, base=_V2),
)
