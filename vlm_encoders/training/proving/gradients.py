"""The gradients of the first steps: the greatest of each tensor so far, over all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vlm_encoders.training.processes.sharding import local

__all__ = ["Gradient", "GradientRecord"]

Gradient: TypeAlias = Callable[[nn.Parameter], Tensor | None]
"""Gives the gradient of a parameter, or what of it this process holds."""


class GradientRecord:
    """What gradients and learning rates of trained tensors have been.

    Attributes:
        greatest: greatest magnitude of a tensor's gradient so far; -1 where none came, infinity where it was not
            finite.
        rates: greatest learning rate of a tensor so far; none is known without an optimizer.

    Args:
        names: of the tensors.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.greatest = dict.fromkeys(names, -1.0)
        self.rates: dict[str, float] = {}

    def add(
        self, parameters: Mapping[str, nn.Parameter], gradient: Gradient, flags: list[bool], device: torch.device
    ) -> list[bool]:
        """Take the gradients of a step; every process takes part.

        Args:
            parameters: those of the model, by name.
            gradient: gives that of a parameter.
            flags: what this process saw.
            device: where the processes exchange numbers.

        Returns:
            The flags that any process has set.
        """
        found = [_greatest(gradient(parameters[name])) for name in self.greatest]
        values = _over_processes([*found, *map(float, flags)], device)
        for name, value in zip(self.greatest, values[: len(found)], strict=True):
            self.greatest[name] = max(self.greatest[name], value)
        return [value > 0 for value in values[len(found) :]]

    def add_rates(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
        """Take the learning rates of a step."""
        rates = {id(each): float(group["lr"]) for group in optimizer.param_groups for each in group["params"]}
        for name in self.greatest:
            rate = rates.get(id(parameters[name]))
            if rate is not None:
                self.rates[name] = max(rate, self.rates.get(name, 0.0))

    def of(self, names: Iterable[str]) -> float:
        """Give the greatest of several tensors."""
        return max(self.greatest[name] for name in names)

    def not_finite(self) -> list[str]:
        """Name the tensors whose gradient was not finite."""
        return [name for name, value in self.greatest.items() if math.isinf(value)]


def _greatest(gradient: Tensor | None) -> float | Tensor:
    if gradient is None:
        return -1.0
    mine = local(gradient).detach()
    if not mine.numel():
        return 0.0
    norm: Tensor = torch.linalg.vector_norm(mine.float(), math.inf)
    return norm.nan_to_num(nan=math.inf, posinf=math.inf)


def _over_processes(values: list[float | Tensor], device: torch.device) -> list[float]:
    """Give the greatest of each value over all processes, so that all of them decide alike."""
    tensors = [torch.as_tensor(value, dtype=torch.float32, device=device).reshape(()) for value in values]
    whole = torch.stack(tensors)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(whole, op=torch.distributed.ReduceOp.MAX)
    greatest: list[float] = whole.tolist()
    return greatest
