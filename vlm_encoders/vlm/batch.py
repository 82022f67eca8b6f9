"""A batch as the model takes it, moved as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Give a batch of `VLMProcessor.collate` on a device: tensors, and lists of views; plans stay."""
    return {key: _moved(value, device) for key, value in batch.items()}


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [view.to(device, non_blocking=True) for view in value]
    return value
