"""C-RADIO by transformers: three CLS tokens and seven registers, and pixels normed inside."""

from __future__ import annotations

from typing import Any

from vlm_encoders.encoders.radio import POSITIONS
from vlm_encoders.encoders.towers.base import Tower
from vlm_encoders.spec import EncoderSpec, PrefixKind

__all__ = ["Radio"]


class Radio(Tower):
    """Source: transformers' `RadioModel`; it takes pixels from 0 to 1 and norms them itself."""

    source = "RadioModel"
    config = "RadioConfig"
    family = "radio"
    layers = "encoder.layer"
    norm = ""
    idle = ("embeddings.video_patch_projection",)
    dropped = r"embeddings\.video_patch_projection\."
    fixed = {"video_temporal_patch_size": None}  # noqa: RUF012
    loose = ("video_patch_dim", "image_size", "summary_idxs")
    positions = POSITIONS
    final_norm = False
    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)

    def mlp_of(self, spec: EncoderSpec) -> dict[str, Any]:
        """Give the hidden width as a ratio."""
        return {"mlp_ratio": spec.mlp_dim / spec.width}

    def mlp_spec(self, config: Any) -> dict[str, Any]:
        """Give the hidden width, before the gated one takes two thirds of it."""
        return {"mlp_dim": int(config.hidden_size * config.mlp_ratio), "gated_mlp": config.use_swiglu_ffn}

    def told(self, config: Any) -> tuple[str, ...]:
        """Add what follows from other entries."""
        return (*super().told(config), "mlp_ratio", "patch_dim", "video_patch_dim", "summary_idxs")

    def prefix_of(self, config: Any) -> tuple[PrefixKind, ...]:
        """Give CLS tokens and registers."""
        cls: tuple[PrefixKind, ...] = ("cls",)
        registers: tuple[PrefixKind, ...] = ("register",)
        kinds: tuple[PrefixKind, ...] = cls * config.num_cls_tokens + registers * config.num_registers
        return kinds
