"""ConvNeXt and DINOv3's ConvNeXt by transformers: the map of any stage, row by row."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from connectors.tokens import VisualTokens
from vlm_encoders.encoders.towers.staged import Staged, stage_grid
from vlm_encoders.spec import EncoderSpec, Stage

__all__ = ["ConvNext", "DinoConvNext"]


class ConvNext(Staged):
    """Source: transformers' `ConvNextModel`, whose norm is for the mean of the map alone.

    Convolutions read whole maps, so that a pack is encoded size by size.
    """

    source = "ConvNextModel"
    config = "ConvNextConfig"
    family = "convnext"
    layers = "encoder.stages"
    norm = ""
    idle = ("layernorm",)
    dropped = r"classifier\.|(convnext\.)?layernorm\."
    per_stage = ("hidden_sizes",)
    positions = "none: convolutions alone"
    packs = True
    final_norm = False
    resize = "crop"
    loose = ("image_size",)

    def stages_of(self, config: Any) -> tuple[Stage, ...]:
        """Give stages that halve the grid."""
        patch = config.patch_size
        return tuple(Stage(width, patch << place) for place, width in enumerate(config.hidden_sizes))

    def cut(self, entries: dict[str, Any], spec: EncoderSpec) -> dict[str, Any]:
        """Keep the first stages alone."""
        return {**super().cut(entries, spec), "num_stages": spec.kept_layers}

    def told(self, config: Any) -> tuple[str, ...]:
        """Add the number of stages."""
        return (*super().told(config), "num_stages")

    def prepare(self, network: Any, spec: EncoderSpec) -> None:
        """Drop the norm of the mean."""
        super().prepare(network, spec)
        network.layernorm = nn.Identity()

    def tokens(self, hidden: Tensor, spec: EncoderSpec, layer: int) -> VisualTokens:
        """Give tokens of a map (B, D, R, C)."""
        return VisualTokens.from_map(hidden)


class DinoConvNext(Staged):
    """Source: transformers' `DINOv3ConvNextModel`.

    The library puts the mean of the last map in front of its tokens; it is left out here,
    and the last norm is that of the tokens. A pack is encoded size by size.
    """

    source = "DINOv3ConvNextModel"
    config = "DINOv3ConvNextConfig"
    family = "dinov3"
    layers = "model.stages"
    norm = "layer_norm"
    dropped = r"layer_norm\."
    per_stage = ("hidden_sizes",)
    positions = "none: convolutions alone"
    packs = True
    loose = ("image_size",)

    def stages_of(self, config: Any) -> tuple[Stage, ...]:
        """Give stages that halve the grid of 4 px."""
        return tuple(Stage(width, 4 << place) for place, width in enumerate(config.hidden_sizes))

    def tokens(self, hidden: Tensor, spec: EncoderSpec, layer: int) -> VisualTokens:
        """Give tokens of a map (B, D, R, C), or of the normed ones behind their mean (B, 1 + N, D)."""
        if hidden.ndim == 4:
            return VisualTokens.from_map(hidden)
        return VisualTokens(hidden[:, 1:], stage_grid(spec, layer))
