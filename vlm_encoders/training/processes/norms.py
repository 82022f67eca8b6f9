"""Norms of gradients by unit, whole or sharded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm_encoders.training.processes.sharding import is_sharded

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["gradient_norms", "scale_gradients"]


def gradient_norms(optimizer: Optimizer) -> dict[str, float]:
    """Give the norm of the gradient of each unit; all processes take part."""
    gradients: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        name = group.get("unit") or group.get("part") or "weights"
        gradients.setdefault(name, []).extend(_gradients(group["params"]))
    norms = {name: torch.nn.utils.get_total_norm(found) for name, found in gradients.items() if found}
    if not norms:
        return {}
    whole = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms.values()]  # type: ignore[attr-defined]
    # One wait for the device, not one a unit.
    values: list[float] = torch.stack([norm.double() for norm in whole]).tolist()
    return dict(zip(norms, values, strict=True))


def scale_gradients(optimizer: Optimizer, factor: float) -> None:
    """Multiply all gradients."""
    for group in optimizer.param_groups:
        for gradient in _gradients(group["params"]):
            gradient.mul_(factor)


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
