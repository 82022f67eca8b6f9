"""Swin by transformers: any stage before its step down, the last one behind the final norm."""

from __future__ import annotations

from typing import Any

from torch import nn

from connectors.errors import VlmError
from vlm_encoders.encoders.towers.staged import Staged, stage_grid
from vlm_encoders.spec import EncoderSpec, Stage

__all__ = ["Swin"]


class Swin(Staged):
    """Source: transformers' `SwinModel`."""

    source = "SwinModel"
    config = "SwinConfig"
    family = "swin"
    arguments = {"add_pooling_layer": False}  # noqa: RUF012
    layers = "encoder.layers"
    dropped = (
        r"(classifier|decoder)\.|(swin\.)?(layernorm\.|pooler\.|embeddings\.mask_token$)"
        r"|(.*\.)?relative_position_index$"
    )
    per_stage: tuple[str, ...] = ("num_heads",)
    positions = "a bias for each offset within a window; another size keeps the window and its biases"
    rounding = "ceil"
    windowed = True

    def stages_of(self, config: Any) -> tuple[Stage, ...]:
        """Give stages that double the width and halve the grid."""
        places = range(len(config.depths))
        return tuple(Stage(config.embed_dim << place, config.patch_size << place) for place in places)

    def ends(self, network: Any) -> list[nn.Module]:
        """Give the last block of each stage: the stage itself gives what lies behind its step down."""
        stages: Any = self.blocks(network)
        return [stage.blocks[-1] for stage in stages]

    def prepare(self, network: Any, spec: EncoderSpec) -> None:
        """Refuse sizes that the library fails at, and drop what no token depends on."""
        if network.embeddings.position_embeddings is not None and spec.image_size != spec.native_size:
            height, width = spec.native_size
            raise VlmError(f"{spec.name}: its table of places fits {height}x{width} px alone; leave image_size out")
        self.check_windows(network, spec)
        super().prepare(network, spec)

    def check_windows(self, network: Any, spec: EncoderSpec) -> None:
        """Refuse a stage that is smaller than its window: the biases do not fit the window then."""
        window = network.config.window_size
        for layer in range(-spec.num_layers, max(spec.layers) + 1):
            rows, columns = stage_grid(spec, layer)
            if min(rows, columns) < window:
                need = (window - 1) * spec.stages[layer].stride + 1
                height, width = spec.image_size
                raise VlmError(
                    f"{spec.name}: at {height}x{width} px stage {layer} has a {rows}x{columns} grid, smaller than its "
                    f"window of {window}; use sides of at least {need} px"
                )
