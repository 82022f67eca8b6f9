"""SwinV2 by transformers: Swin with biases from a small MLP, and windows that were fitted when it was built."""

from __future__ import annotations

from typing import Any

from vlm_encoders.encoders.towers.swin import Swin
from vlm_encoders.spec import EncoderSpec

__all__ = ["Swinv2"]


class Swinv2(Swin):
    """Source: transformers' `Swinv2Model`.

    A window is no larger than its stage at the native size, and keeps that size at others.
    """

    source = "Swinv2Model"
    config = "Swinv2Config"
    family = "swinv2"
    dropped = (
        r"(classifier|decoder)\.|(swinv2\.)?(layernorm\.|pooler\.|embeddings\.mask_token$)"
        r"|(.*\.)?(relative_position_index|relative_coords_table)$"
    )
    per_stage = ("num_heads", "pretrained_window_sizes")
    positions = "a bias for each offset within a window, computed by a small MLP; another size keeps the window"

    def check_windows(self, network: Any, spec: EncoderSpec) -> None:
        """Refuse nothing: a smaller stage is padded to its window."""
