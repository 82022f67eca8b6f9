"""Conversations as samples by index."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from connectors.errors import VlmError
from vlm_encoders.training.feeding.check import DataReport, check_data
from vlm_encoders.training.feeding.records import (
    IMAGE_PLACEHOLDER,
    ROLES,
    Record,
    images_of,
    record_problems,
    sample_name,
)
from vlm_encoders.training.feeding.sources.base import Records
from vlm_encoders.training.feeding.sources.opening import open_records
from vlm_encoders.training.feeding.sources.rows import as_record
from vlm_encoders.training.feeding.sources.spec import DataName

if TYPE_CHECKING:
    from vlm_encoders.preprocess import ImageLike
    from vlm_encoders.vlm.processor import Sample, VLMProcessor

__all__ = ["ConversationDataset", "chat_messages", "checked_record", "make_sample"]


class ConversationDataset:
    """The samples of a conversation file or a dataset, each made when it is asked for.

    A whole file is checked first, so that a run does not stop hours later at a
    sample that could have been found before it.

    Args:
        json_path: the conversation file, a JSON list or JSON Lines; or `hf:NAME_OR_FOLDER[split=train]`.
        image_folder: folder that relative image paths start from; None for that of the data.
        processor: makes samples of messages and images.
        check: refuse a conversation file that has problems; a Hugging Face dataset is never read through.

    Raises:
        VlmError: the data cannot be opened, is a stream, or has problems; see `check_data`.
    """

    def __init__(
        self, json_path: str | Path, image_folder: str | Path | None, processor: VLMProcessor, *, check: bool = True
    ) -> None:
        opened = open_records(json_path, image_folder)
        if not isinstance(opened.rows, Records):
            raise VlmError(f"'{json_path}' is a stream, whose samples have no number; open it as a ConversationStream")
        self.path = Path(json_path)
        self.image_folder = opened.image_folder
        self.processor = processor
        self.caption = opened.caption
        self.records: Records = opened.rows
        if check and DataName.parse(json_path).kind == "file":
            self.report.raise_on_problems()

    @classmethod
    def open(
        cls, data: str | Path, image_folder: str | Path | None, processor: VLMProcessor, *, check: bool = True
    ) -> Self:
        """Open conversations from any source whose rows have a number, as the constructor does."""
        return cls(data, image_folder, processor, check=check)

    @cached_property
    def report(self) -> DataReport:
        """What the data holds; its rows are read through at the first use."""
        return check_data(self.path, self.image_folder, self.records)

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Make one training sample.

        Raises:
            VlmError: its record has problems, an image cannot be read, the sample is too long, or nothing
                in it is supervised; the sample is named.
        """
        try:
            return make_sample(self.processor, self._record(index), self.image_folder)
        except VlmError as error:
            raise VlmError(f"{self.path}, {self.name(index)}: {error}") from error

    def name(self, index: int) -> str:
        """Name a sample by its place and, where it has one, its id."""
        return sample_name(self._row(index), index)

    def sample_id(self, index: int) -> str:
        """Give a sample's id, or its place where it has none."""
        row = self._row(index)
        return str(index) if row.get("id") is None else str(row["id"])

    def messages(self, index: int) -> list[dict[str, str]]:
        """Give the turns of a sample as chat messages, with the processor's image token.

        Raises:
            VlmError: the record has problems.
        """
        return chat_messages(self._record(index), self.processor.image_token)

    def images(self, index: int) -> list[ImageLike]:
        """Give the images of a sample, in the order of their placeholders: paths, or images themselves.

        Raises:
            VlmError: the record has problems.
        """
        return images_of(self._record(index), self.image_folder)

    def _record(self, index: int) -> Record:
        return checked_record(self.records[index], self.caption)

    def _row(self, index: int) -> dict[str, Any]:
        try:
            row = self.records[index]
        except VlmError:
            return {}
        return row if isinstance(row, dict) else {}


def checked_record(row: object, caption: str | None = None) -> Record:
    """Give a row as a record that has no problems, its images' files apart.

    Raises:
        VlmError: it has; the first is told.
    """
    record = as_record(row, caption=caption)
    for problem in record_problems(record):
        raise VlmError(problem)
    return record


def chat_messages(record: Record, image_token: str) -> list[dict[str, str]]:
    """Give the turns of a record as chat messages, an image token where an image stands."""
    return [
        {"role": ROLES[turn["from"]], "content": turn["value"].replace(IMAGE_PLACEHOLDER, image_token)}
        for turn in record["conversations"]
    ]


def make_sample(processor: VLMProcessor, record: Record, image_folder: Path) -> Sample:
    """Make the training sample of a record without problems.

    Raises:
        VlmError: an image cannot be read, the sample is too long, or nothing in it is supervised.
    """
    messages = chat_messages(record, processor.image_token)
    sample = processor.sample(messages, images_of(record, image_folder))
    if all(label == -100 for label in sample.labels):
        raise VlmError("has no supervised token, so there is nothing to learn; check its answers and the chat template")
    return sample
