"""MLCD: CLIP's shape with rotary positions in place of a table."""

from __future__ import annotations

from vlm_encoders.encoders.towers.clip import Clip

__all__ = ["Mlcd"]


class Mlcd(Clip):
    """Source: transformers' `MLCDVisionModel`."""

    source = "MLCDVisionModel"
    config = "MLCDVisionConfig"
    family = "mlcd"
    tables = ""
    asked = False
    positions = "rotary angles of the rows and columns, in float32"
