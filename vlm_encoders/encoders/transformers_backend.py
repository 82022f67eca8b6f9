"""Vision towers of transformers: CLIP, SigLIP, DINOv2, Swin and SAM."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from connectors.tokens import VisualTokens
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.transformers_load import TOWERS, load_tower, require_tower, tower_config
from vlm_encoders.encoders.weights import find_weights
from vlm_encoders.spec import EncoderSpec

__all__ = ["TransformersEncoder"]


class TransformersEncoder(Encoder):
    """A vision model of transformers, cut behind its feature layer.

    Source: transformers' `CLIPVisionModel`, `SiglipVisionModel`, `Dinov2Model`,
    `Dinov2WithRegistersModel`, `SwinModel`, `SamVisionModel`.

    Args:
        spec: with the class in `source`.
        network: the class's instance with the kept blocks.
    """

    def __init__(self, spec: EncoderSpec, network: nn.Module) -> None:
        super().__init__(spec)
        self.network = network
        self._tower = TOWERS[spec.source]
        if self._tower.norm and not spec.final_norm:
            setattr(network, self._tower.norm, nn.Identity())
        if spec.source.startswith("Dinov2"):
            # It stands for patches that pre-training hid; no token depends on it here.
            network.embeddings.mask_token = None  # type: ignore[union-attr]

    @classmethod
    def build(cls, spec: EncoderSpec, *, pretrained: bool | str, dtype: torch.dtype) -> Self:
        """Build the tower from the spec, or from the config that lies beside the weights."""
        import transformers

        require_tower(spec)
        model = getattr(transformers, spec.source)
        extra = {"add_pooling_layer": False} if spec.source == "SwinModel" else {}
        if pretrained is False:
            network = model(tower_config(spec), **extra)
            return cls(spec, network.to(dtype))
        path = find_weights(spec.name, spec.weights, pretrained=pretrained)
        return cls(spec, load_tower(model, spec, path, dtype, extra))

    def forward_features(self, pixel_values: Tensor) -> VisualTokens:
        """Run the kept blocks and take the prefix apart."""
        options = {}
        if self._tower.any_size and self.spec.image_size != self.spec.native_size:
            options["interpolate_pos_encoding"] = True
        hidden: Tensor = self.network(pixel_values, **options).last_hidden_state
        if hidden.ndim == 4:
            return VisualTokens.from_map(hidden)
        if self.spec.final_norm and not self._tower.norm_inside:
            hidden = getattr(self.network, self._tower.norm)(hidden)
        count = self.spec.num_prefix
        prefix = hidden[:, :count] if count else None
        return VisualTokens(hidden[:, count:], self.token_spec.grid, prefix)

    def blocks(self) -> list[nn.Module]:
        """Give the kept blocks, first to last."""
        if self.spec.source == "SamVisionModel":
            return list(self.network.vision_encoder.layers)  # type: ignore[union-attr, arg-type]
        encoder: Any = self.network.encoder
        if self.spec.source == "SwinModel":
            return [block for stage in encoder.layers for block in stage.blocks]
        return list(encoder.layers if hasattr(encoder, "layers") else encoder.layer)
