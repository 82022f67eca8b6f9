"""DINOv2 with and without registers, and TIPSv2: the library resamples their tables in float32 by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlm_encoders.encoders.pack_views import ViewTokens
from vlm_encoders.encoders.towers.packing import PackingTower
from vlm_encoders.spec import EncoderSpec, PrefixKind, Resize

__all__ = ["Dinov2", "Dinov2WithRegisters", "Tipsv2"]


class Dinov2(PackingTower):
    """Source: transformers' `Dinov2Model`."""

    source = "Dinov2Model"
    config = "Dinov2Config"
    family = "dinov2"
    fixed = {"use_mask_token": False}  # noqa: RUF012
    layers = "encoder.layer"
    dropped = r"classifier\.|(.*\.)?embeddings\.mask_token$|(dinov2\.)?layernorm\."
    resize: Resize = "crop"

    def mlp_of(self, spec: EncoderSpec) -> dict[str, Any]:
        """Give `mlp_ratio`; SwiGLU rounds it, so that there it is an option."""
        return {} if spec.gated_mlp else {"mlp_ratio": spec.mlp_dim // spec.width}

    def mlp_spec(self, config: Any) -> dict[str, Any]:
        """Give the hidden width, by SwiGLU's rounding where it is used."""
        hidden = int(config.hidden_size * config.mlp_ratio)
        if config.use_swiglu_ffn:
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        return {"mlp_dim": hidden, "gated_mlp": config.use_swiglu_ffn}

    def told(self, config: Any) -> tuple[str, ...]:
        """Leave `mlp_ratio` to the options under SwiGLU."""
        return super().told(config) + (() if config.use_swiglu_ffn else ("mlp_ratio",))

    def embed(self, network: Any, pixels: Tensor, spec: EncoderSpec) -> ViewTokens:
        """Make patches with the table at their grid, behind the prefix."""
        rows, columns = pixels.shape[2] // spec.stride, pixels.shape[3] // spec.stride
        return ViewTokens(network.embeddings(pixels), (rows, columns))

    def through(self, network: Any, hidden: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        """Run the blocks and the norm."""
        normed: Tensor = network.layernorm(network.encoder(hidden).last_hidden_state)
        return normed


class Dinov2WithRegisters(Dinov2):
    """Source: transformers' `Dinov2WithRegistersModel`."""

    source = "Dinov2WithRegistersModel"
    config = "Dinov2WithRegistersConfig"
    fixed = {}  # noqa: RUF012
    idle = ("embeddings.mask_token",)
    dropped = r"classifier\.|(dinov2_with_registers\.)?layernorm\."
    positions = "a learned table, resampled bicubically in float32 with antialiasing"

    def prefix_of(self, config: Any) -> tuple[PrefixKind, ...]:
        """CLS, then the registers."""
        return ("cls", *("register",) * config.num_register_tokens)


class Tipsv2(Dinov2WithRegisters):
    """Source: transformers' `Tipsv2VisionModel`, whose registers are further CLS tokens."""

    source = "Tipsv2VisionModel"
    config = "Tipsv2VisionConfig"
    family = "tipsv2"
    dropped = r"(text_(model|encoder)|temperature|logit_scale)\b|(vision_(model|encoder)\.)?(layernorm|norm)\."
    positions = "a learned table, resampled bilinearly in float32 with antialiasing"
    resize: Resize = "squash"
    bilinear = True
    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)

    def prefix_of(self, config: Any) -> tuple[PrefixKind, ...]:
        """CLS alone: the registers are CLS tokens that other captions supervised."""
        kind: PrefixKind = "cls"
        return (kind,) * (1 + int(config.num_register_tokens))
