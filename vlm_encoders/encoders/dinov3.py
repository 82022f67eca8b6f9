"""DINOv3's ViTs by transformers: the last block behind the final norm, CLS and four registers apart.

In training the library would shift the rotary angles at random; that is off here, so
that an encoder in training mode gives the same tokens.
"""

from __future__ import annotations

from typing import Any

from vlm_encoders.encoders.rows import IMAGENET, vit_row
from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

_PLAIN = (("num_register_tokens", 4), ("pos_embed_rescale", None))
_GATED = (*_PLAIN, ("use_gated_mlp", True), ("hidden_act", "silu"))
_SMALL = EncoderSpec(
    name="dinov3-vit-s-16",
    family="dinov3",
    backend="transformers",
    source="DINOv3ViTModel",
    weights="facebook/dinov3-vits16-pretrain-lvd1689m",
    image_size=(224, 224),
    positions="rotary angles of the patches' centres, from -1 to 1 along each side, in float32",
    packs=True,
    stride=16,
    dim=384,
    heads=6,
    mlp_dim=1536,
    num_layers=12,
    num_prefix=5,
    prefix_kinds=("cls", *("register",) * 4),
    final_norm=True,
    interpolation="bilinear",
    parameters=21_596_160,
    licence="DINOv3 License",
    reference="https://arxiv.org/abs/2508.10104",
    options=_PLAIN,
    **IMAGENET,
)
_PLUS: dict[str, Any] = {"gated_mlp": True, "options": _GATED}
_GIANT: dict[str, Any] = {
    "dim": 4096,
    "num_layers": 40,
    "heads": 32,
    "mlp_dim": 8192,
    "gated_mlp": True,
    "options": (*_GATED, ("query_bias", False), ("value_bias", False)),
}


def _hub(word: str) -> str:
    return f"facebook/dinov3-vit{word}-pretrain-lvd1689m"


SPECS = (
    _SMALL,
    vit_row(_SMALL, "dinov3-vit-s-16-plus", _hub("s16plus"), "s", 28_692_480, **_PLUS),
    vit_row(_SMALL, "dinov3-vit-b-16", _hub("b16"), "b", 85_659_648),
    vit_row(_SMALL, "dinov3-vit-l-16", _hub("l16"), "l", 303_128_576),
    vit_row(_SMALL, "dinov3-vit-h-16-plus", _hub("h16plus"), "h", 840_591_360, heads=20, **_PLUS),
    vit_row(_SMALL, "dinov3-vit-7b-16", _hub("7b16"), "h", 6_716_030_976, **_GIANT),
)
