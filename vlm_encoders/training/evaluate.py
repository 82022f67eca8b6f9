"""Evaluation: the loss on unseen conversations, and exact answers by greedy generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from connectors.errors import VlmError
from vlm_encoders.training.batches import Samples, iterate_batches
from vlm_encoders.vlm.answer import answer

if TYPE_CHECKING:
    from vlm_encoders.training.data import ConversationDataset
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["EvalResult", "Prediction", "exact_match", "mean_loss", "summed_loss"]


class Prediction(NamedTuple):
    """One question with the expected and the generated answer."""

    id: str
    question: str
    expected: str
    answer: str


@dataclass(frozen=True)
class EvalResult:
    """How often the generated answer is the expected one.

    Attributes:
        accuracy: part of the answers that match, from 0 to 1.
        predictions: every answer, in the order of the dataset.
    """

    accuracy: float
    predictions: list[Prediction]


def exact_match(
    model: VisionLanguageModel,
    processor: VLMProcessor,
    dataset: ConversationDataset,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 32,
) -> EvalResult:
    """Generate the last answer of each conversation greedily and compare it.

    Both answers are compared as the tokenizer writes them, without special tokens and
    outer space.

    Raises:
        VlmError: the dataset is empty, or a sample cannot be made.
    """
    if not len(dataset):
        raise VlmError("the evaluation dataset is empty; give at least one conversation")
    predictions: list[Prediction] = []
    with _evaluating(model):
        for first in range(0, len(dataset), batch_size):
            indices = range(first, min(first + batch_size, len(dataset)))
            prompts = [processor.prompt(dataset.messages(index)[:-1], dataset.images(index)) for index in indices]
            texts = answer(model, processor, prompts, do_sample=False, max_new_tokens=max_new_tokens)
            for index, generated in zip(indices, texts, strict=True):
                *_, question, expected = dataset.messages(index)
                text = question["content"].replace(processor.image_token, "").strip()
                predictions.append(
                    Prediction(dataset.sample_id(index), text, _as_written(processor, expected["content"]), generated)
                )
    right = sum(prediction.answer == prediction.expected for prediction in predictions)
    return EvalResult(right / len(predictions), predictions)


def mean_loss(model: VisionLanguageModel, processor: VLMProcessor, dataset: Samples, *, batch_size: int = 8) -> float:
    """Measure the mean loss over all supervised tokens of a dataset.

    Raises:
        VlmError: the dataset is empty, or a sample cannot be made.
    """
    if not len(dataset):
        raise VlmError("the evaluation dataset is empty; give at least one conversation")
    total, supervised = summed_loss(model, processor, dataset, list(range(len(dataset))), batch_size=batch_size)
    return total / supervised


@torch.no_grad()
def summed_loss(
    model: VisionLanguageModel,
    processor: VLMProcessor,
    dataset: Samples,
    indices: list[int],
    *,
    batch_size: int,
) -> tuple[float, int]:
    """Sum the loss over the supervised tokens of some samples, and count these tokens."""
    order = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    total, supervised = 0.0, 0
    with _evaluating(model):
        for batch in iterate_batches(dataset, processor, order, device=model.device):
            output = model(**batch)
            total += float(output.loss) * int(output.num_supervised)
            supervised += int(output.num_supervised)
    return total, supervised


def _as_written(processor: VLMProcessor, text: str) -> str:
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    written: str = processor.tokenizer.decode(ids, skip_special_tokens=True)
    return written.strip()


@contextmanager
def _evaluating(model: VisionLanguageModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
