"""BEiT: biases of relative places in every block, resampled once for views of another size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_encoders.encoders.towers.base import Tower
from vlm_encoders.encoders.towers.positions import resample_positions
from vlm_encoders.spec import EncoderSpec

__all__ = ["Beit"]


class Beit(Tower):
    """Source: transformers' `BeitModel`."""

    source = "BeitModel"
    config = "BeitConfig"
    family = "beit"
    arguments = {"add_pooling_layer": False}  # noqa: RUF012
    fixed = {"use_mask_token": False}  # noqa: RUF012
    dropped = (
        r"(classifier|lm_head|layernorm|pooler|decode_head|auxiliary_head|fpn\d)\b"
        r"|(beit\.)?(pooler|layernorm)\.|(.*\.)?(mask_token|relative_position_index)$"
    )
    positions = "a bias for each offset, resampled bilinearly in float32"
    final_norm = False
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
    bilinear = True

    def spec_of(self, config: Any, owner: str) -> dict[str, Any]:
        """Give ViT's fields; with mean pooling there is no norm on the tokens."""
        return super().spec_of(config, owner) | {"final_norm": not config.use_mean_pooling}

    def resamples(self, spec: EncoderSpec) -> bool:
        """Every size but the native one."""
        return spec.image_size != spec.native_size

    def resample(self, network: nn.Module, spec: EncoderSpec) -> None:
        """Bring the biases, and a table of places if there is one, to the views' grid."""
        embeddings: Any = network.embeddings
        if embeddings.position_embeddings is not None:
            resample_positions(embeddings, spec)
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__ == "BeitRelativePositionBias":
                    setattr(parent, name, ResampledBias(child, spec))


class ResampledBias(nn.Module):
    """A `BeitRelativePositionBias` whose table has the views' size, for the library to call.

    Args:
        bias: the library's own, in float32.
        spec: its view size tells the grid.
    """

    def __init__(self, bias: Any, spec: EncoderSpec) -> None:
        super().__init__()
        self.grid = spec.token_spec().grid or (1, 1)
        goal = [2 * side - 1 for side in self.grid]
        sides = [2 * side - 1 for side in bias.window_size]
        table = bias.relative_position_bias_table.detach()
        offsets = table[:-3].reshape(1, *sides, -1).permute(0, 3, 1, 2)
        offsets = nn.functional.interpolate(offsets, size=goal, mode="bilinear")
        offsets = offsets.permute(0, 2, 3, 1).reshape(goal[0] * goal[1], -1)
        self.relative_position_bias_table = nn.Parameter(torch.cat([offsets, table[-3:]]))

    def forward(self, window_size: Any, interpolate_pos_encoding: bool = False, dim_size: Any = None) -> Tensor:  # noqa: FBT001, FBT002
        """Give the biases (1, heads, 1 + N, 1 + N)."""
        from transformers.models.beit.modeling_beit import BeitRelativePositionBias

        places: Tensor = BeitRelativePositionBias.generate_relative_position_index(self.grid)
        biases = self.relative_position_bias_table[places.view(-1)].view(*places.shape, -1)
        return biases.permute(2, 0, 1).contiguous()[None]
