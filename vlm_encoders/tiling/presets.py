"""Tilers by name: those of released models, and plain ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling.any_size import AnySizeTiler
from vlm_encoders.tiling.anyres import ONEVISION_GRIDS, AnyResTiler
from vlm_encoders.tiling.idefics import IdeficsTiler
from vlm_encoders.tiling.internvl import InternVLTiler
from vlm_encoders.tiling.naflex import NaFlexTiler
from vlm_encoders.tiling.pixtral import PixtralTiler
from vlm_encoders.tiling.qwen import Qwen2VLTiler
from vlm_encoders.tiling.s2 import DynamicS2Tiler, S2Tiler
from vlm_encoders.tiling.sliding import SlidingTiler
from vlm_encoders.tiling.tiler import Tiler
from vlm_encoders.tiling.uhd import UHDTiler
from vlm_encoders.tiling.ureader import DOCOWL_GRIDS, MonkeyTiler, UReaderTiler
from vlm_encoders.tiling.whole import WholeImage

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """A tiler by the name of a released model, or of what it does.

    Attributes:
        tiler: its class.
        options: what differs from the class's own defaults.
        encoder: the encoder that it was released with, or an ordinary one for it.
        image_size: side in px that this encoder is resized to; None for its own.
        connector: a recipe that gives as many tokens as the released connector.
        source: where its authors describe it.
    """

    tiler: type[Tiler]
    encoder: str
    connector: str
    source: str
    options: tuple[tuple[str, Any], ...] = ()
    image_size: int | None = None

    def spec(self) -> EncoderSpec:
        """Give the encoder's row in its size."""
        from vlm_encoders.registry import encoder_spec

        spec = encoder_spec(self.encoder)
        return spec if self.image_size is None else spec.resized(self.image_size)


_LLAVA = "https://arxiv.org/abs/2310.03744"
_NEXT = "https://llava-vl.github.io/blog/2024-01-30-llava-next/"
_ONEVISION = "https://arxiv.org/abs/2408.03326"
_INTERNVL = "https://arxiv.org/abs/2404.16821"

