"""One encoder at several scales of a view (S2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from connectors.tokens import VisualTokens
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.joint_parts import joint_origin
from vlm_encoders.encoders.multiscale_spec import MultiScaleSpec, multiscale_spec
from vlm_encoders.registry import build_encoder
from vlm_encoders.resample import join_channels
from vlm_encoders.spec import EncoderSpec

__all__ = ["MultiScale"]


class MultiScale(Encoder):
    """A view seen whole and in sub-views by one network, joined channel by channel.

    Pixels come at the largest scale. For each scale s they are brought to s times the part's
    size (bicubic, float32, without antialiasing), cut into s x s sub-views and encoded; the
    sub-views' grids are laid side by side, averaged down to the first scale's grid ("area"),
    and joined. Prefix tokens are dropped.

    Source: S2, arXiv 2403.13043, in the way of LLaVA-1.5 with S2, which preprocesses at the
    largest scale.

    Args:
        encoder: the network at the size of a sub-view.
        scales: sub-views along a side, growing.

    Attributes:
        origin: rebuilds it by name where the encoder was made by `create_encoder` with options
            that a name can hold; empty otherwise.

    Raises:
        VlmError: the scales are not growing whole numbers, or the tokens have no grid.
    """

    spec: MultiScaleSpec

    def __init__(self, encoder: Encoder, *, scales: Sequence[int] = (1, 2)) -> None:
        several = tuple(scales)
        origin = joint_origin("multiscale", [encoder.origin], {"scales": several[0] if len(several) == 1 else several})
        spec = multiscale_spec(encoder.spec, origin.get("name") or f"multiscale:{encoder.spec.name}", several)
        super().__init__(spec)
        self.encoder = encoder
        self.origin = origin and {**origin, **spec.choices}

    @classmethod
    def build(cls, spec: EncoderSpec, *, pretrained: bool | str, dtype: torch.dtype) -> Self:
        """Build the one network."""
        whole = cast("MultiScaleSpec", spec)
        encoder = cls(build_encoder(whole.part, pretrained=pretrained, dtype=dtype), scales=whole.scales)
        encoder.spec = whole
        return encoder

    def forward_features(self, pixel_values: Tensor) -> VisualTokens:
        """Encode each scale and bring it to the first one's grid."""
        found = [self._encode_scale(pixel_values, scale) for scale in self.spec.scales]
        return join_channels(found, method="area")

    def blocks(self) -> list[nn.Module]:
        """Give the kept blocks of the network, first to last."""
        return self.encoder.blocks()

    def _encode_scale(self, pixels: Tensor, scale: int) -> VisualTokens:
        height, width = self.spec.part.image_size
        if scale != self.spec.scales[-1]:
            kind = torch.promote_types(pixels.dtype, torch.float32)
            size = (scale * height, scale * width)
            pixels = interpolate(pixels.to(kind), size=size, mode="bicubic", align_corners=False).to(pixels.dtype)
        batch = len(pixels)
        cut: Any = pixels.unflatten(3, (scale, width)).unflatten(2, (scale, height))
        visual: VisualTokens = self.encoder(cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2))
        # (B, s, s, D, R, C) to (B, D, s R, s C): each sub-view's grid in its place.
        maps = visual.as_map().unflatten(0, (batch, scale, scale))
        return VisualTokens.from_map(maps.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3))
