"""What an encoder is: images or pixels in, visual tokens with their prefix apart out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from connectors.errors import TokenShapeError, VlmError
from connectors.tokens import TokenSpec, VisualTokens
from vlm_encoders.preprocess import ImageLike, Preprocessor
from vlm_encoders.spec import EncoderSpec

__all__ = ["Encoder"]


class Encoder(nn.Module, ABC):
    """An image encoder: an adapter to `VisualTokens` that leaves the network's numbers alone.

    Args:
        spec: the encoder as it is built, with its size, feature layer and norm.

    Attributes:
        spec: as given.
        origin: what `create_encoder` was called with, as JSON-able data, so that a
            checkpoint can build the encoder again; empty if it was built by hand.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.origin: dict[str, Any] = {}
        self._preprocessor = Preprocessor(spec)

    @classmethod
    @abstractmethod
    def build(cls, spec: EncoderSpec, *, pretrained: bool | str, dtype: torch.dtype) -> Self:
        """Build the network of `spec` up to its feature layer.

        Args:
            spec: with size, feature layer, norm and options as asked for.
            pretrained: True for `spec.weights`, False for random weights, or a local
                folder or file.
            dtype: of the parameters.

        Raises:
            VlmError: the weights are missing or do not fit, or the network cannot be so built.
        """

    @abstractmethod
    def forward_features(self, pixel_values: Tensor) -> VisualTokens:
        """Map (B, 3, S, S) pixels to tokens; `forward` checks both ends."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Give the blocks that are kept, first to last."""

    @property
    def token_spec(self) -> TokenSpec:
        """The tokens of one view."""
        return self.spec.token_spec()

    def preprocess(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Make pixels (B, 3, S, S), float32 on the CPU, of one image or several.

        Raises:
            VlmError: an image is missing, empty, truncated or no image.
        """
        return self._preprocessor(images)

    def forward(self, pixel_values: Tensor) -> VisualTokens:
        """Encode pixels (B, 3, S, S); gradients flow wherever parameters ask for them.

        Raises:
            TokenShapeError: the pixels have another shape than the encoder was built for.
        """
        expected = (3, *self.spec.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise TokenShapeError(
                f"{self.spec.name}: pixels are (B, {', '.join(map(str, expected))}), got shape "
                f"{tuple(pixel_values.shape)}; make them with preprocess, or build with image_size="
            )
        visual = self.forward_features(pixel_values)
        if visual.spec != self.token_spec:
            raise TokenShapeError(f"{self.spec.name}: its spec says {self.token_spec}, its network gave {visual.spec}")
        return visual

    def encode(self, images: ImageLike | Sequence[ImageLike]) -> VisualTokens:
        """Encode one image or several to tokens (B, N, D), without tracking gradients.

        Raises:
            VlmError: an image is missing, empty, truncated or no image.
        """
        pixels = self.preprocess(images)
        parameter = next(self.parameters(), None)
        if parameter is None:
            raise VlmError(f"{self.spec.name}: the encoder has no parameters, so no device to encode on")
        with torch.no_grad():
            visual: VisualTokens = self(pixels.to(parameter.device, parameter.dtype))
        return visual
