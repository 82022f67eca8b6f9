"""SAM's image encoder by transformers: blocks of windows and global ones, and `final_norm` for the neck."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from connectors.tokens import VisualTokens
from vlm_encoders.encoders.sam import POSITIONS
from vlm_encoders.encoders.sam_attention import attend_by_rows, resample_offsets
from vlm_encoders.encoders.towers.base import Tower
from vlm_encoders.spec import EncoderSpec, Stage

__all__ = ["Sam"]


class Sam(Tower):
    """Source: transformers' `SamVisionModel`.

    Its global attention is `RowAttention`, with the library's numbers;
    `attn_implementation="eager"` keeps the library's own. The library refuses all sizes
    but the native one: at others the table of places is resampled as timm's `samvit` does.
    """

    source = "SamVisionModel"
    config = "SamVisionConfig"
    family = "sam"
    layers = "vision_encoder.layers"
    norm = "vision_encoder.neck"
    dropped = r"(mask_decoder|prompt_encoder|shared_image_embedding)\.|(sam\.)?vision_encoder\.neck\."
    positions = POSITIONS
    kinds = ()
    resize = "pad"
    bilinear = True

    def config_of(self, spec: EncoderSpec) -> dict[str, Any]:
        """Give ViT's entries and the neck's width."""
        return super().config_of(spec) | ({"output_channels": spec.neck.dim} if spec.neck else {})

    def mlp_of(self, spec: EncoderSpec) -> dict[str, Any]:
        """Give the hidden width."""
        return {"mlp_dim": spec.mlp_dim}

    def mlp_spec(self, config: Any) -> dict[str, Any]:
        """Give the hidden width."""
        return {"mlp_dim": config.mlp_dim or int(config.hidden_size * config.mlp_ratio), "windowed": True}

    def told(self, config: Any) -> tuple[str, ...]:
        """Add the neck's and the MLP's entries."""
        return (*super().told(config), "output_channels", "mlp_dim", "mlp_ratio")

    def spec_of(self, config: Any, owner: str) -> dict[str, Any]:
        """Give ViT's fields and the neck."""
        neck = Stage(config.output_channels, config.patch_size)
        return super().spec_of(config, owner) | {"dim": neck.dim, "block_dim": config.hidden_size, "neck": neck}

    def prepare(self, network: Any, spec: EncoderSpec) -> None:
        """Put `RowAttention` in the global blocks."""
        from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

        super().prepare(network, spec)
        layers = network.vision_encoder.layers
        attend_by_rows([layer for layer in layers if type(layer.attn) is SamVisionSdpaAttention])

    def resamples(self, spec: EncoderSpec) -> bool:
        """Every size but the native one."""
        return spec.image_size != spec.native_size

    def resample(self, network: Any, spec: EncoderSpec) -> None:
        """Bring the tables to the views' size, and let the library take it."""
        encoder = network.vision_encoder
        rows, columns = grid = (spec.image_size[0] // spec.stride, spec.image_size[1] // spec.stride)
        encoder.patch_embed.image_size = spec.image_size
        with torch.no_grad():
            if encoder.pos_embed is not None:
                table = interpolate(encoder.pos_embed.permute(0, 3, 1, 2), size=grid, mode="bicubic", antialias=True)
                encoder.pos_embed = nn.Parameter(table.permute(0, 2, 3, 1).contiguous())
            for layer in encoder.layers:
                if layer.window_size == 0 and layer.attn.use_rel_pos:
                    layer.attn.rel_pos_h = nn.Parameter(resample_offsets(layer.attn.rel_pos_h, rows))
                    layer.attn.rel_pos_w = nn.Parameter(resample_offsets(layer.attn.rel_pos_w, columns))

    def tokens(self, hidden: Tensor, spec: EncoderSpec, layer: int) -> VisualTokens:
        """Give tokens of the neck's map (B, D, R, C), or of a block's (B, R, C, D)."""
        if spec.neck and spec.final_norm:
            return VisualTokens.from_map(hidden)
        return VisualTokens(hidden.flatten(1, 2), (hidden.shape[1], hidden.shape[2]))
