"""One network at several scales of a view, as a spec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from connectors.errors import TokenShapeError, VlmError
from connectors.tokens import Grid, TokenSpec
from vlm_encoders.encoders.joint_name import parse_joint
from vlm_encoders.encoders.joint_parts import own_options, part_spec
from vlm_encoders.spec import EncoderSpec, Layers, as_size

__all__ = ["MultiScaleSpec", "explain", "multiscale_spec"]


@dataclass(frozen=True, kw_only=True)
class MultiScaleSpec(EncoderSpec):
    """An encoder that sees a view at several scales (S2, arXiv 2403.13043); made by `multiscale_spec`.

    Its image size is that of the largest scale, which is what images are made to. Size, layer
    and norm are those of the part, and change it.

    Attributes:
        part: the encoder; `part.image_size` is one sub-view, px.
        scales: sub-views along a side, from the fewest.
    """

    part: EncoderSpec
    scales: tuple[int, ...] = (1, 2)

    @property
    def encodings(self) -> tuple[tuple[EncoderSpec, int], ...]:
        """The part, run on each sub-view of each scale."""
        return ((self.part, sum(scale**2 for scale in self.scales)),)

    @property
    def pixel_specs(self) -> tuple[EncoderSpec, ...]:
        """The part's pixel rules at the largest scale."""
        (inner,) = self.part.pixel_specs
        return (replace(inner, image_size=self.image_size, trained_size=inner.native_size),)

    def token_spec(self, image_size: int | Grid | None = None) -> TokenSpec:
        """State the tokens of one view, at another size if one is given (px of the largest scale).

        Raises:
            VlmError: the encoder cannot take this size.
        """
        part = (self if image_size is None else self.resized(image_size)).part.token_spec()
        if part.grid is None:
            raise TokenShapeError(f"{self.name}: the tokens of '{self.part.name}' have no grid to be put together by")
        rows, columns = (side * self.scales[0] for side in part.grid)
        return TokenSpec(rows * columns, part.dim * len(self.scales), (rows, columns))

    def resized(self, image_size: int | Grid) -> Self:
        """Give the same encoder for views of another size, px of the largest scale.

        Raises:
            VlmError: the size does not divide into the largest scale, or the part cannot take it.
        """
        height, width = as_size(image_size, self.name)
        most = self.scales[-1]
        if height % most or width % most:
            raise VlmError(
                f"{self.name}: image size {height}x{width} does not divide into {most}x{most} sub-views; "
                f"give {most} times the size of one"
            )
        return self._of(self.part.resized((height // most, width // most)))

    def at_layer(self, feature_layer: Layers | None = None, *, final_norm: bool | None = None) -> Self:
        """Give the same encoder with its part read at another layer.

        Raises:
            VlmError: the part has no such layer.
        """
        return self._of(self.part.at_layer(feature_layer, final_norm=final_norm))

    def altered(self, **fields: Any) -> Self:
        """Give the same encoder with other pixel rules, weights or build options of its part."""
        return self._of(self.part.altered(**fields))

    def _of(self, part: EncoderSpec) -> Self:
        return type(self)(**_mirrored(part, self.scales, self.name))

    def _output(self, layers: tuple[int, ...], *, final_norm: bool) -> tuple[int, int]:
        part = self.part.at_layer(layers, final_norm=final_norm)
        return part.dim * len(self.scales), part.stride * self.scales[-1] // self.scales[0]


def multiscale_spec(part: EncoderSpec, name: str, scales: int | Sequence[int] = (1, 2)) -> MultiScaleSpec:
    """Make the spec of an encoder at several scales.

    Args:
        part: the encoder at its own size.
        name: of the whole.
        scales: sub-views along a side, growing.

    Raises:
        VlmError: the scales are not growing whole numbers, or the encoder sees no single picture.
    """
    several = (scales,) if isinstance(scales, int) else tuple(scales)
    whole = all(isinstance(scale, int) and scale > 0 for scale in several)
    if not several or not whole or list(several) != sorted(set(several)):
        raise VlmError(f"{name}: scales are growing whole numbers, got {scales}; write scales=1/2")
    if len(part.pixel_specs) > 1:
        raise VlmError(
            f"{name}: the pixels of '{part.name}' are those of several encoders and cannot be cut; "
            "put multiscale around each part"
        )
    spec = MultiScaleSpec(**_mirrored(part, several, name))
    # A part without a grid is refused here, not at the first image.
    spec.token_spec()
    return spec


def explain(name: str) -> MultiScaleSpec:
    """Make the spec of `multiscale:<name>`, which becomes its name; nothing is built.

    Raises:
        UnknownNameError: the part's name is not known.
        VlmError: the name cannot be read.
    """
    joint = parse_joint(name)
    options = own_options(joint, name, ("scales",))
    if len(joint.parts) != 1:
        raise VlmError(f"'{name}': multiscale takes one encoder, got {len(joint.parts)}; put it into parentheses")
    return multiscale_spec(part_spec(joint.parts[0]), name, **options)


def _mirrored(part: EncoderSpec, scales: tuple[int, ...], name: str) -> dict[str, Any]:
    """Give the fields of the whole: the part's, but for those that the scales change."""
    most = scales[-1]
    height, width = part.image_size
    native = part.native_size
    return {
        **{each.name: getattr(part, each.name) for each in fields(EncoderSpec)},
        "name": name,
        "family": "multiscale",
        "backend": "vlm_encoders.encoders.multiscale:MultiScale",
        "image_size": (height * most, width * most),
        "trained_size": (native[0] * most, native[1] * most),
        "dim": part.dim * len(scales),
        "block_dim": part.width,
        "stride": part.stride * most // scales[0],
        "packs": False,
        "num_prefix": 0,
        "prefix_kinds": (),
        "reference": "https://arxiv.org/abs/2403.13043",
        "part": part,
        "scales": scales,
    }
