"""How long all samples of a dataset are, counted without decoding an image, once for a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self
from zipfile import BadZipFile

import numpy as np

from connectors.errors import VlmError
from vlm_encoders.training.feeding.workers import map_chunks
from vlm_encoders.vlm.measure import SampleLength

if TYPE_CHECKING:
    from vlm_encoders.preprocess import ImageLike
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["DataLengths", "SampleLength", "data_lengths", "file_key", "measure_sample", "processor_key"]

CACHE = "lengths.npz"
_PROBES = ((28, 28), (336, 336), (480, 640), (97, 1203), (2000, 300), (1080, 1920))
"""Sizes of images by whose cost two processors are told apart, px."""


class Conversations(Protocol):
    """What can be measured: messages and images by index. `ConversationDataset` can."""

    processor: VLMProcessor

    def __len__(self) -> int:
        """Count the samples."""

    def messages(self, index: int, /) -> list[dict[str, str]]:
        """Give the turns of a sample."""

    def images(self, index: int, /) -> Sequence[ImageLike]:
        """Give the images of a sample, in the order of their placeholders."""


@dataclass(frozen=True)
class DataLengths:
    """The lengths of all samples of a dataset.

    Attributes:
        tokens: LLM tokens of each sample; None for one that cannot be counted.
        supervised: tokens of each that are learned, 0 where it cannot be counted.
        image_tokens: tokens of each at image places, 0 where it cannot be counted.
        problems: index -> why a sample cannot be counted.
    """

    tokens: Sequence[int | None]
    supervised: Sequence[int]
    image_tokens: Sequence[int]
    problems: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Iterable[SampleLength | str | None]) -> Self:
        """Collect lengths; a text, or None, stands for a sample that cannot be counted."""
        found = list(lengths)
        known = [SampleLength(0, 0, 0) if each is None or isinstance(each, str) else each for each in found]
        return cls(
            [each.tokens if isinstance(each, SampleLength) else None for each in found],
            [each.supervised for each in known],
            [each.image_tokens for each in known],
            {index: each for index, each in enumerate(found) if isinstance(each, str)},
        )

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.tokens)

    @property
    def text_only(self) -> list[bool]:
        """Whether each sample has no image token."""
        return [not tokens for tokens in self.image_tokens]

    def save(self, path: Path, key: str) -> None:
        """Write them to a file, whole or not at all.

        Raises:
            VlmError: it cannot be written.
        """
        temporary = path.with_name(f".{path.name}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez_compressed(
                    file,
                    tokens=np.array([-1 if each is None else each for each in self.tokens], dtype=np.int64),
                    supervised=np.array(self.supervised, dtype=np.int64),
                    image_tokens=np.array(self.image_tokens, dtype=np.int64),
                    about=np.array(json.dumps({"key": key, "problems": self.problems})),
                )
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise VlmError(
                f"the lengths of the samples cannot be written to '{path}': {error}; free some space"
            ) from error

    @classmethod
    def load(cls, path: Path, key: str) -> Self | None:
        """Read what `save` wrote under the same key; None where there is no such file, or it is of something else."""
        try:
            with np.load(path, allow_pickle=False) as held:
                about = json.loads(str(held["about"]))
                if about["key"] != key:
                    return None
                return cls(
                    [None if each < 0 else each for each in held["tokens"].tolist()],
                    held["supervised"].tolist(),
                    held["image_tokens"].tolist(),
                    {int(index): text for index, text in about["problems"].items()},
                )
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            # Missing or of a killed run: it is counted again.
            return None


def data_lengths(
    dataset: Conversations,
    *,
    key: str = "",
    cache: str | Path | None = None,
    workers: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> DataLengths:
    """Give the lengths of all samples, by the headers of their images and the tokens of their text.

    Args:
        dataset: messages and images by index.
        key: identity of the data for the cache: the same key must mean the same samples; see `file_key`.
        cache: folder of the cache, such as the run's output; None for none. It holds lengths for one key
            and one processor, so that a resumed run counts nothing again.
        workers: processes that count; 0 for this one.
        on_progress: called with the number of samples that are newly counted.

    Raises:
        VlmError: the cache cannot be written. A sample that cannot be counted raises nothing: see `problems`.
    """
    path = None if cache is None else Path(cache) / CACHE
    whole = hashlib.sha256(f"{key} {len(dataset)} {processor_key(dataset.processor)}".encode()).hexdigest()
    known = None if path is None else DataLengths.load(path, whole)
    if known is not None and len(known) == len(dataset):
        return known

    measure = partial(measure_sample, dataset)
    lengths = DataLengths.of(map_chunks(measure, range(len(dataset)), workers=workers, on_progress=on_progress))
    if path is not None:
        lengths.save(path, whole)
    return lengths


def measure_sample(dataset: Conversations, index: int) -> SampleLength | str:
    """Count the tokens of one sample, or say why that cannot be done."""
    from vlm_encoders.preprocess.header import image_size

    try:
        sizes = [image_size(image) for image in dataset.images(index)]
        return dataset.processor.measure(dataset.messages(index), sizes)
    except VlmError as error:
        return str(error)


def file_key(path: str | Path, folder: str | Path | None = None) -> str:
    """Name a data file by its place, size and time, and the folder of its images: what is in these is not looked at."""
    path = Path(path).absolute()
    try:
        facts = path.stat()
    except OSError as error:
        raise VlmError(f"{path}: cannot be read ({error.strerror}); give the path of a data file") from error
    return json.dumps([str(path), facts.st_size, facts.st_mtime_ns, str(Path(folder or path.parent).absolute())])


def processor_key(processor: VLMProcessor) -> str:
    """Name a processor by all that its counts depend on: tokenizer, template, tiler, budget and the tokens of views."""
    tokenizer: Any = processor.tokenizer
    words = tokenizer.backend_tokenizer.to_str() if getattr(tokenizer, "is_fast", False) else repr(tokenizer)
    costs: list[int | str] = []
    for size in _PROBES:
        try:
            costs.append(processor.num_image_tokens(size))
        except VlmError as error:
            costs.append(str(error))
    told = [words, tokenizer.chat_template, processor.tiler.config(), processor.max_image_tokens, costs]
    told += [processor.token_spec.num_tokens, processor.token_spec.grid, repr(processor.layout), processor.image_token]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()
