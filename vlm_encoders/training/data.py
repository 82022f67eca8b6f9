"""A LLaVA conversation file as a map-style dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from connectors.errors import VlmError
from vlm_encoders.training.check import check_data
from vlm_encoders.training.records import IMAGE_PLACEHOLDER, ROLES, image_paths, read_records, sample_name

if TYPE_CHECKING:
    from vlm_encoders.vlm.processor import Sample, VLMProcessor

__all__ = ["ConversationDataset"]


class ConversationDataset:
    """The samples of a LLaVA conversation file, each made when it is asked for.

    The whole file is checked first, so that a run does not stop hours later at a
    sample that could have been found before it.

    Args:
        json_path: the conversation file, a JSON list or JSON Lines.
        image_folder: folder that relative image paths start from.
        processor: makes samples of messages and images.

    Raises:
        VlmError: the file cannot be read or has problems; see `check_data`.
    """

    def __init__(self, json_path: str | Path, image_folder: str | Path, processor: VLMProcessor) -> None:
        self.path = Path(json_path)
        self.image_folder = Path(image_folder)
        self.processor = processor
        self.records = read_records(self.path)
        self.report = check_data(self.path, self.image_folder, self.records)
        self.report.raise_on_problems()

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Make one training sample.

        Raises:
            VlmError: an image cannot be read, the sample is too long, or nothing in it is
                supervised; the sample is named.
        """
        try:
            sample = self.processor.sample(self.messages(index), self.images(index))
        except VlmError as error:
            raise VlmError(f"{self.path}, {self.name(index)}: {error}") from error
        if all(label == -100 for label in sample.labels):
            raise VlmError(
                f"{self.path}, {self.name(index)}: has no supervised token, so there is nothing to learn; "
                "check its answers and the chat template"
            )
        return sample

    def name(self, index: int) -> str:
        """Name a sample by its place and, where it has one, its id."""
        return sample_name(self.records[index], index)

    def sample_id(self, index: int) -> str:
        """Give a sample's id, or its place where it has none."""
        return str(self.records[index].get("id", index))

    def messages(self, index: int) -> list[dict[str, str]]:
        """Give the turns of a sample as chat messages, with the processor's image token."""
        return [
            {
                "role": ROLES[turn["from"]],
                "content": turn["value"].replace(IMAGE_PLACEHOLDER, self.processor.image_token),
            }
            for turn in self.records[index]["conversations"]
        ]

    def images(self, index: int) -> list[Path]:
        """Give the image files of a sample, in the order of their placeholders."""
        return image_paths(self.records[index], self.image_folder)
