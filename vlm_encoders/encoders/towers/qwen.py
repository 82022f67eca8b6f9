"""Vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL by transformers, in front of their merger."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from connectors.errors import VlmError
from connectors.tokens import Grid, VisualTokens
from vlm_encoders.encoders.qwen import ROTARY, ROTARY_AND_TABLE
from vlm_encoders.encoders.towers.base import Tower
from vlm_encoders.resample import join_channels
from vlm_encoders.spec import EncoderSpec

__all__ = ["Qwen2", "Qwen3", "Qwen25"]


class Qwen2(Tower):
    """Source: transformers' `Qwen2VisionTransformerPretrainedModel`.

    A view becomes patches in the order of `Qwen2VLImageProcessor`, each twice in time,
    block by block of those that the merger joins; tokens are put back in rows.
    """

    source = "Qwen2VisionTransformerPretrainedModel"
    config = "Qwen2VLVisionConfig"
    module = "transformers.models.qwen2_vl.modeling_qwen2_vl"
    family = "qwen2_vl"
    layers = "blocks"
    norm = ""
    idle = ("merger",)
    dropped = r"(merger|deepstack_merger_list)\."
    positions = ROTARY
    kinds = ()
    final_norm = False
    free = True
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    native = 32
    width = "embed_dim"
    merged = "hidden_size"

    def config_of(self, spec: EncoderSpec) -> dict[str, Any]:
        """Give the shape in the config's own words."""
        shape = {"depth": spec.kept_layers, self.width: spec.width, "num_heads": spec.heads, "patch_size": spec.stride}
        return {**shape, **self.mlp_of(spec)}

    def mlp_of(self, spec: EncoderSpec) -> dict[str, Any]:
        """Give the hidden width as a ratio."""
        return {"mlp_ratio": spec.mlp_dim // spec.width}

    def mlp_spec(self, config: Any) -> dict[str, Any]:
        """Give the hidden width."""
        return {"mlp_dim": int(config.embed_dim * config.mlp_ratio)}

    def told(self, config: Any) -> tuple[str, ...]:
        """Name the shape's entries, and the width of the LLM, which is the merger's alone."""
        return ("depth", self.width, "num_heads", "patch_size", "mlp_ratio", "intermediate_size", self.merged)

    @property
    def loose(self) -> tuple[str, ...]:  # type: ignore[override]
        """The width of the LLM is the merger's alone."""
        return (self.merged, "tokens_per_second")

    def spec_of(self, config: Any, owner: str) -> dict[str, Any]:
        """Give the shape; no config tells a native size."""
        config.image_size = self.native_side(config)
        fields = super().spec_of(config, owner)
        return fields | {"dim": getattr(config, self.width)}

    def native_side(self, config: Any) -> int:
        """Give a side for views where nobody names one, px."""
        side: int = self.native * config.patch_size
        return side

    def behind(self, spec: EncoderSpec) -> str:
        """Give the cut blocks."""
        cut = "|".join(str(index) for index in range(spec.kept_layers, spec.num_layers))
        return rf"(.*\.)?blocks\.({cut})\." if cut else r"(?!)"

    def cut(self, entries: dict[str, Any], spec: EncoderSpec) -> dict[str, Any]:
        """Leave the entries as they are.

        Raises:
            VlmError: the views do not fill the merger's blocks, by which patches are ordered.
        """
        merge = entries.get("spatial_merge_size", self.config_class()().spatial_merge_size)
        step = merge * spec.stride
        height, width = spec.image_size
        if height % step or width % step:
            near = [max(round(side / step), 1) * step for side in (height, width)]
            raise VlmError(
                f"{spec.name}: image size {height}x{width} is not a multiple of {step}, the {merge}x{merge} patches "
                f"that its blocks are ordered by; use {near[0]}x{near[1]}"
            )
        return entries

    def prepare(self, network: Any, spec: EncoderSpec) -> None:
        """Drop the merger."""
        super().prepare(network, spec)
        network.merger = nn.Identity()

    def last_hidden(self, network: Any, pixels: Tensor, spec: EncoderSpec) -> Tensor:
        """Run the network over all views at once, each attending to itself, (B * N, D)."""
        # On the CPU, so that nothing waits for an accelerator, and lengths are known on the meta device.
        grids = torch.tensor([[1, *_grid(spec)]] * len(pixels))
        known = {
            name: value if name in {"cu_seqlens", "cu_window_seqlens"} else value.to(pixels.device)
            for name, value in self.places(network, grids).items()
        }
        patches = _patches(pixels, spec.stride, network.spatial_merge_size, network.config.temporal_patch_size)
        if "flash" in str(network.config._attn_implementation):  # noqa: SLF001
            known = {name: value.to(pixels.device) for name, value in known.items()}
        hidden: Tensor = network(patches, grid_thw=grids, **known).last_hidden_state
        return hidden

    def places(self, network: Any, grids: Tensor) -> dict[str, Tensor]:
        """Compute what the library would from the grids (B, 3): time, rows and columns."""
        from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

        return {
            "position_ids": get_vision_position_ids(grids, network.spatial_merge_size),
            "cu_seqlens": get_vision_cu_seqlens(grids),
        }

    def forward(self, network: Any, pixels: Tensor, spec: EncoderSpec, kept: dict[int, Any]) -> VisualTokens:
        """Map pixels (B, 3, H, W) to tokens, joined where the feature layers are several."""
        outputs = self.run(network, pixels, spec, kept)
        parts = [self.in_rows(network, outputs[layer], spec, len(pixels)) for layer in spec.layers]
        return parts[0] if len(parts) == 1 else join_channels(parts)

    def in_rows(self, network: Any, hidden: Tensor, spec: EncoderSpec, batch: int) -> VisualTokens:
        """Put a block's output (B * N, D), block by block of the merger, in rows."""
        (rows, columns), merge = _grid(spec), network.spatial_merge_size
        blocks = hidden.reshape(batch, rows // merge, columns // merge, merge, merge, -1)
        return VisualTokens(blocks.transpose(2, 3).reshape(batch, rows * columns, -1), (rows, columns))


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

    def places(self, network: Any, grids: Tensor) -> dict[str, Tensor]:
        """Add the order of windows."""
        from transformers.vision_utils import get_vision_window_index

        index, bounds = get_vision_window_index(
            grids, network.spatial_merge_size, network.window_size, network.patch_size
        )
        return super().places(network, grids) | {"window_index": index, "cu_window_seqlens": bounds}

    def in_rows(self, network: Any, hidden: Tensor, spec: EncoderSpec, batch: int) -> VisualTokens:
        """Undo the order of windows, and then that of the merger's blocks."""
        grid = torch.tensor([[1, *_grid(spec)]])
        back = self.places(network, grid)["window_index"].argsort().to(hidden.device)
        units = hidden.reshape(batch, len(back), network.spatial_merge_unit, -1)
        return super().in_rows(network, units[:, back], spec, batch)


class Qwen3(Qwen25):
    """Source: transformers' `Qwen3VLVisionModel`; the features for its LLM's early layers are left out."""

    source = "Qwen3VLVisionModel"
    config = "Qwen3VLVisionConfig"
    module = "transformers.models.qwen3_vl.modeling_qwen3_vl"
    family = "qwen3_vl"
    fixed = {"deepstack_visual_indexes": []}  # noqa: RUF012
    positions = ROTARY_AND_TABLE
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def native_side(self, config: Any) -> int:
        """Give the side of the table of places, px."""
        side: int = isqrt(config.num_position_embeddings) * config.patch_size
        return side

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
        return Qwen2.places(self, network, grids) | {"interp_indices": index, "interp_weights": weights}

    def in_rows(self, network: Any, hidden: Tensor, spec: EncoderSpec, batch: int) -> VisualTokens:
        """Undo the order of the merger's blocks: there are no windows."""
        return Qwen2.in_rows(self, network, hidden, spec, batch)


def _grid(spec: EncoderSpec) -> Grid:
    return spec.image_size[0] // spec.stride, spec.image_size[1] // spec.stride


def _patches(pixels: Tensor, side: int, merge: int, frames: int) -> Tensor:
    """Cut views (B, 3, H, W) into rows of patches, each repeated in time, in the order of the merger's blocks."""
    split = pixels.unflatten(3, (-1, merge, side)).unflatten(2, (-1, merge, side))
    ordered = split.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    length = pixels.shape[1] * frames * side * side
    repeated: Tensor = ordered.expand(*ordered.shape[:6], frames, side, side)
    return repeated.reshape(-1, length)
