"""Several encoders as one: joined by channel, one after another, or token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from connectors.errors import VlmError
from connectors.tokens import Grid, VisualTokens, require_grid
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.fused_spec import Fuse, FusedSpec, fused_spec
from vlm_encoders.encoders.joint_parts import joint_origin
from vlm_encoders.registry import build_encoder
from vlm_encoders.resample import join_channels, resample
from vlm_encoders.spec import EncoderSpec

__all__ = ["FusedEncoder"]


class FusedEncoder(Encoder):
    """Encoders that see the same view, each with pixels of its own; prefix tokens are dropped.

    A view's pixels are (L,): those of each part, flattened, one part after another. `blocks()`
    gives all parts' blocks, part by part; a stage has a policy for each part, or one for all alike.

    Args:
        encoders: two or more, in order, all of one dtype.
        fuse: "channel", "sequence" or "interleave", as in `FusedSpec`.
        grid: (rows, columns) that each part is brought to; None for the first part's with
            "channel", and for no change otherwise.
        resampling: as in `resample`.
        fold: as in `FusedSpec`.

    Attributes:
        origin: rebuilds the joint by name where each encoder was made by `create_encoder`
            with options that a name can hold; empty otherwise.

    Raises:
        VlmError: the encoders cannot be so joined.
    """

    spec: FusedSpec

    def __init__(
        self,
        encoders: Sequence[Encoder],
        *,
        fuse: Fuse = "channel",
        grid: Grid | None = None,
        resampling: str | None = None,
        fold: bool = False,
    ) -> None:
        parts = list(encoders)
        origin = joint_origin(
            "fused",
            [part.origin for part in parts],
            {"fuse": fuse, "grid": grid and tuple(grid), "resampling": resampling, "fold": fold or None},
        )
        name = origin.get("name") or f"fused:{'+'.join(part.spec.name for part in parts)}"
        specs = [part.spec for part in parts]
        super().__init__(fused_spec(specs, name, fuse=fuse, grid=grid, resampling=resampling, fold=fold))
        _check_parts(name, parts)
        self.encoders = nn.ModuleList(parts)
        self.origin = origin

    @classmethod
    def build(cls, spec: EncoderSpec, *, pretrained: bool | str, dtype: torch.dtype) -> Self:
        """Build each part from its spec, with its own weights."""
        joint = cast("FusedSpec", spec)
        if isinstance(pretrained, str):
            raise VlmError(
                f"{spec.name}: pretrained='{pretrained}' is one place for the weights of {len(joint.parts)} encoders; "
                "write [pretrained=FOLDER] behind each part"
            )
        parts = [build_encoder(part, pretrained=pretrained, dtype=dtype) for part in joint.parts]
        encoder = cls(parts, fuse=joint.fuse, grid=joint.grid, resampling=joint.resampling, fold=joint.fold)
        encoder.spec = joint
        return encoder

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """The pixels of all parts in a row, (L,)."""
        return (sum(math.prod(part.pixel_shape) for part in self.parts),)

    @property
    def parts(self) -> list[Encoder]:
        """The encoders, in order."""
        return [cast("Encoder", part) for part in self.encoders]

    def forward_features(self, pixel_values: Tensor) -> VisualTokens:
        """Run each part on its pixels and join the tokens."""
        sizes = [math.prod(part.pixel_shape) for part in self.parts]
        found = []
        for part, pixels in zip(self.parts, pixel_values.split(sizes, dim=1), strict=True):
            visual: VisualTokens = part(pixels.reshape(-1, *part.pixel_shape))
            found.append(VisualTokens(visual.tokens, visual.grid))
        spec = self.spec
        if spec.fuse == "channel" and spec.fold:
            rows, _ = require_grid(self.token_spec.grid)
            found = [_fold(visual, require_grid(visual.grid)[0] // rows) for visual in found]
        if spec.fuse == "channel":
            return join_channels(found, spec.grid, spec.resampling)
        if spec.grid is not None:
            found = [resample(visual, spec.grid, spec.resampling) for visual in found]
        tokens = [visual.tokens for visual in found]
        if spec.fuse == "sequence":
            return VisualTokens(torch.cat(tokens, dim=1))
        return VisualTokens(torch.stack(tokens, dim=2).flatten(1, 2))

    def blocks(self) -> list[nn.Module]:
        """Give the kept blocks of the first part, then those of the second, and so on."""
        return [block for part in self.parts for block in part.blocks()]


def _fold(visual: VisualTokens, side: int) -> VisualTokens:
    """Join the tokens of each `side` x `side` window: (B, R*C, D) to (B, R*C / side**2, D * side**2)."""
    rows, columns = (length // side for length in require_grid(visual.grid))
    blocks = visual.tokens.unflatten(1, (rows, side, columns, side)).transpose(2, 3)
    return VisualTokens(blocks.flatten(3).flatten(1, 2), (rows, columns))


def _check_parts(name: str, parts: Sequence[Encoder]) -> None:
    if len({id(part) for part in parts}) < len(parts):
        raise VlmError(f"{name}: one encoder stands in it twice; build a second one, or use multiscale")
    dtypes = [next((parameter.dtype for parameter in part.parameters()), None) for part in parts]
    if len(set(dtypes) - {None}) > 1:
        words = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise VlmError(f"{name}: its parts are {words}, and pixels have one dtype; build all of one")
