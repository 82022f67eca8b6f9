"""LLaVA conversation files checked whole, without opening a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from connectors.errors import VlmError
from vlm_encoders.training.feeding.records import image_entries, image_paths, record_problems, sample_name
from vlm_encoders.training.feeding.sources.base import Records
from vlm_encoders.training.feeding.sources.opening import open_records
from vlm_encoders.training.feeding.sources.rows import as_record

__all__ = ["DataReport", "Problem", "check_data"]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one sample.

    Attributes:
        index: place of the sample in the file, from 0.
        sample: the sample in words: its place and its id.
        text: what is wrong and what to do.
    """

    index: int
    sample: str
    text: str

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.sample}: {self.text}"


@dataclass(frozen=True)
class DataReport:
    """What a conversation file holds.

    Attributes:
        path: the file.
        samples: conversations.
        images: image references; a picture used twice counts twice.
        distinct_images: different image files.
        text_only: conversations without an image.
        answers: turns that are learned.
        problems: all that is wrong, in the order of the file.
    """

    path: Path
    samples: int
    images: int
    distinct_images: int
    text_only: int
    answers: int
    problems: tuple[Problem, ...]

    def raise_on_problems(self) -> None:
        """Refuse a file that has problems.

        Raises:
            VlmError: there are problems; the first is told, the others are counted.
        """
        if not self.problems:
            return
        wrong = len({problem.index for problem in self.problems})
        more = f"; {wrong - 1} more of {self.samples} samples have problems" if wrong > 1 else ""
        raise VlmError(f"{self.path}, {self.problems[0]}{more}")


def check_data(path: str | Path, image_folder: str | Path, records: Iterable[object] | None = None) -> DataReport:
    """Check every sample of a conversation file: its keys, roles, placeholders and image files.

    No picture is opened, so that a file of half a million samples takes seconds.

    Args:
        path: the conversation file.
        image_folder: folder that relative image paths start from.
        records: the samples where they are read already.

    Raises:
        VlmError: the file itself cannot be read; what is wrong inside it stands in the report.
    """
    if records is None:
        rows = open_records(path, image_folder).rows
        records = rows if isinstance(rows, Records) else (row for _, row in rows.rows())
    problems: list[Problem] = []
    found: dict[Path, bool] = {}
    samples = images = text_only = answers = 0
    for index, row in enumerate(records):
        samples += 1
        try:
            record: object = as_record(row)
            texts = list(record_problems(record))
        except VlmError as error:
            record, texts = row, [str(error)]
        if isinstance(record, dict) and not texts:
            paths = image_paths(record, image_folder)
            images += len(image_entries(record))
            text_only += not image_entries(record)
            answers += sum(turn["from"] == "gpt" for turn in record["conversations"])
            texts = list(_missing(paths, found))
        problems.extend(Problem(index, sample_name(record, index), text) for text in texts)
    return DataReport(Path(path), samples, images, len(found), text_only, answers, tuple(problems))


def _missing(paths: list[Path], found: dict[Path, bool]) -> Iterator[str]:
    for path in paths:
        if path not in found:
            found[path] = path.is_file()
        if not found[path]:
            yield f"image file {path} is missing; check image_folder"
