"""One row of the encoder table: what an encoder is, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self

from connectors.errors import VlmError
from connectors.tokens import Grid, TokenSpec
from vlm_encoders.spec_values import (
    Interpolation,
    Layers,
    Options,
    PrefixKind,
    Resize,
    Sizes,
    Stage,
    Triple,
    as_size,
    check_choice,
    fitting_size,
    one_form,
)

__all__ = [
    "EncoderSpec",
    "Interpolation",
    "Layers",
    "Options",
    "PrefixKind",
    "Resize",
    "Sizes",
    "Stage",
    "Triple",
    "as_size",
]


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What is known of an encoder without building it.

    A layer is what `feature_layer` can name: a block, or a stage in a staged network
    such as Swin or ConvNeXt.

    Attributes:
        name: the exact name that `create_encoder` takes.
        family: "clip", "siglip", "dinov2", "swin", "sam" or a plugin's own word.
        backend: "transformers", "timm", "open_clip" or "package.module:EncoderClass".
        source: the backend's class, model or architecture name.
        weights: hub id, or local folder or file, of the released weights; None if there are none.
        revision: commit, tag or branch of the weights on the hub; None for the cached or
            newest main.
        image_size: (height, width) of a view, px.
        trained_size: (height, width) of the weights' position tables, px; None for `image_size`.
        sizes: the views that can be built: "any" whose tokens come out whole, "square", or "native" alone.
        packs: whether views of many sizes are encoded in one pack, by `Encoder.forward_packed`.
        positions: how places reach the network and are brought to another size, in words.
        stride: pixels of one side of a token.
        rounding: what the network does with pixels that do not fill a token: "floor" leaves
            them out, "ceil" makes one more token.
        dim: D, width of the tokens.
        block_dim: width of the blocks where it is not `dim`: behind a neck, or with several layers.
        stages: the stages of a staged network, first to last; () for one of equal blocks.
        neck: what `final_norm` stands for in SAM and its kin; None without a neck.
        heads: attention heads of a block (of the first stage in Swin).
        mlp_dim: hidden width of a block's MLP (of the first stage in Swin).
        gated_mlp: whether that MLP has a gate, so three matrices.
        windowed: whether some blocks attend within windows alone.
        num_layers: blocks, or stages, of the whole network.
        num_prefix: P, tokens in front of the patches.
        prefix_kinds: what each of them is, in order; () for one CLS token or for unknown ones.
        feature_layer: the layer whose output is used, from the end, -1 the last; several are
            joined channel by channel, in their order, at the grid of the first.
        final_norm: whether the network's last norm, or its neck, is applied.
        mean: channel means that are subtracted, pixels from 0 to 1.
        std: channel deviations that are divided by.
        interpolation: the filter of the resize.
        resize: "crop" covers the view and cuts the middle out, "squash" ignores the
            aspect ratio, "pad" fits and fills with zeros at the right and bottom, "expand"
            fills up to the view's aspect ratio with the mean colour and then fits.
        crop_pct: part of the resized sides that is kept, by "crop" and "squash".
        exact_pixels: make pixels bit-equal to the library's Pillow path; otherwise, and
            faster, photographs are at most one level of 255 apart, some drawn patterns under
            a bicubic filter two in a few places, and so is about one value in a million of
            tiles that are as large as the image.
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
    revision: str | None = None
    trained_size: Grid | None = None
    sizes: Sizes = "any"
    packs: bool = False
    positions: str = ""
    rounding: Literal["floor", "ceil"] = "floor"
    block_dim: int | None = None
    stages: tuple[Stage, ...] = ()
    neck: Stage | None = None
    heads: int = 0
    mlp_dim: int = 0
    gated_mlp: bool = False
    windowed: bool = False
    num_prefix: int = 0
    prefix_kinds: tuple[PrefixKind, ...] = ()
    feature_layer: int | tuple[int, ...] = -1
    final_norm: bool = False
    interpolation: Interpolation = "bicubic"
    resize: Resize = "squash"
    crop_pct: float = 1.0
    exact_pixels: bool = False
    parameters: int = 0
    licence: str = ""
    reference: str = ""
    options: Options = ()

    def __post_init__(self) -> None:
        """Bring sizes and layers into one form and refuse impossible values."""
        object.__setattr__(self, "image_size", as_size(self.image_size, self.name))
        object.__setattr__(self, "feature_layer", self._one_form(self.feature_layer))
        check_choice(self.name, "resize", self.resize, Resize)
        check_choice(self.name, "interpolation", self.interpolation, Interpolation)
        check_choice(self.name, "sizes", self.sizes, Sizes)
        for what in ("final_norm", "exact_pixels", "packs"):
            if not isinstance(getattr(self, what), bool):
                raise VlmError(f"{self.name}: {what} is True or False, got {getattr(self, what)!r}")
        if not self.prefix_kinds and self.num_prefix:
            kind: PrefixKind = "cls" if self.num_prefix == 1 else "other"
            object.__setattr__(self, "prefix_kinds", (kind,) * self.num_prefix)
        if len(self.prefix_kinds) != self.num_prefix:
            raise VlmError(f"{self.name}: {self.num_prefix} prefix tokens cannot be {self.prefix_kinds}; name each one")
        if self.stages and len(self.stages) != self.num_layers:
            raise VlmError(f"{self.name}: {len(self.stages)} stages are no {self.num_layers} layers; give one each")
        if self.neck is not None and not self.stages and self.block_dim is None:
            raise VlmError(f"{self.name}: behind a neck the blocks' own width is unknown; give block_dim")
        if (self.dim, self.stride) != self._output(self.layers, final_norm=self.final_norm):
            dim, stride = self._output(self.layers, final_norm=self.final_norm)
            raise VlmError(
                f"{self.name}: layer {self.feature_layer} gives tokens of width {dim} and stride {stride}, not "
                f"{self.dim} and {self.stride}; choose a layer by at_layer"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """The feature layers, from the end, in the order in which they are joined."""
        return (self.feature_layer,) if isinstance(self.feature_layer, int) else self.feature_layer

    @property
    def native_size(self) -> Grid:
        """(height, width) at which the weights were trained, px."""
        return self.trained_size or self.image_size

    @property
    def width(self) -> int:
        """Width of the blocks, before a neck or a joint of several layers changes it."""
        return self.block_dim or self.dim // (1 if self.stages else len(self.layers))

    @property
    def kept_layers(self) -> int:
        """Layers up to the last feature layer, the only ones that are built."""
        return self.num_layers + 1 + max(self.layers)

    @property
    def encodings(self) -> tuple[tuple[EncoderSpec, int], ...]:
        """The encoders inside, each with the times that one view runs it; () for one network."""
        return ()

    @property
    def pixel_specs(self) -> tuple[EncoderSpec, ...]:
        """The specs by which one view's pixels are made: its own, or those of its parts in order."""
        return (self,)

    @property
    def side_step(self) -> int:
        """Pixels that fill the tokens of one more row in every stage that is kept: the step of a view's sides."""
        return max((stage.stride for stage in self.stages[: self.kept_layers]), default=self.stride)

    @property
    def num_pixels(self) -> int:
        """Numbers in the pixels of one view."""
        return sum(3 * each.image_size[0] * each.image_size[1] for each in self.pixel_specs)

    @property
    def choices(self) -> dict[str, Any]:
        """What `create_encoder` needs beside the name to come to this size, layer and norm."""
        return {
            "image_size": list(self.image_size),
            "feature_layer": self.feature_layer,
            "final_norm": self.final_norm,
        }

    def altered(self, **fields: Any) -> Self:
        """Give the same encoder with other pixel rules, weights or build options; in a joint, for each part."""
        return dataclasses.replace(self, **fields)

    def token_spec(self, image_size: int | Grid | None = None) -> TokenSpec:
        """State the tokens of one view, at another size if one is given (px).

        Raises:
            VlmError: the encoder cannot take this size.
        """
        size = self.image_size if image_size is None else self._check_size(image_size)
        rows, columns = self._grid(size)
        return TokenSpec(rows * columns, self.dim, (rows, columns), self.num_prefix)

    def resized(self, image_size: int | Grid) -> Self:
        """Give the same encoder for views of another size (px).

        Raises:
            VlmError: the encoder cannot take this size.
        """
        return dataclasses.replace(self, image_size=self._check_size(image_size), trained_size=self.native_size)

    def at_layer(self, feature_layer: Layers | None = None, *, final_norm: bool | None = None) -> Self:
        """Give the same encoder read at another layer, or at several.

        The final norm was trained behind the last layer alone: at a layer other than
        the spec's own it is applied only when asked for.

        Raises:
            VlmError: the network has no such layer, or no neck behind it.
        """
        layer = self.feature_layer if feature_layer is None else self._one_form(feature_layer)
        if final_norm is None:
            final_norm = self.final_norm and layer == self.feature_layer
        layers = (layer,) if isinstance(layer, int) else layer
        dim, stride = self._output(layers, final_norm=final_norm)
        return dataclasses.replace(
            self,
            feature_layer=layer,
            final_norm=final_norm,
            dim=dim,
            stride=stride,
            block_dim=self.block_dim if self.stages else self.width,
        )

    def _one_form(self, layers: Layers) -> int | tuple[int, ...]:
        return one_form(self.name, layers, self.num_layers, "stages" if self.stages else "blocks")

    def _output(self, layers: tuple[int, ...], *, final_norm: bool) -> tuple[int, int]:
        """Give width and stride of the tokens of these layers."""
        if self.neck is not None and final_norm:
            if layers != (-1,):
                raise VlmError(f"{self.name}: its neck stands behind layer -1; pass final_norm=False for {layers}")
            return self.neck.dim, self.neck.stride
        if self.stages:
            chosen = [self.stages[layer] for layer in layers]
            return sum(stage.dim for stage in chosen), chosen[0].stride
        return self.width * len(layers), self.stride

    def _grid(self, size: Grid) -> Grid:
        stage = self.neck if self.neck and self.final_norm else self.stages[self.layers[0]] if self.stages else None
        if stage is not None and stage.grid is not None and size == self.native_size:
            return stage.grid
        height, width = size
        if self.rounding == "ceil":
            return -(-height // self.stride), -(-width // self.stride)
        return height // self.stride, width // self.stride

    def _check_size(self, image_size: int | Grid) -> Grid:
        step = 1 if self.rounding == "ceil" else self.side_step
        return fitting_size(self.name, image_size, self.native_size, self.sizes, step)
