"""Hiera by transformers: stages whose tokens are put back in rows from the library's order of units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from connectors.tokens import VisualTokens
from vlm_encoders.encoders.towers.staged import Staged
from vlm_encoders.resample import join_channels
from vlm_encoders.spec import EncoderSpec, Stage

__all__ = ["Hiera"]


class Hiera(Staged):
    """Source: transformers' `HieraModel`; it has no norm on its tokens."""

    source = "HieraModel"
    config = "HieraConfig"
    family = "hiera"
    arguments = {"add_pooling_layer": False}  # noqa: RUF012
    layers = "encoder.stages"
    norm = ""
    dropped = r"(decoder|encoder_norm|multiscale_fusion|classifier|mask_token)\b|(hiera\.)?(pooler|layernorm)\."
    per_stage = ("num_heads", "masked_unit_attention")
    positions = "a learned table, resampled bicubically in float32 without antialiasing"
    final_norm = False
    windowed = True
    resize = "crop"

    def config_of(self, spec: EncoderSpec) -> dict[str, Any]:
        """Give the size as a pair."""
        return {"image_size": list(spec.native_size)}

    def stages_of(self, config: Any) -> tuple[Stage, ...]:
        """Give stages that pool the grid as long as the config says."""
        growth, step = config.embed_dim_multiplier, config.query_stride[0]
        return tuple(
            Stage(
                int(config.embed_dim * growth**place),
                config.patch_stride[0] * step ** min(place, config.num_query_pool),
            )
            for place in range(len(config.depths))
        )

    def cut(self, entries: dict[str, Any], spec: EncoderSpec) -> dict[str, Any]:
        """Keep the first stages alone, and the steps down between them."""
        pools = entries.get("num_query_pool", self.config_class()().num_query_pool)
        return {**super().cut(entries, spec), "num_query_pool": min(pools, spec.kept_layers - 1)}

    def prepare(self, network: Any, spec: EncoderSpec) -> None:
        """Tell the library the order of units in the whole network, and the views' size."""
        super().prepare(network, spec)
        config = network.config
        network.unroll_schedule = steps = [config.query_stride] * (spec.num_layers - 1)
        size = [side // step for side, step in zip(spec.image_size, config.patch_stride, strict=True)]
        network.encoder.schedule = {}
        for place in range(spec.kept_layers):
            network.encoder.schedule[place] = steps, size
            if place < config.num_query_pool:
                size = [side // step for side, step in zip(size, config.query_stride, strict=True)]
                steps = steps[1:]

    def resamples(self, spec: EncoderSpec) -> bool:
        """Every size but the native one."""
        return spec.image_size != spec.native_size

    def resample(self, network: Any, spec: EncoderSpec) -> None:
        """Resample the table of the first stage by the library's own method."""
        embeddings = network.embeddings
        (height, width), (down, right) = spec.image_size, embeddings.patch_stride
        table = embeddings.position_embeddings
        with torch.no_grad():
            hidden = torch.empty(1, (height // down) * (width // right), table.shape[2], device="meta")
            resampled = embeddings.interpolate_pos_encoding(hidden, table, height, width)
        embeddings.position_embeddings = nn.Parameter(resampled.clone())

    def forward(self, network: Any, pixels: Tensor, spec: EncoderSpec, kept: dict[int, Any]) -> VisualTokens:
        """Map pixels (B, 3, H, W) to tokens, joined where the feature layers are several."""
        outputs = self.run(network, pixels, spec, kept)
        maps = [network.encoder.reroll(outputs[layer], spec.num_layers + layer) for layer in spec.layers]
        parts = [VisualTokens(found.flatten(1, 2), (found.shape[1], found.shape[2])) for found in maps]
        return parts[0] if len(parts) == 1 else join_channels(parts)
