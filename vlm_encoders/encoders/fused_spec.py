"""Several encoders that see one view, as one spec."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeAlias, get_args

from connectors.errors import TokenShapeError, VlmError
from connectors.tokens import Grid, TokenSpec
from vlm_encoders.encoders.joint_name import parse_joint
from vlm_encoders.encoders.joint_parts import own_options, part_spec
from vlm_encoders.resample import RESAMPLINGS
from vlm_encoders.spec import EncoderSpec, Layers, as_size

__all__ = ["Fuse", "FusedSpec", "explain", "fused_spec"]

Fuse: TypeAlias = Literal["channel", "sequence", "interleave"]
_PAPERS = {"channel": "2408.15998", "sequence": "2408.15998", "interleave": "2401.06209"}


@dataclass(frozen=True, kw_only=True)
class FusedSpec(EncoderSpec):
    """Parts that each preprocess for themselves, without prefix tokens; made by `fused_spec`.

    Its image size, which tilers cut to, is that of the part with the largest view. Sizes,
    layers and revisions are the parts' own and are chosen there.

    Attributes:
        parts: the encoders, in order.
        fuse: "channel" joins widths at one grid, row by row as before; "sequence" lets one part's
            tokens follow another's; "interleave" puts token i of each part side by side, in the
            order of the places (arXiv 2401.06209). The last two give no grid.
        grid: (rows, columns) that each part is brought to; None for the first part's with
            "channel", and for no change otherwise.
        resampling: as in `resample`.
        fold: with "channel", bring a finer grid to the common one by joining the tokens of each of
            its windows, row by row and then channel by channel as `pixel_shuffle` does, in place of
            resampling: nothing is lost, and the token is wider. The connector `sva` takes such tokens.
    """

    parts: tuple[EncoderSpec, ...]
    fuse: Fuse = "channel"
    grid: Grid | None = None
    resampling: str | None = None
    fold: bool = False

    @property
    def encodings(self) -> tuple[tuple[EncoderSpec, int], ...]:
        """The parts, each run once."""
        return tuple((part, 1) for part in self.parts)

    @property
    def pixel_specs(self) -> tuple[EncoderSpec, ...]:
        """Those of the parts, in order."""
        return tuple(spec for part in self.parts for spec in part.pixel_specs)

    @property
    def choices(self) -> dict[str, Any]:
        """Nothing: its name says it all."""
        return {}

    def token_spec(self, image_size: int | Grid | None = None) -> TokenSpec:
        """State the tokens of one view.

        Raises:
            VlmError: another size is asked for.
        """
        if image_size is not None:
            self.resized(image_size)
        return _joint_tokens(self.name, self.parts, self.fuse, self.grid, fold=self.fold)

    def resized(self, image_size: int | Grid) -> Self:
        """Refuse another size than its own.

        Raises:
            VlmError: it is another size.
        """
        size = as_size(image_size, self.name)
        if size != self.image_size:
            raise VlmError(
                f"{self.name}: each part has a size of its own, so the joint cannot take "
                f"{size[0]}x{size[1]} px; write [image_size=...] behind a part"
            )
        return self

    def at_layer(self, feature_layer: Layers | None = None, *, final_norm: bool | None = None) -> Self:
        """Refuse any layer and norm.

        Raises:
            VlmError: a layer or norm is asked for.
        """
        if feature_layer is not None or final_norm is not None:
            raise VlmError(
                f"{self.name}: each part has layers of its own, so the joint takes neither feature_layer nor "
                "final_norm; write [feature_layer=...] behind a part"
            )
        return self

    def altered(self, **fields: Any) -> Self:
        """Give the same joint with pixel rules or build options that hold for each part.

        Raises:
            VlmError: weights or a revision are asked for.
        """
        for key in ("revision", "weights"):
            if key in fields:
                word = "pretrained" if key == "weights" else key
                raise VlmError(f"{self.name}: one {word} cannot be that of each part; write [{word}=...] behind a part")
        options = dict(fields.pop("options", ()))
        parts = [
            part.altered(options=tuple({**dict(part.options), **options}.items()), **fields) for part in self.parts
        ]
        return replace(self, parts=tuple(parts), **fields)


def fused_spec(
    parts: Sequence[EncoderSpec],
    name: str,
    *,
    fuse: Fuse = "channel",
    grid: Grid | None = None,
    resampling: str | None = None,
    fold: bool = False,
) -> FusedSpec:
    """Make the spec of a joint.

    Args:
        parts: the encoders, two or more.
        name: of the joint.
        fuse: as in `FusedSpec`.
        grid: as in `FusedSpec`.
        resampling: as in `FusedSpec`.
        fold: as in `FusedSpec`.

    Raises:
        VlmError: an option has no such value, two do not go together, or the parts cannot be so joined.
    """
    if len(parts) < 2:
        raise VlmError(f"{name}: a joint takes two encoders or more, got {len(parts)}; add one behind '+'")
    for word, value, known in (("fuse", fuse, get_args(Fuse)), ("resampling", resampling, (None, *RESAMPLINGS))):
        if value not in known:
            use = ", ".join(str(each) for each in known if each)
            raise VlmError(f"{name}: {word} '{value}' is unknown; use {use}")
    if grid is not None:
        grid = _as_grid(grid, name)
    _check_fold(name, fold, fuse, resampling)
    tokens = _joint_tokens(name, parts, fuse, grid, fold=fold)
    largest = max(parts, key=lambda part: math.prod(part.image_size))
    counts = [part.parameters for part in parts]
    licences = dict.fromkeys(part.licence for part in parts)
    rows = tokens.num_tokens if tokens.grid is None else tokens.grid[0]
    return FusedSpec(
        name=name,
        family="fused",
        backend="vlm_encoders.encoders.fused:FusedEncoder",
        source=f"{fuse} of {', '.join(part.source for part in parts)}",
        weights=None,
        image_size=largest.image_size,
        stride=parts[0].stride if tokens.grid is None else max(largest.image_size[0] // rows, 1),
        dim=tokens.dim,
        block_dim=tokens.dim,
        num_layers=sum(part.kept_layers for part in parts),
        sizes="native",
        positions="each part's own",
        mean=largest.mean,
        std=largest.std,
        interpolation=largest.interpolation,
        resize=largest.resize,
        crop_pct=largest.crop_pct,
        exact_pixels=all(part.exact_pixels for part in parts),
        parameters=sum(counts) if all(counts) else 0,
        licence=" + ".join(licences) if all(licences) else "",
        reference=f"https://arxiv.org/abs/{_PAPERS[fuse]}",
        parts=tuple(parts),
        fuse=fuse,
        grid=grid,
        resampling=resampling,
        fold=fold,
    )


def explain(name: str) -> FusedSpec:
    """Make the spec of `fused:<name>+<name>`, which becomes its name; nothing is built.

    Raises:
        UnknownNameError: a part's name is not known.
        VlmError: the name cannot be read, or the parts do not fit each other.
    """
    joint = parse_joint(name)
    options = own_options(joint, name, ("fuse", "grid", "resampling", "fold"))
    return fused_spec([part_spec(part) for part in joint.parts], name, **options)


def _as_grid(grid: object, name: str) -> Grid:
    pair = tuple(grid) if isinstance(grid, (list, tuple)) else ()
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise VlmError(f"{name}: a grid is (rows, columns), got {grid}; write grid=24x24")
    return pair


def _check_fold(name: str, fold: object, fuse: Fuse, resampling: str | None) -> None:
    if not isinstance(fold, bool):
        raise VlmError(f"{name}: fold={fold} is not understood; give true or false")
    if fold and fuse != "channel":
        raise VlmError(f"{name}: fold joins windows by channel and fuse is {fuse}; use fuse=channel, or leave fold out")
    if fold and resampling is not None:
        raise VlmError(
            f"{name}: fold stands in place of resampling, got resampling={resampling}; leave one of them out"
        )


def _joint_tokens(
    name: str, parts: Sequence[EncoderSpec], fuse: Fuse, grid: Grid | None, *, fold: bool = False
) -> TokenSpec:
    own = [part.token_spec() for part in parts]
    pairs = list(zip(parts, own, strict=True))
    lacking = [part.name for part, tokens in pairs if tokens.grid is None]
    if lacking and (fuse == "channel" or grid is not None):
        raise TokenShapeError(f"{name}: the tokens of '{lacking[0]}' have no grid; use fuse=sequence without grid=")
    if fuse == "channel":
        goal = grid or own[0].grid or (1, 1)
        windows = [_window_side(name, part.name, tokens.grid or goal, goal) if fold else 1 for part, tokens in pairs]
        dims = (tokens.dim * side**2 for tokens, side in zip(own, windows, strict=True))
        return TokenSpec(math.prod(goal), sum(dims), goal)
    widths = [tokens.dim for tokens in own]
    if len(set(widths)) > 1:
        raise TokenShapeError(f"{name}: {fuse} needs one width, the parts have {widths}; use fuse=channel")
    counts = [tokens.num_tokens if grid is None else math.prod(grid) for tokens in own]
    if fuse == "interleave" and grid is None and len({(tokens.num_tokens, tokens.grid) for tokens in own}) > 1:
        grids = ", ".join("none" if tokens.grid is None else f"{tokens.grid[0]}x{tokens.grid[1]}" for tokens in own)
        raise TokenShapeError(f"{name}: interleave needs one grid, the parts have {grids}; give grid=ROWSxCOLUMNS")
    return TokenSpec(sum(counts), widths[0])


def _window_side(name: str, part: str, grid: Grid, goal: Grid) -> int:
    """Give the side of the square windows, tokens, that bring a part's grid to the goal."""
    side = grid[0] // goal[0]
    if side < 1 or grid != (goal[0] * side, goal[1] * side):
        raise TokenShapeError(
            f"{name}: the {grid[0]}x{grid[1]} grid of '{part}' does not fold to {goal[0]}x{goal[1]} by square "
            "windows; give the part another image_size, the joint another grid=, or leave fold out"
        )
    return side
