"""Batches on the device, made in worker processes where there are any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import DataLoader

from connectors.errors import VlmError
from vlm_encoders.training.order import SeededBatches
from vlm_encoders.vlm.batch import to_device

if TYPE_CHECKING:
    from vlm_encoders.vlm.processor import Sample, VLMProcessor

__all__ = ["Samples", "iterate_batches"]


class Samples(Protocol):
    """What a training dataset gives: samples by index. `ConversationDataset` does."""

    def __len__(self) -> int:
        """Count the samples."""

    def __getitem__(self, index: int, /) -> Sample:
        """Make one sample."""


class _Careful:
    """Hands a VlmError on as a value: a worker would wrap its sentence in a traceback."""

    def __init__(self, dataset: Samples, processor: VLMProcessor) -> None:
        self.dataset = dataset
        self.processor = processor

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample | VlmError:
        try:
            return self.dataset[index]
        except VlmError as error:
            return error

    def collate(self, samples: Sequence[Sample | VlmError]) -> dict[str, Any] | VlmError:
        for sample in samples:
            if isinstance(sample, VlmError):
                return sample
        return self.processor.collate([sample for sample in samples if not isinstance(sample, VlmError)])


def iterate_batches(
    dataset: Samples,
    processor: VLMProcessor,
    order: SeededBatches | Sequence[list[int]],
    *,
    device: torch.device,
    num_workers: int = 0,
) -> Iterator[dict[str, Any]]:
    """Give the collated batches of an order of sample indices, on a device.

    Raises:
        VlmError: a sample cannot be made.
    """
    careful = _Careful(dataset, processor)
    loader: DataLoader[Any] = DataLoader(
        careful,  # type: ignore[arg-type]
        batch_sampler=order,
        collate_fn=careful.collate,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        # Its own generator: the loader must not draw from the one that dropout uses.
        generator=torch.Generator().manual_seed(0),
    )
    for batch in loader:
        if isinstance(batch, VlmError):
            raise batch
        yield to_device(batch, device)
