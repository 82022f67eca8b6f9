"""SAM 3's image encoder by transformers: a ViT of windows and rotary places, without its pyramid."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from connectors.tokens import VisualTokens
from vlm_encoders.encoders.sam3 import POSITIONS
from vlm_encoders.encoders.towers.base import Tower
from vlm_encoders.spec import EncoderSpec

__all__ = ["Sam3"]


class Sam3(Tower):
    """Source: transformers' `Sam3ViTModel`; its one norm stands before the blocks, none behind them."""

    source = "Sam3ViTModel"
    config = "Sam3ViTConfig"
    family = "sam3"
    norm = ""
    loose = ("image_size",)
    positions = POSITIONS
    kinds = ()
    final_norm = False
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
    bilinear = True

    def config_of(self, spec: EncoderSpec) -> dict[str, Any]:
        """Give ViT's entries, built for the size of the views.

        The library reads a pair as (width, height): the other way round its angles would
        belong to other tokens in an oblong view.
        """
        height, width = spec.image_size
        return super().config_of(spec) | {"image_size": height if height == width else [width, height]}

    def side(self, spec: EncoderSpec) -> int:
        """Give any side: `config_of` states the size itself."""
        return spec.image_size[0]

    def mlp_spec(self, config: Any) -> dict[str, Any]:
        """Give the hidden width."""
        return {"mlp_dim": config.intermediate_size, "windowed": True}

    def tokens(self, hidden: Tensor, spec: EncoderSpec, layer: int) -> VisualTokens:
        """Give tokens of the last block (B, N, D), or of another one's map (B, R, C, D)."""
        return super().tokens(hidden.flatten(1, -2), spec, layer)
