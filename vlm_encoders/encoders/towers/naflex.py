"""SigLIP 2 NaFlex by transformers: patches of any grid, without padding or a mask."""

from __future__ import annotations

from math import isqrt
from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate

from connectors.tokens import Grid
from vlm_encoders.encoders.pack_views import ViewTokens
from vlm_encoders.encoders.siglip2_naflex import POSITIONS
from vlm_encoders.encoders.towers.packing import PackingTower
from vlm_encoders.spec import EncoderSpec

__all__ = ["NaFlex"]


class NaFlex(PackingTower):
    """Source: transformers' `Siglip2VisionModel`.

    The library resamples its table for each image at every call; here for each grid, in float32.
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

    def last_hidden(self, network: Any, pixels: Tensor, spec: EncoderSpec) -> Tensor:
        """Run the network's parts over a batch (B, N, D), without a mask."""
        return self.through(network, self.embed(network, pixels, spec).hidden, ())

    def embed(self, network: Any, pixels: Tensor, spec: EncoderSpec) -> ViewTokens:
        """Cut pixels into patches as `Siglip2ImageProcessor` does, and add the table at their grid."""
        side = spec.stride
        cut = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1)
        grid = (cut.shape[1], cut.shape[2])
        projection = network.embeddings.patch_embedding
        patches = cut.flatten(3).flatten(1, 2).to(projection.weight.dtype)
        return ViewTokens(projection(patches) + _table(network.embeddings, grid), grid)

    def through(self, network: Any, hidden: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        """Run the blocks and the norm."""
        found = network.encoder(inputs_embeds=hidden, attention_mask=None)
        normed: Tensor = network.post_layernorm(found.last_hidden_state)
        return normed


def _table(embeddings: Any, grid: Grid) -> Tensor:
    """Bring the table to a grid (N, D) as the library does, in float32."""
    table: Tensor = embeddings.position_embedding.weight
    side = embeddings.position_embedding_size
    if grid == (side, side):
        return table
    # Unsqueezed last, as in the library: of what torch takes for channels-last it resamples to one column wrongly.
    square = table.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
    return interpolate(square, size=grid, mode="bilinear", antialias=True).flatten(2)[0].T.to(table.dtype)
