"""Qwen2-VL's vision tower by transformers, in front of its merger; later ones build on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from connectors.errors import VlmError
from connectors.tokens import Grid, PackedTokens, VisualTokens
from vlm_encoders.encoders.pack_views import Places
from vlm_encoders.encoders.qwen import ROTARY
from vlm_encoders.encoders.towers.base import Tower
from vlm_encoders.encoders.towers.qwen_order import (
    block_order,
    chosen_rows,
    cut_patches,
    drop_rows,
)
from vlm_encoders.spec import EncoderSpec

__all__ = ["Qwen2"]


class Qwen2(Tower):
    """Source: transformers' `Qwen2VisionTransformerPretrainedModel`.

    A view becomes patches in the order of `Qwen2VLImageProcessor`, each twice in time,
    block by block of those that the merger joins; tokens are put back in rows. The library
    takes views of many sizes in one sequence, each within its bounds; so do packs.
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
    packs = True
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
        _check_blocks(spec.name, spec.image_size, spec.stride, merge)
        return entries

    def prepare(self, network: Any, spec: EncoderSpec) -> None:
        """Drop the merger."""
        super().prepare(network, spec)
        network.merger = nn.Identity()

    def forward(self, network: Any, pixels: Tensor, spec: EncoderSpec, kept: dict[int, Any]) -> VisualTokens:
        """Map pixels (B, 3, H, W) to tokens, joined where the feature layers are several."""
        rows, columns = spec.image_size[0] // spec.stride, spec.image_size[1] // spec.stride
        patches = self.patches(network, pixels, spec)
        tokens = self.encode(network, patches, [(rows, columns)] * len(pixels), spec, kept, None)
        return VisualTokens(tokens.unflatten(0, (len(pixels), rows * columns)), (rows, columns))

    def packed(
        self, network: Any, views: Sequence[Tensor], spec: EncoderSpec, kept: dict[int, Any], places: Places
    ) -> PackedTokens:
        """Map views (3, H, W) of many sizes to packed tokens, by the library's own bounds between views.

        Raises:
            VlmError: a view does not fill the merger's blocks.
        """
        for view in views:
            _check_blocks(spec.name, (view.shape[1], view.shape[2]), spec.stride, network.spatial_merge_size)
        grids = [(view.shape[1] // spec.stride, view.shape[2] // spec.stride) for view in views]
        patches = torch.cat([self.patches(network, view[None], spec) for view in views])
        tokens = self.encode(network, patches, grids, spec, kept, places)
        lengths = [rows * columns for rows, columns in grids]
        if places is None:
            return PackedTokens(tokens, grids, lengths)
        left = [len(each) for each in places]
        whole = [grid if count == length else None for grid, count, length in zip(grids, left, lengths, strict=True)]
        return PackedTokens(tokens, whole, left)

    def patches(self, network: Any, pixels: Tensor, spec: EncoderSpec) -> Tensor:
        """Cut views of one size into rows of patches."""
        return cut_patches(pixels, spec.stride, network.spatial_merge_size, network.config.temporal_patch_size)

    def encode(
        self,
        network: Any,
        patches: Tensor,
        grids: Sequence[Grid],
        spec: EncoderSpec,
        kept: dict[int, Any],
        places: Places,
    ) -> Tensor:
        """Run the network over all views at once, each attending to itself, and put tokens (M, D) in rows."""
        # On the CPU, so that nothing waits for an accelerator, and lengths are known on the meta device.
        known, order, chosen = self.sequence(network, grids, places)
        flash = "flash" in str(network.config._attn_implementation)  # noqa: SLF001
        bounds = () if flash else ("cu_seqlens", "cu_window_seqlens")
        known = {name: value if name in bounds else value.to(patches.device) for name, value in known.items()}
        if chosen is not None:
            patches = patches[chosen.nonzero()[:, 0].to(patches.device)]
        shapes = torch.tensor([[1, *grid] for grid in grids])
        hidden: Tensor = network(patches, grid_thw=shapes, **known).last_hidden_state
        outputs = self.collect(network, hidden, spec, kept)
        found = [outputs[layer] for layer in spec.layers]
        joined = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
        return joined[order.argsort().to(joined.device)]

    def sequence(
        self, network: Any, grids: Sequence[Grid], places: Places
    ) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """Give what the network is told, the place of each of its tokens, and which patches it takes; None for all."""
        known = self.places(network, torch.tensor([[1, *grid] for grid in grids]))
        order = block_order(grids, network.spatial_merge_size)
        if places is None:
            return known, order, None
        chosen = chosen_rows(grids, places, order)
        return drop_rows(known, chosen, [len(each) for each in places]), order[chosen], chosen

    def places(self, network: Any, grids: Tensor) -> dict[str, Tensor]:
        """Compute what the library would from the grids (B, 3): time, rows and columns."""
        from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

        return {
            "position_ids": get_vision_position_ids(grids, network.spatial_merge_size),
            "cu_seqlens": get_vision_cu_seqlens(grids),
        }


def _check_blocks(name: str, size: Grid, side: int, merge: int) -> None:
    step = merge * side
    height, width = size
    if height % step or width % step:
        near = [max(round(length / step), 1) * step for length in size]
        raise VlmError(
            f"{name}: image size {height}x{width} is not a multiple of {step}, the {merge}x{merge} patches "
            f"that its blocks are ordered by; use {near[0]}x{near[1]}"
        )
