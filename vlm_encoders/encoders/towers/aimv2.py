"""AIMv2: RMS norms and gated MLPs without a prefix; fixed tables, or sines of any size in the native one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlm_encoders.encoders.pack_views import ViewTokens
from vlm_encoders.encoders.towers.packing import PackingTower
from vlm_encoders.spec import EncoderSpec

__all__ = ["Aimv2"]


class Aimv2(PackingTower):
    """Source: transformers' `Aimv2VisionModel`."""

    source = "Aimv2VisionModel"
    config = "Aimv2VisionConfig"
    family = "aimv2"
    fixed = {"use_head": False}  # noqa: RUF012
    layers = "encoder.layers"
    norm = "rms_norm"
    dropped = (
        r"(text_model|text_projection|visual_projection|logit_scale)\b"
        r"|(vision_model\.)?(head|rms_norm)\.|(.*\.)?position_ids$"
    )
    positions = "a learned table of one size"
    kinds = ()
    sizes = "native"
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    resize = "crop"

    def mlp_spec(self, config: Any) -> dict[str, Any]:
        """Give the hidden width of the gated MLP."""
        return {"mlp_dim": config.intermediate_size, "gated_mlp": True}

    def spec_of(self, config: Any, owner: str) -> dict[str, Any]:
        """Give ViT's fields; the native one has no table, and so any size, and many in a pack."""
        fields = super().spec_of(config, owner) | {"packs": bool(config.is_native)}
        if config.is_native:
            fields |= {"sizes": "any", "positions": "sines of the rows and columns, in the parameters' dtype"}
        return fields

    def embed(self, network: Any, pixels: Tensor, spec: EncoderSpec) -> ViewTokens:
        """Make patches with the sines of their grid."""
        rows, columns = pixels.shape[2] // spec.stride, pixels.shape[3] // spec.stride
        return ViewTokens(network.embeddings(pixels), (rows, columns))

    def through(self, network: Any, hidden: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        """Run the blocks and the norm."""
        normed: Tensor = network.rms_norm(network.encoder(inputs_embeds=hidden).last_hidden_state)
        return normed
