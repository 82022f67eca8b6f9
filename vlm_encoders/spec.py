"""One row of the encoder table: what an encoder is, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

from connectors.errors import VlmError
from connectors.tokens import Grid, TokenSpec

__all__ = ["EncoderSpec", "Interpolation", "Options", "Resize", "as_size"]

Interpolation: TypeAlias = Literal["bicubic", "bilinear"]
Resize: TypeAlias = Literal["crop", "squash", "pad"]
Options: TypeAlias = tuple[tuple[str, object], ...]
"""Extra build arguments as (name, value) pairs; values are hashable and JSON-able."""

Triple: TypeAlias = tuple[float, float, float]


def as_size(size: int | Grid, owner: str) -> Grid:
    """Give (height, width) in px of a side or of a size.

    Raises:
        VlmError: it is neither, or not positive.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise VlmError(f"{owner}: an image size is one side or (height, width) in px, got {size!r}")
    return pair[0], pair[1]


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What is known of an encoder without building it.

    Attributes:
        name: the exact name that `create_encoder` takes.
        family: "clip", "siglip", "dinov2", "swin", "sam" or a plugin's own word.
        backend: "transformers", "timm", "open_clip" or "package.module:EncoderClass".
        source: the backend's class, model or architecture name.
        weights: hub id, or local folder or file, of the released weights; None if there are none.
        image_size: (height, width) of a view, px.
        trained_size: (height, width) of the weights' position tables, px; None for `image_size`.
        stride: pixels of one side of a token.
        dim: D, width of the tokens.
        block_dim: width of the blocks (Swin: of the first stage); None for `dim`.
        heads: attention heads of a block (of the first stage in Swin).
        mlp_dim: hidden width of a block's MLP (of the first stage in Swin).
        num_layers: blocks of the whole network (in Swin of all stages).
        num_prefix: P, tokens in front of the patches.
        feature_layer: the block whose output is used, from the end, -1 the last.
        final_norm: whether the network's last norm (SAM: its neck) is applied.
        mean: channel means that are subtracted, pixels from 0 to 1.
        std: channel deviations that are divided by.
        interpolation: the filter of the resize.
        resize: "crop" covers the view and cuts the middle out, "squash" ignores the
            aspect ratio, "pad" fits and fills with zeros at the right and bottom.
        crop_pct: part of the resized side that "crop" keeps.
        parameters: weights of the tower with all blocks and without heads; 0 if unknown.
        licence: of the released weights.
        reference: the paper or repository.
        options: extra build arguments of the backend.

    Raises:
        VlmError: a value that no encoder can have.
    """

    name: str
    family: str
    backend: str
    source: str
    weights: str | None
    image_size: Grid
    stride: int
    dim: int
    num_layers: int
    mean: Triple
    std: Triple
    trained_size: Grid | None = None
    block_dim: int | None = None
    heads: int = 0
    mlp_dim: int = 0
    num_prefix: int = 0
    feature_layer: int = -1
    final_norm: bool = False
    interpolation: Interpolation = "bicubic"
    resize: Resize = "squash"
    crop_pct: float = 1.0
    parameters: int = 0
    licence: str = ""
    reference: str = ""
    options: Options = ()

    def __post_init__(self) -> None:
        """Bring the size into one form and refuse impossible values."""
        object.__setattr__(self, "image_size", as_size(self.image_size, self.name))
        if not -self.num_layers <= self.feature_layer <= -1:
            raise VlmError(
                f"{self.name}: feature layer {self.feature_layer} is not one of its {self.num_layers} blocks; "
                f"count from the end, -1 (the last) to {-self.num_layers}"
            )

    @property
    def native_size(self) -> Grid:
        """(height, width) at which the weights were trained, px."""
        return self.trained_size or self.image_size

    @property
    def width(self) -> int:
        """Width of the blocks, before a neck or later stages change it."""
        return self.block_dim or self.dim

    @property
    def kept_layers(self) -> int:
        """Blocks up to the feature layer, the only ones that are built."""
        return self.num_layers + 1 + self.feature_layer

    def token_spec(self, image_size: int | Grid | None = None) -> TokenSpec:
        """State the tokens of one view, at another size if one is given (px).

        Raises:
            VlmError: the encoder cannot take this size.
        """
        height, width = self.image_size if image_size is None else self._check_size(image_size)
        rows, columns = height // self.stride, width // self.stride
        return TokenSpec(rows * columns, self.dim, (rows, columns), self.num_prefix)

    def resized(self, image_size: int | Grid) -> Self:
        """Give the same encoder for views of another size (px).

        Raises:
            VlmError: the encoder cannot take this size.
        """
        return dataclasses.replace(self, image_size=self._check_size(image_size), trained_size=self.native_size)

    def at_layer(self, feature_layer: int | None = None, *, final_norm: bool | None = None) -> Self:
        """Give the same encoder read at another block.

        The final norm was trained behind the last block alone: at a block other than
        the spec's own it is applied only when asked for.

        Raises:
            VlmError: the network has no such block.
        """
        layer = self.feature_layer if feature_layer is None else feature_layer
        if final_norm is None:
            final_norm = self.final_norm and layer == self.feature_layer
        return dataclasses.replace(self, feature_layer=layer, final_norm=final_norm)

    def _check_size(self, image_size: int | Grid) -> Grid:
        size = as_size(image_size, self.name)
        # SigLIP so400m was trained at 384 px with patches of 14: the last 6 px are unused.
        if size == self.native_size or all(side % self.stride == 0 for side in size):
            return size
        below = tuple(max(side // self.stride, 1) * self.stride for side in size)
        above = tuple(-(-side // self.stride) * self.stride for side in size)
        choice = _say(above) if below == above else f"{_say(below)} or {_say(above)}"
        raise VlmError(f"{self.name}: image size {_say(size)} is not a multiple of {self.stride}; use {choice}")


def _say(size: tuple[int, ...]) -> str:
    height, width = size
    return str(height) if height == width else f"{height}x{width}"
