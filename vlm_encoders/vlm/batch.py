"""Samples, and the batch of them that the model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from connectors.errors import VlmError
from connectors.tokens import PackedTokens, VisualTokens
from vlm_encoders.tiling.plan import TilePlan
from vlm_encoders.vlm.chat import IGNORED

__all__ = ["Sample", "join_views", "join_visual", "pack_samples", "pad_samples", "to_device"]


@dataclass(frozen=True)
class Sample:
    """One conversation, ready for the model.

    Attributes:
        input_ids: T ids, image places expanded.
        labels: T labels: ids on answers, -100 elsewhere.
        pixel_values: (V, 3, S, S), the views of its images in order; a list of (3, H, W) under a tiler
            whose views have sizes of their own; None for text alone.
        plans: how each image was cut.
        visual: the views' tokens as the encoder gives them, in place of pixels.
    """

    input_ids: list[int]
    labels: list[int]
    pixel_values: Tensor | list[Tensor] | None
    plans: list[TilePlan]
    visual: VisualTokens | PackedTokens | None = None


def pad_samples(
    samples: Sequence[Sample], pad_token_id: int, *, native: bool, padding_side: Literal["left", "right"]
) -> dict[str, Any]:
    """Pad samples to one batch; see `VLMProcessor.collate`.

    Args:
        samples: at least one.
        pad_token_id: what fills up the ids.
        native: whether views have sizes of their own.
        padding_side: right for training, left for generation.

    Raises:
        VlmError: there is no sample.
    """
    _require_samples(samples)
    length = max(len(sample.input_ids) for sample in samples)

    def padded(values: list[int], fill: int) -> list[int]:
        filling = [fill] * (length - len(values))
        return values + filling if padding_side == "right" else filling + values

    return {
        "input_ids": torch.tensor([padded(sample.input_ids, pad_token_id) for sample in samples]),
        "attention_mask": torch.tensor([padded([1] * len(sample.input_ids), 0) for sample in samples]),
        "labels": torch.tensor([padded(sample.labels, IGNORED) for sample in samples]),
        **_images(samples, native=native),
    }


def pack_samples(samples: Sequence[Sample], *, native: bool) -> dict[str, Any]:
    """Put samples one after another in one row; see `VLMProcessor.collate`.

    Args:
        samples: at least one.
        native: whether views have sizes of their own.

    Raises:
        VlmError: there is no sample.
    """
    _require_samples(samples)
    ids = [token for sample in samples for token in sample.input_ids]
    # No token is predicted from the sample before.
    labels = [label for sample in samples for label in (IGNORED, *sample.labels[1:])]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "labels": torch.tensor([labels]),
        **_images(samples, native=native),
        "lengths": [len(sample.input_ids) for sample in samples],
    }


def join_views(parts: Sequence[Tensor | list[Tensor]], *, native: bool) -> Tensor | list[Tensor] | None:
    """Join the views of images or of samples in their order.

    Args:
        parts: views of each, (V, 3, H, W) or (3, H, W) one by one.
        native: whether views have sizes of their own.

    Returns:
        One tensor, or a list of (3, H, W) where views have sizes of their own, or None of no part.
    """
    if not parts:
        return None
    if native:
        return [view for views in parts for view in views]
    tensors = [views if isinstance(views, Tensor) else torch.stack(views) for views in parts]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def join_visual(parts: Sequence[VisualTokens | PackedTokens]) -> VisualTokens | PackedTokens:
    """Join the tokens of views that are encoded already, in their order; at least one part."""
    if len(parts) == 1:
        return parts[0]
    if any(isinstance(part, PackedTokens) for part in parts):
        views = [part.split() if isinstance(part, PackedTokens) else [part] for part in parts]
        return PackedTokens.join([view for split in views for view in split])
    prefixes = [part.prefix for part in parts if part.prefix is not None]
    tokens = torch.cat([part.tokens for part in parts])
    return VisualTokens(tokens, parts[0].grid, torch.cat(prefixes) if prefixes else None)  # type: ignore[union-attr]


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Give a batch of `VLMProcessor.collate` on a device: tensors, lists of views, and tokens; plans stay."""
    return {key: _moved(value, device) for key, value in batch.items()}


def _require_samples(samples: Sequence[Sample]) -> None:
    if not samples:
        raise VlmError("there is no sample to batch; give one or more")


def _images(samples: Sequence[Sample], *, native: bool) -> dict[str, Any]:
    views = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    encoded = [sample.visual for sample in samples if sample.visual is not None]
    return {
        "pixel_values": join_views(views, native=native),
        "plans": [plan for sample in samples for plan in sample.plans],
        **({"visual": join_visual(encoded)} if encoded else {}),
    }


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [view.to(device, non_blocking=True) for view in value]
    if isinstance(value, (VisualTokens, PackedTokens)):
        prefix = None if value.prefix is None else value.prefix.to(device, non_blocking=True)
        return replace(value, tokens=value.tokens.to(device, non_blocking=True), prefix=prefix)
    return value
