"""Batches made in worker processes where there are any, with what went wrong in them as values."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader

from connectors.errors import VlmError
from vlm_encoders.training.feeding.skipped import BadSample, is_system_failure
from vlm_encoders.vlm.batch import to_device

if TYPE_CHECKING:
    from vlm_encoders.vlm.processor import Sample, VLMProcessor

__all__ = ["Indexed", "Made", "Parcel", "Samples", "Source", "collate_parcel", "iterate_batches", "load"]


class Samples(Protocol):
    """What a training dataset gives: samples by index. `ConversationDataset` does."""

    def __len__(self) -> int:
        """Count the samples."""

    def __getitem__(self, index: int, /) -> Sample:
        """Make one sample."""


class Source(Protocol):
    """Makes samples of tickets: what says, cheaply, which sample is wanted."""

    def make(self, ticket: Any, /) -> Sample:
        """Make one sample."""

    def tell(self, ticket: Any, /) -> tuple[str, str]:
        """Give the key of a sample, the same in every epoch, and its id."""


class Indexed:
    """A dataset whose tickets are indices.

    Args:
        dataset: samples by index.
    """

    def __init__(self, dataset: Samples) -> None:
        self.dataset = dataset

    def make(self, ticket: int) -> Sample:
        """Make one sample."""
        return self.dataset[ticket]

    def tell(self, ticket: int) -> tuple[str, str]:
        """Give the index as key, and the id where there is one."""
        try:
            return str(ticket), str(getattr(self.dataset, "sample_id", str)(ticket))
        except (VlmError, OSError, MemoryError):
            return str(ticket), str(ticket)


class Made(NamedTuple):
    """What became of a ticket: a sample, or why there is none."""

    sample: Sample | None = None
    bad: BadSample | None = None
    failure: str | None = None


class Parcel(NamedTuple):
    """What became of a list of tickets.

    Attributes:
        batch: of the samples that could be made; None where there is none.
        bad: the others.
        failure: what stops the run whatever the policy: the machine failed.
    """

    batch: dict[str, Any] | None
    bad: list[BadSample]
    failure: str | None


class _Careful:
    """Hands errors on as values: a worker would wrap their sentence in a traceback."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, ticket: Any) -> Made:
        try:
            return Made(self.source.make(ticket))
        except (VlmError, OSError, MemoryError, RuntimeError) as error:
            sentence = " ".join(str(error).split()) or type(error).__name__
            if is_system_failure(error) or isinstance(error, OSError):
                key, _ = self.source.tell(ticket)
                return Made(
                    failure=f"sample '{key}' cannot be made for want of the machine, not of its data: {sentence}"
                )
            if not isinstance(error, VlmError):
                raise
            return Made(bad=BadSample(*self.source.tell(ticket), sentence))


def collate_parcel(made: Sequence[Made], collate: Callable[[list[Sample]], dict[str, Any]]) -> Parcel:
    """Make a batch of what could be made."""
    bad = [each.bad for each in made if each.bad is not None]
    failure = next((each.failure for each in made if each.failure is not None), None)
    samples = [each.sample for each in made if each.sample is not None]
    return Parcel(collate(samples) if samples and failure is None else None, bad, failure)


class _Collate:
    """Picklable, for workers that are spawned."""

    def __init__(self, processor: VLMProcessor, options: dict[str, Any]) -> None:
        self.processor = processor
        self.options = options

    def __call__(self, made: Sequence[Made]) -> Parcel:
        return collate_parcel(made, lambda samples: self.processor.collate(samples, **self.options))


def load(
    source: Source,
    tickets: Iterable[list[Any]],
    *,
    processor: VLMProcessor | None,
    num_workers: int,
    pinned: bool,
    **options: Any,
) -> Iterator[Any]:
    """Give a parcel for each list of tickets, in their order.

    Args:
        source: makes the samples, in the workers.
        tickets: drawn in this process, some lists ahead where there are workers.
        processor: collates; None to give the list of what was made instead.
        num_workers: processes; 0 for this one.
        pinned: whether batches are put in memory that a GPU reads from.
        **options: of the processor's `collate`.

    Raises:
        VlmError: a worker died.
    """
    loader: DataLoader[Any] = DataLoader(
        _Careful(source),  # type: ignore[arg-type]
        batch_sampler=tickets,
        collate_fn=list if processor is None else _Collate(processor, options),
        num_workers=num_workers,
        pin_memory=pinned,
        worker_init_fn=_outlive_sigterm,
        # Its own generator: the loader must not draw from the one that dropout uses.
        generator=torch.Generator().manual_seed(0),
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise VlmError(
            f"a process that makes samples died ({str(error).splitlines()[0].rstrip('. ')}); it may have run out of "
            "memory or of shared memory, so lower num_workers or batch_size"
        ) from error


def _outlive_sigterm(_: int) -> None:
    # Launchers and batch systems send it to all processes of a run, whose step under way still needs these.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def iterate_batches(
    dataset: Samples,
    processor: VLMProcessor,
    order: Iterable[list[int]],
    *,
    device: torch.device,
    num_workers: int = 0,
    on_bad: Callable[[list[BadSample]], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Give the collated batches of an order of sample indices, on a device.

    Args:
        dataset: samples by index.
        processor: collates them.
        order: indices of each batch.
        device: where the batches go.
        num_workers: processes that make samples; 0 for this one.
        on_bad: called with samples that cannot be made, which are left out; None to stop at the first.

    Raises:
        VlmError: a sample cannot be made.
    """
    pinned = device.type == "cuda"
    for parcel in load(Indexed(dataset), order, processor=processor, num_workers=num_workers, pinned=pinned):
        if parcel.failure is not None:
            raise VlmError(parcel.failure)
        if parcel.bad:
            if on_bad is None:
                raise VlmError(parcel.bad[0].sentence)
            on_bad(parcel.bad)
        if parcel.batch is not None:
            yield to_device(parcel.batch, device)
