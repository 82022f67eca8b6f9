"""The values that a row of the encoder table is made of: sizes, layers and stages."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from connectors.errors import VlmError
from connectors.tokens import Grid

__all__ = [
    "Interpolation",
    "Layers",
    "Options",
    "PrefixKind",
    "Resize",
    "Sizes",
    "Stage",
    "Triple",
    "as_size",
    "check_choice",
    "fitting_size",
    "one_form",
]

Interpolation: TypeAlias = Literal["bicubic", "bilinear", "lanczos", "nearest"]
Resize: TypeAlias = Literal["crop", "squash", "pad", "expand"]
PrefixKind: TypeAlias = Literal["cls", "distillation", "register", "other"]
Sizes: TypeAlias = Literal["any", "square", "native"]
Layers: TypeAlias = int | Sequence[int]
"""One layer or several, counted from the end, -1 the last."""
Options: TypeAlias = tuple[tuple[str, object], ...]
"""Extra build arguments as (name, value) pairs; values are hashable and JSON-able."""

Triple: TypeAlias = tuple[float, float, float]


def as_size(size: int | Grid, owner: str) -> Grid:
    """Give (height, width) in px of a side or of a size.

    Raises:
        VlmError: it is neither, or not positive.
    """
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    try:
        height, width = (operator.index(side) for side in sides)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise VlmError(f"{owner}: an image size is one side or (height, width) in px, whole numbers, got {size!r}")
    return height, width


@dataclass(frozen=True)
class Stage:
    """The tokens behind one stage of a staged network, or behind a neck.

    Attributes:
        dim: D, width of its tokens.
        stride: pixels of one side of a token.
        grid: (rows, columns) at the native size; None where size and stride tell them.
    """

    dim: int
    stride: int
    grid: Grid | None = None


def check_choice(owner: str, what: str, value: object, choices: object) -> None:
    """Hold a value to a Literal's.

    Raises:
        VlmError: it is none of them.
    """
    known = get_args(choices)
    if value not in known:
        raise VlmError(f"{owner}: {what} '{value}' is none of {', '.join(known)}; use one of these")


def one_form(owner: str, layers: Layers, num_layers: int, kind: str) -> int | tuple[int, ...]:
    """Give one layer as a number, several as a tuple.

    Args:
        owner: the encoder's name, for messages.
        layers: as a user gives them.
        num_layers: how many there are.
        kind: what they are, in the plural, for messages.

    Raises:
        VlmError: one is none of the encoder's, or named twice.
    """
    several = tuple(layers) if isinstance(layers, (tuple, list)) else (layers,)
    if not several or any(isinstance(layer, str) for layer in several):
        raise VlmError(
            f"{owner}: a feature layer is a whole number below 0, or several, got {layers!r}; give -1 for the last"
        )
    for layer in several:
        if not isinstance(layer, int) or not -num_layers <= layer <= -1:
            raise VlmError(
                f"{owner}: feature layer {layer} is not one of its {num_layers} {kind}; "
                f"count from the end, -1 (the last) to {-num_layers}"
            )
    if len(set(several)) != len(several):
        raise VlmError(f"{owner}: feature layers {several} name one twice; name each once")
    return several[0] if len(several) == 1 else several


def fitting_size(owner: str, image_size: int | Grid, native: Grid, sizes: Sizes, step: int) -> Grid:
    """Give (height, width) in px, if the network can take it.

    Args:
        owner: the encoder's name, for messages.
        image_size: one side or (height, width), px.
        native: the size of the weights, which always fits.
        sizes: which others do.
        step: px that both sides must be a multiple of.

    Raises:
        VlmError: it does not fit; the nearest sizes that do are named.
    """
    size = as_size(image_size, owner)
    # SigLIP so400m was trained at 384 px with patches of 14: the last 6 px are unused.
    if size == native:
        return size
    if sizes == "native" or (sizes == "square" and size[0] != size[1]):
        which = "square views" if sizes == "square" else f"views of {_say(native)} px"
        raise VlmError(f"{owner}: the network takes {which} alone, got {_say(size)}; leave image_size out")
    if all(side % step == 0 for side in size):
        return size
    below = tuple(max(side // step, 1) * step for side in size)
    above = tuple(-(-side // step) * step for side in size)
    choice = _say(above) if below == above else f"{_say(below)} or {_say(above)}"
    raise VlmError(f"{owner}: image size {_say(size)} is not a multiple of {step}; use {choice}")


def _say(size: tuple[int, ...]) -> str:
    height, width = size
    return str(height) if height == width else f"{height}x{width}"
