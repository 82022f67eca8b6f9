"""LLaVA conversation files checked whole, without opening a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from connectors.errors import VlmError
from vlm_encoders.training.records import IMAGE_PLACEHOLDER, ROLES, Record, image_paths, read_records, sample_name

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


def check_data(path: str | Path, image_folder: str | Path, records: list[Record] | None = None) -> DataReport:
    """Check every sample of a conversation file: its keys, roles, placeholders and image files.

    No picture is opened, so that a file of half a million samples takes seconds.

    Args:
        path: the conversation file.
        image_folder: folder that relative image paths start from.
        records: the samples where they are read already.

    Raises:
        VlmError: the file itself cannot be read; what is wrong inside it stands in the report.
    """
    records = read_records(path) if records is None else records
    problems: list[Problem] = []
    found: dict[Path, bool] = {}
    images = text_only = answers = 0
    for index, record in enumerate(records):
        texts = list(_structure_problems(record))
        if not texts:
            paths = image_paths(record, image_folder)
            images += len(paths)
            text_only += not paths
            answers += sum(turn["from"] == "gpt" for turn in record["conversations"])
            texts = list(_image_problems(record, paths, found))
        problems.extend(Problem(index, sample_name(record, index), text) for text in texts)
    return DataReport(Path(path), len(records), images, len(found), text_only, answers, tuple(problems))


def _structure_problems(record: object) -> Iterator[str]:
    if not isinstance(record, dict):
        yield f"is a {type(record).__name__}, not an object with 'conversations'"
        return
    image = record.get("image")
    images = [] if image is None else [image] if isinstance(image, str) else image
    if not (isinstance(images, list) and all(isinstance(name, str) for name in images)):
        yield f"'image' must be a path or a list of paths, got {image!r}"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        known = ", ".join(map(str, record)) or "none"
        yield f"lacks 'conversations', a list of turns; its keys are {known}"
        return
    for number, turn in enumerate(turns, start=1):
        if not (isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)):
            yield f"turn {number} lacks 'from' or 'value', both texts"
            return
        if turn["from"] not in ROLES:
            yield f"turn {number} has unknown role '{turn['from']}'; use {', '.join(ROLES)}"
            return
    yield from _order_problems([turn["from"] for turn in turns])


def _order_problems(roles: list[str]) -> Iterator[str]:
    start = int(roles[0] == "system")
    for number, role in enumerate(roles[start:], start=start):
        wanted = ("human", "gpt")[(number - start) % 2]
        if role != wanted:
            yield f"turn {number + 1} is from '{role}', expected '{wanted}'; human and gpt must alternate, human first"
            return
    if roles[-1] != "gpt":
        yield f"ends with a turn from '{roles[-1]}', so there is no answer to learn; end it with 'gpt'"


def _image_problems(record: Record, paths: list[Path], found: dict[Path, bool]) -> Iterator[str]:
    counts = {"human": 0, "gpt": 0, "system": 0}
    for turn in record["conversations"]:
        counts[turn["from"]] += turn["value"].count(IMAGE_PLACEHOLDER)
    for role in ("gpt", "system"):
        if counts[role]:
            yield f"has an {IMAGE_PLACEHOLDER} placeholder in a turn from '{role}'; images stand in human turns"
    if counts["human"] != len(paths):
        yield (
            f"has {counts['human']} {IMAGE_PLACEHOLDER} placeholders and {len(paths)} images; "
            "write one placeholder for each image"
        )
    for path in paths:
        if path not in found:
            found[path] = path.is_file()
        if not found[path]:
            yield f"image file {path} is missing; check image_folder"
