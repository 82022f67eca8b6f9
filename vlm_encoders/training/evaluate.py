"""Evaluation: the loss on unseen conversations, and exact answers by greedy generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from connectors.errors import VlmError
from vlm_encoders.training.batches import Samples, iterate_batches, to_device

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
            answers = _generate(model, processor, dataset, list(indices), max_new_tokens)
            for index, answer in zip(indices, answers, strict=True):
                *_, question, expected = dataset.messages(index)
                text = question["content"].replace(processor.image_token, "").strip()
                predictions.append(
                    Prediction(dataset.sample_id(index), text, _as_written(processor, expected["content"]), answer)
                )
    right = sum(prediction.answer == prediction.expected for prediction in predictions)
    return EvalResult(right / len(predictions), predictions)


def mean_loss(
    model: VisionLanguageModel, processor: VLMProcessor, dataset: Samples, *, batch_size: int = 8
) -> float:
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


def _generate(
    model: VisionLanguageModel,
    processor: VLMProcessor,
    dataset: ConversationDataset,
    indices: list[int],
    max_new_tokens: int,
) -> list[str]:
    tokenizer = processor.tokenizer
    samples = [processor.prompt(dataset.messages(index)[:-1], dataset.images(index)) for index in indices]
    batch = to_device(processor.collate(samples, padding_side="left"), model.device)
    del batch["labels"]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = model.generate(
        **batch,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=_end_ids(model, tokenizer.eos_token_id),
        pad_token_id=pad,
    )
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _end_ids(model: VisionLanguageModel, end_of_turn: int | None) -> list[int] | None:
    # A chat model may end its turn by another token than its base model ends a text.
    own = getattr(getattr(model.llm, "generation_config", None), "eos_token_id", None)
    ids = {end_of_turn, *(own if isinstance(own, list) else [own])}
    return sorted(identity for identity in ids if identity is not None) or None


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
