"""Add an encoder of your own: one class, one spec, one call. No file of the library changes.

A package does the same with an entry point: see the folder `plugin` beside this file.
"""

from typing import Self

import torch
from torch import Tensor, nn

from connectors import VisualTokens
from vlm_encoders import Encoder, EncoderSpec, create_encoder, register_encoder


class PatchEncoder(Encoder):
    """Patches through one convolution and one block."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__(spec)
        self.patches = nn.Conv2d(3, spec.dim, spec.stride, spec.stride)
        self.block = nn.TransformerEncoderLayer(spec.dim, spec.heads, spec.mlp_dim, batch_first=True)

    @classmethod
    def build(cls, spec: EncoderSpec, *, pretrained: bool | str, dtype: torch.dtype) -> Self:
        return cls(spec).to(dtype)

    def forward_features(self, pixel_values: Tensor) -> VisualTokens:
        visual = VisualTokens.from_map(self.patches(pixel_values))
        return VisualTokens(self.block(visual.tokens), visual.grid)

    def blocks(self) -> list[nn.Module]:
        return [self.block]


register_encoder(
    EncoderSpec(
        name="my-patches",
        family="mine",
        backend=f"{__name__}:PatchEncoder",
        source="PatchEncoder",
        weights=None,
        image_size=(64, 96),
        stride=16,
        dim=48,
        heads=4,
        mlp_dim=96,
        num_layers=1,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
)

encoder = create_encoder("my-patches", pretrained=False)
print(encoder.token_spec)
print(encoder(torch.rand(2, 3, 64, 96)).spec)
