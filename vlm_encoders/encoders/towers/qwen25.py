"""Vision towers of Qwen2.5-VL and Qwen3-VL by transformers, in front of their merger."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from connectors.tokens import Grid
from vlm_encoders.encoders.pack_views import Places
from vlm_encoders.encoders.qwen import ROTARY_AND_TABLE
from vlm_encoders.encoders.towers.qwen import Qwen2
from vlm_encoders.encoders.towers.qwen_order import drop_windows, token_windows
from vlm_encoders.spec import EncoderSpec

__all__ = ["Qwen3", "Qwen25"]


class Qwen25(Qwen2):
    """Source: transformers' `Qwen2_5_VisionTransformerPretrainedModel`; most blocks attend within windows."""

    source = "Qwen2_5_VisionTransformerPretrainedModel"
    config = "Qwen2_5_VLVisionConfig"
    module = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
    family = "qwen2_5_vl"
    width = "hidden_size"
    merged = "out_hidden_size"

    def mlp_of(self, spec: EncoderSpec) -> dict[str, Any]:
        """Give the hidden width."""
        return {"intermediate_size": spec.mlp_dim}

    def mlp_spec(self, config: Any) -> dict[str, Any]:
        """Give the hidden width of the gated MLP."""
        return {"mlp_dim": config.intermediate_size, "gated_mlp": True, "windowed": True}

    def prepare(self, network: Any, spec: EncoderSpec) -> None:
        """Drop the merger, and let windows be told token by token, as they must be where some are dropped."""
        super().prepare(network, spec)
        network.spatial_merge_unit = 1

    def sequence(
        self, network: Any, grids: Sequence[Grid], places: Places
    ) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """Add the order of windows, in which the network gives its tokens."""
        from transformers.vision_utils import get_vision_window_index

        known, order, chosen = super().sequence(network, grids, places)
        merge = network.spatial_merge_size
        shapes = torch.tensor([[1, *grid] for grid in grids])
        units, bounds = get_vision_window_index(shapes, merge, network.window_size, network.patch_size)
        windows = token_windows(units, merge**2)
        if chosen is not None:
            windows, bounds = drop_windows(windows, bounds, chosen)
        return known | {"window_index": windows, "cu_window_seqlens": bounds}, order[windows], chosen


class Qwen3(Qwen2):
    """Source: transformers' `Qwen3VLVisionModel`; the features for its LLM's early layers are left out."""

    source = "Qwen3VLVisionModel"
    config = "Qwen3VLVisionConfig"
    module = "transformers.models.qwen3_vl.modeling_qwen3_vl"
    family = "qwen3_vl"
    fixed = {"deepstack_visual_indexes": []}  # noqa: RUF012
    width = "hidden_size"
    merged = "out_hidden_size"
    positions = ROTARY_AND_TABLE
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def native_side(self, config: Any) -> int:
        """Give the side of the table of places, px."""
        side: int = isqrt(config.num_position_embeddings) * config.patch_size
        return side

    def mlp_of(self, spec: EncoderSpec) -> dict[str, Any]:
        """Give the hidden width."""
        return {"intermediate_size": spec.mlp_dim}

    def mlp_spec(self, config: Any) -> dict[str, Any]:
        """Give the hidden width."""
        return {"mlp_dim": config.intermediate_size}

    def places(self, network: Any, grids: Tensor) -> dict[str, Tensor]:
        """Add where the table is read."""
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        index, weights = get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=network.num_grid_per_side,
            mode=network.interpolation_mode,
            align_corners=network.interpolation_align_corners,
            spatial_merge_size=network.spatial_merge_size,
        )
        return super().places(network, grids) | {"interp_indices": index, "interp_weights": weights}
