"""Large images as several views: plan (integers), cut (pixels), layout (tokens)."""

from __future__ import annotations

from vlm_encoders.tiling.anyres import AnyResTiler, InternVLTiler, Tiler, WholeImage, build_tiler, tiler_from_config
from vlm_encoders.tiling.cut import cut
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.plan import LLAVA_NEXT_GRIDS, TilePlan, plan_internvl, plan_tiles, whole_image

__all__ = [
    "LLAVA_NEXT_GRIDS",
    "AnyResTiler",
    "InternVLTiler",
    "TileLayout",
    "TilePlan",
    "Tiler",
    "WholeImage",
    "build_tiler",
    "cut",
    "plan_internvl",
    "plan_tiles",
    "tiler_from_config",
    "whole_image",
]
