"""SAM 2.1's image encoders by transformers: Hiera's stages, and the pyramid level of stride 16 behind them.

`final_norm` stands for the pyramid: 256 channels of the third stage plus the fourth one's,
doubled in size, which SAM 2 takes as its image embedding. The finer levels are not built.
"""

from __future__ import annotations

from typing import Any

from vlm_encoders.encoders.rows import IMAGENET
from vlm_encoders.spec import EncoderSpec, Stage

__all__ = ["POSITIONS", "SPECS"]

POSITIONS = (
    "a learned table of a few rows, resampled bicubically in float32 without antialiasing, and one of a window, tiled"
)


def _row(size: str, width: int, heads: int, parameters: int, **trunk: Any) -> EncoderSpec:
    widths = tuple(width << place for place in range(4))
    options: dict[str, Any] = {"hidden_size": width, "num_attention_heads": heads, "embed_dim_per_stage": widths}
    options |= {"num_attention_heads_per_stage": tuple(heads << place for place in range(4)), **trunk}
    return EncoderSpec(
        name=f"sam2.1-hiera-{size}",
        family="sam2",
        backend="transformers",
        source="Sam2VisionModel",
        weights=f"facebook/sam2.1-hiera-{size}",
        image_size=(1024, 1024),
        positions=POSITIONS,
        packs=True,
        stride=16,
        dim=256,
        block_dim=width,
        stages=tuple(Stage(width << place, 4 << place) for place in range(4)),
        neck=Stage(256, 16),
        heads=heads,
        windowed=True,
        num_layers=4,
        final_norm=True,
        interpolation="bilinear",
        parameters=parameters,
        licence="Apache-2.0",
        reference="https://arxiv.org/abs/2408.00714",
        options=(("backbone_config", tuple(options.items())), ("backbone_channel_list", widths[::-1])),
        **IMAGENET,
    )


SPECS = (
    _row("tiny", 96, 1, 27_144_896, blocks_per_stage=(1, 2, 7, 2), global_attention_blocks=(5, 7, 9)),
    _row("small", 96, 1, 34_242_752, blocks_per_stage=(1, 2, 11, 2), global_attention_blocks=(7, 10, 13)),
    _row(
        "base-plus",
        112,
        2,
        69_020_288,
        blocks_per_stage=(2, 3, 16, 3),
        global_attention_blocks=(12, 16, 20),
        window_positional_embedding_background_size=(14, 14),
    ),
    _row(
        "large",
        144,
        2,
        212_592_176,
        blocks_per_stage=(2, 6, 36, 4),
        global_attention_blocks=(23, 33, 43),
        window_size_per_stage=(8, 4, 16, 8),
    ),
)
