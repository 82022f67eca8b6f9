"""Pairs of names: where a library keeps a tensor, and where a chain keeps it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["COPY", "HALVES", "ROW", "SQUARE", "TRANSPOSED", "Move", "Pair", "pair", "to_ours", "to_theirs"]


@dataclass(frozen=True)
class Move:
    """How a tensor of a library becomes tensors of ours, and back; both keep every value."""

    ours: Callable[[Tensor], tuple[Tensor, ...]]
    theirs: Callable[[tuple[Tensor, ...]], Tensor]


COPY = Move(lambda tensor: (tensor,), lambda ours: ours[0])
TRANSPOSED = Move(lambda tensor: (tensor.t(),), lambda ours: ours[0].t())
ROW = Move(lambda tensor: (tensor.flatten(0, 1),), lambda ours: ours[0][None])
"""(1, N, D) against (N, D)."""
SQUARE = Move(
    lambda tensor: (tensor.flatten(0, 1).unflatten(0, (math.isqrt(tensor.shape[1]), -1)),),
    lambda ours: ours[0].flatten(0, 1)[None],
)
"""(1, S*S, D) against (S, S, D), for a library whose positions are of square images alone."""
HALVES = Move(lambda tensor: (tensor[: len(tensor) // 2], tensor[len(tensor) // 2 :]), torch.cat)
"""One matrix whose first half of rows is the first of ours, the second half the second."""


@dataclass(frozen=True)
class Pair:
    """One rule between the two kinds of names.

    A name is that of a module or of a parameter; `.weight` and `.bias` behind it are the
    same on both sides. `{}` stands for a number that is the same too, `{+1}` for one that
    a library counts from 1. Ours starts with the link: `mlp.layers.0`, `conv2.conv` for
    the second `conv` of a chain.

    Attributes:
        theirs: the library's name, without the root.
        ours: one name, or as many as `move` gives tensors.
        move: how the tensors change.
    """

    theirs: str
    ours: tuple[str, ...]
    move: Move = COPY


def pair(theirs: str, *ours: str, move: Move = COPY) -> Pair:
    """Write a `Pair` shortly."""
    return Pair(theirs, ours, move)


def to_ours(name: str, pairs: Sequence[Pair]) -> tuple[tuple[str, ...], Move] | None:
    """Give the names that a library's tensor has with us, or None where no pair knows it."""
    for each in pairs:
        if (found := _match(each.theirs, name)) is not None:
            numbers, tail = found
            return tuple(_fill(ours, numbers) + tail for ours in each.ours), each.move
    return None


def to_theirs(tensors: Mapping[str, Tensor], pairs: Sequence[Pair]) -> tuple[dict[str, Tensor], list[str]]:
    """Give tensors of ours under a library's names, and the names that no pair knows."""
    found: dict[str, Tensor] = {}
    unknown = []
    for name in tensors:
        if (rule := _rule_of(name, pairs)) is None or not all(ours in tensors for ours in rule[1]):
            unknown.append(name)
        elif rule[1][0] == name:
            theirs, ours, move = rule
            found[theirs] = move.theirs(tuple(tensors[each] for each in ours))
    return found, unknown


def _rule_of(name: str, pairs: Sequence[Pair]) -> tuple[str, tuple[str, ...], Move] | None:
    """Give, for a name of ours, the library's name, all names of ours that it holds, and how they change."""
    for each in pairs:
        for template in each.ours:
            if (match := _match(template, name)) is not None:
                numbers, tail = match
                ours = tuple(_fill(other, numbers) + tail for other in each.ours)
                return _fill(each.theirs, numbers) + tail, ours, each.move
    return None


def _match(template: str, name: str) -> tuple[list[int], str] | None:
    """Give the numbers of `name`, counted from 0, and `.weight` or `.bias`."""
    shifts = [int(mark or 0) for mark in re.findall(r"\{(\+1)?\}", template)]
    pattern = r"(\d+)".join(map(re.escape, re.split(r"\{(?:\+1)?\}", template)))
    if (match := re.fullmatch(rf"{pattern}(\.weight|\.bias)?", name)) is None:
        return None
    *numbers, tail = match.groups()
    return [int(number) - shift for number, shift in zip(numbers, shifts, strict=True)], tail or ""


def _fill(template: str, numbers: Sequence[int]) -> str:
    given = iter(numbers)
    return re.sub(r"\{(\+1)?\}", lambda mark: str(next(given) + int(mark[1] or 0)), template)
