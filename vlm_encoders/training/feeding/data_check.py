"""Conversations checked whole: their structure, every image, and their length in LLM tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from connectors.errors import VlmError
from vlm_encoders.training.feeding.data import chat_messages
from vlm_encoders.training.feeding.findings import ERRORS, DataCheck, Finding
from vlm_encoders.training.feeding.lengths import DataLengths, SampleLength
from vlm_encoders.training.feeding.records import IMAGE_PLACEHOLDER, Record, images_of, record_problems, sample_name
from vlm_encoders.training.feeding.sources.base import Opened, Records
from vlm_encoders.training.feeding.sources.rows import as_record
from vlm_encoders.training.feeding.workers import map_chunks

if TYPE_CHECKING:
    from connectors.tokens import Grid
    from vlm_encoders.training.feeding.image_check import ImageFacts
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["LARGE", "check_conversations"]

LARGE = 50_000_000
"""Pixels over which an image is called large."""


class _Named(NamedTuple):
    """A row, or why it cannot be read; `name` where its source has one."""

    place: int
    name: str | None
    row: Any
    problem: str | None = None


class _Task(NamedTuple):
    """A record for a process: its messages, its images, and which of them are to be looked at."""

    messages: list[dict[str, str]]
    images: list[Any]
    new: list[bool]


class _Result(NamedTuple):
    """What became of a task: the facts of each new image, and the length, or why it cannot be counted."""

    facts: list[ImageFacts]
    length: SampleLength | str | None


class _UnderWay(NamedTuple):
    """A record whose result is awaited: its images' names are "" where they are no files."""

    place: int
    sample: str
    problems: list[str]
    images: list[str]
    new: list[bool]


def check_conversations(
    opened: Opened,
    *,
    indices: Iterable[int] | None = None,
    limit: int | None = None,
    processor: VLMProcessor | None = None,
    large: int = LARGE,
    decode: bool = True,
    workers: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> DataCheck:
    """Check conversations in one pass; each image file is decoded once, and nothing of it is kept.

    Args:
        opened: as `open_records` gives it.
        indices: places of the samples to look at, where they can be indexed; None for all.
        limit: samples to look at; None for all.
        processor: counts the tokens of each sample; None to count none.
        large: pixels over which an image is called large.
        decode: decode the images, which alone shows that one is truncated; else headers are read.
        workers: processes; 0 for this one.
        on_progress: called with the number of samples that are newly done.

    Raises:
        VlmError: a shard cannot be read, or a process died. What is wrong with samples stands in the result.
    """
    check = DataCheck(max_length=None if processor is None else processor.max_length)
    reader = _Reader(opened, check, IMAGE_PLACEHOLDER if processor is None else processor.image_token)
    lengths: list[SampleLength | None] = []
    seen: dict[str, tuple[tuple[str, str], ...]] = {}
    tasks = reader.tasks(_rows(opened, indices, limit))
    work = _Look(processor, large, decode=decode)
    for result in map_chunks(work, tasks, workers=workers, on_progress=on_progress):
        place, sample, problems, images, new = reader.under_way.popleft()
        check.samples += 1
        told = [("record", text) for text in problems]
        facts = iter(result.facts)
        for image, first in zip(images, new, strict=True):
            if first:
                fact = next(facts)
                check.add_image(fact, image or sample)
                told += fact.problems
                if image and fact.problems:
                    seen[image] = fact.problems
            else:
                # Every sample of a bad image is lost; of an odd one it is enough to hear once.
                told += [each for each in seen.get(image, ()) if each[0] in ERRORS]
        if processor is not None and not problems:
            lengths.append(result.length if isinstance(result.length, SampleLength) else None)
            check.indices.append(place)
            told += _length_problems(result.length, processor.max_length)
        check.findings += [Finding(kind, place, sample, text) for kind, text in told]
    if processor is not None:
        check.lengths = DataLengths.of(lengths)
    return check


class _Reader:
    """Reads rows as records, counts what they hold, and makes tasks of them."""

    def __init__(self, opened: Opened, check: DataCheck, image_token: str) -> None:
        self.opened = opened
        self.check = check
        self.image_token = image_token
        self.under_way: deque[_UnderWay] = deque()
        self._met: set[str] = set()

    def tasks(self, rows: Iterable[_Named]) -> Iterator[_Task | None]:
        """Give the task of each row, None for one that is no record."""
        for named in rows:
            record, problems = self._read(named)
            images = [] if problems else images_of(record, self.opened.image_folder)
            names = [str(image) if isinstance(image, Path) else "" for image in images]
            new = [self._is_new(name) for name in names]
            sample = named.name or sample_name(record or named.row, named.place)
            self.under_way.append(_UnderWay(named.place, sample, problems, names, new))
            if problems:
                yield None
                continue
            self.check.images += len(images)
            self.check.text_only += not images
            self.check.answers += sum(turn["from"] == "gpt" for turn in record["conversations"])
            yield _Task(chat_messages(record, self.image_token), images, new)

    def _read(self, named: _Named) -> tuple[Record, list[str]]:
        if named.problem is not None:
            return {}, [named.problem]
        try:
            record = as_record(named.row, caption=self.opened.caption)
        except VlmError as error:
            return {}, [str(error)]
        return record, list(record_problems(record))

    def _is_new(self, name: str) -> bool:
        if name in self._met:
            return False
        if name:
            self._met.add(name)
        return True


class _Look:
    """Looks at the images of a record and counts its tokens: what the processes share."""

    def __init__(self, processor: VLMProcessor | None, large: int, *, decode: bool) -> None:
        self.processor = processor
        self.large = large
        self.decode = decode

    def __call__(self, task: _Task | None) -> _Result:
        from vlm_encoders.training.feeding.image_check import check_image

        if task is None:
            return _Result([], None)
        sizes: list[Grid | None] = []
        facts = []
        for image, new in zip(task.images, task.new, strict=True):
            if new:
                facts.append(check_image(image, large=self.large, decode=self.decode))
                sizes.append(facts[-1].size)
            else:
                sizes.append(self._size(image))
        known = [size for size in sizes if size is not None]
        if self.processor is None or len(known) < len(sizes):
            return _Result(facts, None)
        try:
            return _Result(facts, self.processor.measure(task.messages, known))
        except VlmError as error:
            return _Result(facts, str(error))

    def _size(self, image: Any) -> Grid | None:
        from vlm_encoders.preprocess.header import image_size

        try:
            return None if self.processor is None else image_size(image)
        except VlmError:
            # It is told by the facts of the image.
            return None


def _rows(opened: Opened, indices: Iterable[int] | None, limit: int | None) -> Iterator[_Named]:
    rows = opened.rows
    if not isinstance(rows, Records):
        for index, (name, row) in enumerate(rows.rows()):
            if index == limit:
                return
            yield _Named(index, name, row)
        return
    places = range(len(rows)) if indices is None else indices
    for count, index in enumerate(places):
        if count == limit:
            return
        try:
            yield _Named(index, None, rows[index])
        except VlmError as error:
            yield _Named(index, None, None, str(error))


def _length_problems(length: SampleLength | str | None, context: int | None) -> list[tuple[str, str]]:
    if length is None:
        return []
    if isinstance(length, str):
        return [("cannot be counted", length)]
    found = []
    if not length.supervised:
        found.append(("nothing supervised", "has no supervised token; check its answers and the chat template"))
    if context is not None and length.tokens > context:
        text = f"is {length.tokens} tokens long, {length.image_tokens} of them of images; the context takes {context}"
        found.append(("longer than the context", text))
    return found
