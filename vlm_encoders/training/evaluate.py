"""Evaluation: the loss on unseen conversations, and exact answers by greedy generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from connectors.errors import VlmError
from vlm_encoders.training.feeding.batches import Samples, iterate_batches
from vlm_encoders.training.processes.blank import is_supervised
from vlm_encoders.training.processes.distributed import forward_module
from vlm_encoders.training.processes.sharding import reshard
from vlm_encoders.training.step import SummedLoss
from vlm_encoders.vlm.answer import answer

if TYPE_CHECKING:
    from vlm_encoders.training.feeding.data import ConversationDataset
    from vlm_encoders.training.feeding.skipped import BadSample
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
    if not supervised:
        raise VlmError("no token of the evaluation dataset is supervised; check the answers of its samples")
    return total / supervised


@torch.no_grad()
def summed_loss(
    model: VisionLanguageModel,
    processor: VLMProcessor,
    dataset: Samples,
    indices: list[int],
    *,
    batch_size: int,
    module: nn.Module | None = None,
    passes: int = 0,
    num_workers: int = 0,
    on_bad: Callable[[list[BadSample]], None] | None = None,
) -> tuple[float, int]:
    """Sum the loss over the supervised tokens of some samples, and count these tokens.

    Args:
        model: in eval mode meanwhile.
        processor: of that model.
        dataset: samples by index.
        indices: of the samples.
        batch_size: samples of one forward pass.
        module: a prepared `SummedLoss` of the model; None for the model as it stands.
        passes: forward passes at least, blank ones where the samples give less: processes that share
            the weights of a module all take as many.
        num_workers: processes that make samples; 0 for this one.
        on_bad: called with samples that cannot be made, which are left out; None to stop at the first.

    Raises:
        VlmError: a sample cannot be made; all passes are taken by then.
    """
    order = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    total, supervised = 0.0, 0
    loss_of = SummedLoss(model) if module is None else forward_module(module)
    batches = iterate_batches(dataset, processor, order, device=model.device, num_workers=num_workers, on_bad=on_bad)
    problem: VlmError | None = None
    # A batch whose samples are all bad is none, so the passes are counted as they are taken.
    left = passes
    with _evaluating(model):
        try:
            for batch in batches:
                loss, counted = loss_of(batch if is_supervised(batch) else None)
                total += float(loss)
                supervised += counted
                left -= 1
        except VlmError as error:
            problem = error
        for _ in range(left):
            loss_of(None)
    if module is not None:
        reshard(module)
    if problem is not None:
        raise problem
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