PRESETS: dict[str, Preset] = {
    "whole": Preset(WholeImage, "clip-vit-l-14-336", "mlp", _LLAVA, (("tile_size", 336),)),
    "squash": Preset(
        WholeImage,
        "siglip-so400m-14-384",
        "mlp",
        "https://arxiv.org/abs/2303.15343",
        (("tile_size", 384), ("resize", "squash")),
    ),
    "pad": Preset(WholeImage, "clip-vit-l-14-336", "mlp", _LLAVA, (("tile_size", 336), ("resize", "expand"))),
    "crop": Preset(
        WholeImage,
        "clip-vit-l-14-336",
        "mlp",
        "https://arxiv.org/abs/2103.00020",
        (("tile_size", 336), ("resize", "crop")),
    ),
    "anyres": Preset(AnyResTiler, "clip-vit-l-14-336", "mlp", _NEXT),
    "llava-next": Preset(AnyResTiler, "clip-vit-l-14-336", "mlp", _NEXT),
    "llava-onevision": Preset(
        AnyResTiler,
        "siglip-so400m-14-384",
        "mlp",
        _ONEVISION,
        (("tile_size", 384), ("grids", ONEVISION_GRIDS), ("cap", 9)),
    ),
    "internvl": Preset(InternVLTiler, "internvit-300m-14-448", "pixel_shuffle:factor=2+mlp", _INTERNVL),
    "tiles": Preset(
        SlidingTiler,
        "internvit-300m-14-448",
        "pixel_shuffle:factor=2+mlp",
        "https://arxiv.org/abs/2311.07575",
    ),
    "idefics3": Preset(
        IdeficsTiler,
        "siglip-so400m-14-384",
        "pixel_shuffle:factor=2+linear",
        "https://arxiv.org/abs/2408.12637",
        image_size=364,
    ),
    "smolvlm": Preset(
        IdeficsTiler,
        "siglip-b-16-512",
        "pixel_shuffle:factor=4+linear",
        "https://arxiv.org/abs/2504.05299",
        (("tile_size", 512),),
    ),
    "ureader": Preset(UReaderTiler, "clip-vit-l-14", "perceiver:queries=65+linear", "https://arxiv.org/abs/2310.05126"),
    "docowl": Preset(
        UReaderTiler,
        "clip-vit-l-14",
        "pixel_shuffle:factor=2+mlp",
        "https://arxiv.org/abs/2403.12895",
        (("tile_size", 448), ("grids", DOCOWL_GRIDS), ("markers", True)),
        image_size=448,
    ),
    "monkey": Preset(
        MonkeyTiler,
        "openclip-vit-bigg-14-laion2b",
        "perceiver:queries=256+linear",
        "https://arxiv.org/abs/2311.06607",
        image_size=448,
    ),
    "llava-uhd": Preset(
        UHDTiler,
        "aimv2-l-14-native",
        "perceiver:queries=64+linear",
        "https://arxiv.org/abs/2403.11703",
        (("slice_size", 336),),
    ),
    "minicpm-v": Preset(
        UHDTiler,
        "aimv2-l-14-native",
        "pixel_shuffle:factor=4+mlp",
        "https://arxiv.org/abs/2408.01800",
        (
            ("tile_size", 448),
            ("slice_size", 448),
            ("merge", 4),
            ("max_slices", 9),
            ("rounding", "nearest"),
            ("thumbnail", "first"),
            ("markers", False),
        ),
    ),
    "s2": Preset(S2Tiler, "clip-vit-l-14-336", "mlp", "https://arxiv.org/abs/2403.13043"),
    "dynamic-s2": Preset(
        DynamicS2Tiler,
        "siglip-so400m-14-384",
        "pixel_shuffle:factor=2+mlp",
        "https://arxiv.org/abs/2412.04468",
        image_size=448,
    ),
    "native": Preset(AnySizeTiler, "dinov3-vit-b-16", "mlp", "https://arxiv.org/abs/2508.10104"),
    # 128 to 4096 patches: bounds of our own, as its authors publish no rule for use.
    "aimv2-native": Preset(
        AnySizeTiler,
        "aimv2-l-14-native",
        "mlp",
        "https://arxiv.org/abs/2411.14402",
        (("patch", 14), ("min_pixels", 128 * 14**2), ("max_pixels", 4096 * 14**2)),
    ),
    "qwen2-vl": Preset(Qwen2VLTiler, "qwen2-vl-7b", "patch_merger", "https://arxiv.org/abs/2409.12191"),
    "qwen2.5-vl": Preset(Qwen2VLTiler, "qwen2.5-vl-7b", "patch_merger", "https://arxiv.org/abs/2502.13923"),
    "qwen3-vl": Preset(
        Qwen2VLTiler,
        "qwen3-vl-8b",
        "patch_merger",
        "https://arxiv.org/abs/2511.21631",
        # Of the released preprocessor; transformers has no class of its own for these images.
        (("patch", 16), ("min_pixels", 256**2), ("max_pixels", 4096**2)),
    ),
    "pixtral": Preset(PixtralTiler, "pixtral-12b", "mlp", "https://arxiv.org/abs/2410.07073"),
    "naflex": Preset(NaFlexTiler, "siglip2-naflex-b-16", "mlp", "https://arxiv.org/abs/2502.14786"),
    "timm-naflex": Preset(
        NaFlexTiler,
        "naflexvit-b-16",
        "mlp",
        "https://huggingface.co/timm/naflexvit_base_patch16_gap.e300_s576_in1k",
        # The filter of its data settings, and the patches of its training.
        (("interpolation", "bicubic"), ("max_patches", 576)),
    ),
}
"""The tilers by name."""
