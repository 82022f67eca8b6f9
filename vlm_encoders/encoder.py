"""What an encoder is: images or pixels in, visual tokens with their prefix apart out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from connectors.errors import TokenShapeError, VlmError
from connectors.tokens import TokenSpec, VisualTokens
from vlm_encoders.preprocess import ImageLike
from vlm_encoders.spec import EncoderSpec, PrefixKind
from vlm_encoders.view_pixels import ViewPixels

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
        self._preprocessor = ViewPixels(spec)

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
        """Map pixels (B, *pixel_shape) to tokens; `forward` checks both ends."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Give the layers that are kept, first to last: blocks, or the stages of a staged network."""

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """The shape of one view's pixels: (3, height, width), or (L,) in a joint of several encoders."""
        return (3, *self.spec.image_size)

    @property
    def token_spec(self) -> TokenSpec:
        """The tokens of one view."""
        return self.spec.token_spec()

    def prefix_tokens(self, visual: VisualTokens, kind: PrefixKind) -> Tensor:
        """Give the prefix tokens of one kind, such as "cls" or "register", (B, n, D).

        Raises:
            VlmError: the encoder has none of this kind.
        """
        places = [place for place, found in enumerate(self.spec.prefix_kinds) if found == kind]
        count = visual.spec.num_prefix
        if count != self.spec.num_prefix:
            raise VlmError(
                f"{self.spec.name}: its tokens have {self.spec.num_prefix} prefix tokens, these have {count}"
            )
        if visual.prefix is None or not places:
            has = ", ".join(dict.fromkeys(self.spec.prefix_kinds)) or "none at all"
            raise VlmError(f"{self.spec.name}: it gives no prefix tokens of kind '{kind}'; it has {has}")
        return visual.prefix[:, places]

    def preprocess(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Make pixels (B, *pixel_shape), float32 on the CPU, of one image or several.

        Raises:
            VlmError: an image is missing, empty, truncated or no image.
        """
        return self._preprocessor(images)

    def forward(self, pixel_values: Tensor) -> VisualTokens:
        """Encode pixels (B, *pixel_shape); gradients flow wherever parameters ask for them.

        Raises:
            TokenShapeError: the pixels have another shape than the encoder was built for.
            VlmError: they are whole numbers, as an image has them.
        """
        expected = self.pixel_shape
        if tuple(pixel_values.shape[1:]) != expected:
            raise TokenShapeError(
                f"{self.spec.name}: pixels are (B, {', '.join(map(str, expected))}), got shape "
                f"{tuple(pixel_values.shape)}; make them with preprocess, or build with image_size="
            )
        if not pixel_values.is_floating_point():
            raise VlmError(f"{self.spec.name}: pixels are normalised floats, got {pixel_values.dtype}; use preprocess")
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
