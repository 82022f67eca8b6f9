"""Large images as views: plan (integers), cut (pixels), layout (tokens)."""

from __future__ import annotations

from vlm_encoders.tiling.any_size import AnySizeTiler
from vlm_encoders.tiling.anyres import LLAVA_NEXT_GRIDS, ONEVISION_GRIDS, AnyResTiler, plan_tiles
from vlm_encoders.tiling.build import build_tiler, tiler_from_config
from vlm_encoders.tiling.cut import cut
from vlm_encoders.tiling.idefics import IdeficsTiler
from vlm_encoders.tiling.internvl import InternVLTiler, plan_internvl
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.markers import Markers
from vlm_encoders.tiling.naflex import NaFlexTiler
from vlm_encoders.tiling.native import NativeTiler
from vlm_encoders.tiling.pixtral import PixtralTiler
from vlm_encoders.tiling.plan import Box, Page, Size, TilePlan
from vlm_encoders.tiling.presets import PRESETS
from vlm_encoders.tiling.qwen import Qwen2VLTiler
from vlm_encoders.tiling.s2 import DynamicS2Tiler, S2Tiler
from vlm_encoders.tiling.sliding import SlidingTiler
from vlm_encoders.tiling.tiler import Tiler
from vlm_encoders.tiling.uhd import UHDTiler
from vlm_encoders.tiling.ureader import MonkeyTiler, UReaderTiler
from vlm_encoders.tiling.whole import WholeImage, whole_image

__all__ = [
    "LLAVA_NEXT_GRIDS",
    "ONEVISION_GRIDS",
    "PRESETS",
    "AnyResTiler",
    "AnySizeTiler",
    "Box",
    "DynamicS2Tiler",
    "IdeficsTiler",
    "InternVLTiler",
    "Markers",
    "MonkeyTiler",
    "NaFlexTiler",
    "NativeTiler",
    "Page",
    "PixtralTiler",
    "Qwen2VLTiler",
    "S2Tiler",
    "Size",
    "SlidingTiler",
    "TileLayout",
    "TilePlan",
    "Tiler",
    "UHDTiler",
    "UReaderTiler",
    "WholeImage",
    "build_tiler",
    "cut",
    "plan_internvl",
    "plan_tiles",
    "tiler_from_config",
    "whole_image",
]
