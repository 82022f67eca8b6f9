"""SigLIP 2 NaFlex by transformers: patches of any grid, here of views of one size."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlm_encoders.encoders.siglip2_naflex import POSITIONS
from vlm_encoders.encoders.towers.base import Tower
from vlm_encoders.spec import EncoderSpec

__all__ = ["NaFlex"]


class NaFlex(Tower):
    """Source: transformers' `Siglip2VisionModel`.

    The library resamples its table for each image at every call; here it is done once.
    """

    source = "Siglip2VisionModel"
    config = "Siglip2VisionConfig"
    family = "siglip2"
    fixed = {"vision_use_head": False}  # noqa: RUF012
    layers = "encoder.layers"
    norm = "post_layernorm"
    dropped = r"(text_model|logit_scale|logit_bias)\b|(vision_model\.)?(head|post_layernorm)\.|(.*\.)?position_ids$"
    positions = POSITIONS
    kinds = ()
    free = True
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
    bilinear = True

    def config_of(self, spec: EncoderSpec) -> dict[str, Any]:
        """Give ViT's entries, and the table's places in place of a size."""
        entries = super().config_of(spec)
        side = entries.pop("image_size") // spec.stride
        return entries | {"num_patches": side * side}

    def spec_of(self, config: Any, owner: str) -> dict[str, Any]:
        """Give ViT's fields; the table tells the native size."""
        config.image_size = isqrt(config.num_patches) * config.patch_size
        return super().spec_of(config, owner)

    def told(self, config: Any) -> tuple[str, ...]:
        """Add the table's places."""
        return (*super().told(config), "num_patches")

    def resample(self, network: Any, spec: EncoderSpec) -> None:
        """Bring the table to the views' grid by the library's own method."""
        embeddings = network.embeddings
        side = embeddings.position_embedding_size
        with torch.no_grad():
            table = embeddings.position_embedding.weight.reshape(1, side, side, -1).permute(0, 3, 1, 2)
            table = interpolate(table, size=spec.token_spec().grid, mode="bilinear", antialias=True)
            table = table.flatten(2)[0].T.contiguous()
        embeddings.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)

    def resamples(self, spec: EncoderSpec) -> bool:
        """Every size but the native one."""
        return spec.image_size != spec.native_size

    def last_hidden(self, network: Any, pixels: Tensor, spec: EncoderSpec) -> Tensor:
        """Cut pixels into patches as `Siglip2ImageProcessor` does, and run the network's parts without a mask."""
        side = spec.stride
        patches = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1).flatten(3)
        patches = patches.flatten(1, 2)
        projection = network.embeddings.patch_embedding
        hidden = projection(patches.to(projection.weight.dtype)) + network.embeddings.position_embedding.weight
        hidden = network.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        normed: Tensor = network.post_layernorm(hidden)
        return normed
