"""What is refused before weights are filled in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from connectors.base import Option
from connectors.chain import Chain
from connectors.errors import VlmError
from connectors.released.layout import Layout
from connectors.released.weights import Plan

__all__ = ["check_constants", "check_hints", "compare", "require_floats"]

_SHOWN = 3


def require_floats(layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    """Refuse quantised weights.

    Raises:
        VlmError: a tensor is of integers or of fp8.
    """
    for name, tensor in tensors.items():
        # fp8 is a floating point that nothing computes in.
        if (not tensor.is_floating_point() or tensor.itemsize < 2) and name not in _constants(layout):
            raise VlmError(
                f"'{name}' is {str(tensor.dtype).removeprefix('torch.')}, which is quantised or no weight; "
                "load the weights as they were before"
            )


def check_hints(layout: Layout, chain: Chain, hints: Mapping[str, Option]) -> None:
    """Refuse hints that the layout does not take; one that says what the weights say is let be.

    Raises:
        VlmError: a hint contradicts the weights, or is unknown.
    """
    told: dict[str, Option] = {}
    for each in chain.connectors:
        told = {**each.options(), **told}
    for name, value in hints.items():
        if name in layout.hints or (name in told and told[name] == value):
            continue
        if name in told:
            raise VlmError(f"the hint {name}={value} contradicts the weights, which say {told[name]}; leave it out")
        known = ", ".join(f"{hint}={layout.hints[hint].usual}" for hint in sorted(layout.hints)) or "none"
        raise VlmError(f"layout '{layout.name}' takes no hint '{name}'; it takes {known}")


def compare(layout: Layout, plan: Plan, given: Mapping[str, tuple[int, ...]], own: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not exactly those of the chain.

    Raises:
        VlmError: a name is missing or unexpected, or a shape is another.
    """
    needed = {name: tuple(tensor.shape) for name, tensor in own.items()}
    needed |= {name: (1, length) for name, length in layout.old_constants.items() if name in given}
    shapes = {name: needed[name] for name in sorted(needed.keys() & given.keys()) if needed[name] != given[name]}
    problems = [
        _list("missing", [f"{name} {needed[name]}" for name in sorted(needed.keys() - given.keys())]),
        _list("unexpected", [f"{name} {given[name]}" for name in sorted(given.keys() - needed.keys())]),
        _list("of another shape", [f"{name} is {given[name]}, not {shape}" for name, shape in shapes.items()]),
    ]
    if any(problems):
        said = "; ".join(filter(None, problems))
        raise VlmError(f"the weights are not those of layout '{layout.name}' as {plan.recipe}: {said}")


def _list(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what} {', '.join(names[:_SHOWN])}{more}" if names else ""


def check_constants(layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are known in advance and hold something else, since nothing would read them.

    Raises:
        VlmError: a tensor does not count 0, 1, 2, ...
    """
    for name, length in _constants(layout).items():
        if name in tensors and not torch.equal(tensors[name].cpu(), torch.arange(length)[None]):
            raise VlmError(f"'{name}' does not count 0 to {length - 1}, as every file of layout '{layout.name}' does")


def _constants(layout: Layout) -> dict[str, int]:
    return {**layout.constants, **layout.old_constants}
