"""What an encoder is: images or pixels in, visual tokens with their prefix apart out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from connectors.errors import TokenShapeError, VlmError
from connectors.tokens import PackedTokens, TokenSpec, VisualTokens
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

    def forward_packed(self, views: Sequence[Tensor], kept: Sequence[Tensor] | None = None) -> PackedTokens:
        """Encode views of any sizes together; each attends to itself alone.

        Args:
            views: pixels (3, H, W) of each, H and W such as `spec.token_spec((H, W))` takes them.
            kept: for each view the places (n,) of the patch tokens that are encoded, growing, as NaViT
                drops the others in training; None for all. Tokens that are not all of a view have no grid.

        Raises:
            TokenShapeError: a view has a size that the encoder does not take.
            VlmError: the encoder takes views of one size alone, or there is no view.
        """
        if not views or (kept is not None and len(kept) != len(views)):
            raise VlmError(
                f"{self.spec.name}: there are {len(views)} views and {'no' if kept is None else len(kept)} lists of "
                "kept tokens; give one view or more, and one list for each"
            )
        self.check_views(views)
        specs = [self.spec.token_spec((view.shape[1], view.shape[2])) for view in views]
        for number, (spec, places) in enumerate(zip(specs, kept or (), strict=bool(kept))):
            self._check_places(number, spec, places)
        packed = self.packed_features(views, kept)
        wanted = [spec.num_tokens for spec in specs] if kept is None else [len(places) for places in kept]
        if list(packed.lengths) != wanted:
            raise TokenShapeError(
                f"{self.spec.name}: its views have {wanted} tokens, its network gave {packed.lengths}"
            )
        return packed

    def packed_features(self, views: Sequence[Tensor], kept: Sequence[Tensor] | None) -> PackedTokens:
        """Map views (3, H, W) to packed tokens; `forward_packed` checks both ends. Encoders that pack have one."""
        raise VlmError(
            f"{self.spec.name}: {type(self).__name__} has no packed_features, so its spec must say packs=False"
        )

    def check_views(self, views: Sequence[Tensor]) -> None:
        """Refuse views that `forward_packed` does not take.

        Raises:
            TokenShapeError: one is no tensor of pixels (3, H, W).
            VlmError: the encoder takes views of one size alone.
        """
        if not self.spec.packs:
            raise VlmError(
                f"{self.spec.name}: it encodes views of one size, {self._size}; use a tiler that cuts such "
                "views, or an encoder of native resolution with torch's own attention, such as siglip2-naflex-b-16"
            )
        for view in views:
            if not isinstance(view, Tensor) or view.ndim != 3 or view.shape[0] != 3 or not view.is_floating_point():
                came = f"{view.dtype} of shape {tuple(view.shape)}" if isinstance(view, Tensor) else type(view).__name__
                raise TokenShapeError(f"{self.spec.name}: a view's pixels are normalised floats (3, H, W), got {came}")

    def _check_places(self, number: int, spec: TokenSpec, places: Tensor) -> None:
        """Refuse places that are not those of a view's tokens, which would reach into another view's."""
        whole = isinstance(places, Tensor) and places.ndim == 1 and len(places) > 0
        if whole and places.dtype in {torch.int64, torch.int32}:
            inside = int(places[0]) >= 0 and int(places[-1]) < spec.num_tokens
            if inside and bool((places[1:] > places[:-1]).all()):
                return
        raise VlmError(
            f"{self.spec.name}: the kept tokens of view {number} are to be growing places (n,) from 0 to "
            f"{spec.num_tokens - 1}, whole numbers in a tensor, got {places!r}; sort them, without doubles"
        )

    @property
    def _size(self) -> str:
        height, width = self.spec.image_size
        return f"{height}x{width} px"

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
