"""Is the image used at all: the loss with the right image, with another sample's, and with a blank one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_encoders.vlm.batch import to_device

if TYPE_CHECKING:
    from vlm_encoders.vlm.batch import Sample
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["Difference", "ImageUse", "image_use", "sample_losses"]

_SIGMA = 2.0
"""Standard errors from which a difference is told as one."""


@dataclass(frozen=True)
class Difference:
    """How much higher the loss is with a wrong image, over samples that are compared with themselves.

    Attributes:
        mean: of the differences; nats a token.
        error: its standard error.
        samples: how many were compared.
        exact: no difference was other than 0, to the bit.
    """

    mean: float
    error: float
    samples: int
    exact: bool

    @classmethod
    def of(cls, wrong: Sequence[float], right: Sequence[float]) -> Difference | None:
        """Compare losses sample by sample; None of fewer than two."""
        found = [each - own for each, own in zip(wrong, right, strict=True)]
        if len(found) < 2:
            return None
        mean = sum(found) / len(found)
        spread = math.sqrt(sum((each - mean) ** 2 for each in found) / (len(found) - 1))
        return cls(mean, spread / math.sqrt(len(found)), len(found), not any(found))

    @property
    def higher(self) -> bool:
        """Whether the loss is higher by more than chance gives."""
        return self.mean > _SIGMA * self.error and not self.exact

    @property
    def lower(self) -> bool:
        """Whether the loss is lower by more than chance gives."""
        return self.mean < -_SIGMA * self.error and not self.exact

    def __str__(self) -> str:
        """Say it as mean and standard error."""
        return f"{self.mean:+.4f} ± {self.error:.4f} (n={self.samples})"


@dataclass(frozen=True)
class ImageUse:
    """What the image does for the loss.

    Attributes:
        loss: mean loss of the samples with an image; nats a token.
        shuffled: with another sample's image of the same tokens; None where no two samples could exchange theirs.
        blank: with the mean colour; None where too few samples have an image.
        fresh: the connector was new and had taken no step.
    """

    loss: float
    shuffled: Difference | None
    blank: Difference | None
    fresh: bool

    @property
    def ignored(self) -> bool:
        """Whether no image changes any loss, to the bit: not even an untrained model does that."""
        found = [each for each in (self.shuffled, self.blank) if each is not None]
        return bool(found) and all(each.exact for each in found)

    @property
    def used(self) -> bool:
        """Whether the right image lowers the loss."""
        decides = self.blank if self.shuffled is None else self.shuffled
        return decides is not None and decides.higher

    def verdict(self) -> str:
        """Say it in a sentence, with the likely causes."""
        if self.shuffled is None and self.blank is None:
            return "whether the image is used cannot be told: fewer than two samples have one"
        told = [
            f"with another sample's {self.shuffled}" if self.shuffled else "",
            f"with a blank one {self.blank}" if self.blank else "",
        ]
        numbers = f"the loss is {self.loss:.4f} with the right image, " + ", ".join(filter(None, told))
        if self.ignored:
            return (
                "the image makes no difference at all: the loss is the same to the bit with any image, so nothing of "
                "it reaches an answer; look for embeddings that are not put at the image places, images that stand "
                f"behind the answers, or a mask over them ({numbers})"
            )
        if self.used:
            return f"the image is used: {numbers}"
        decides = self.shuffled or self.blank
        if decides is not None and decides.lower:
            return (
                f"the image misleads: {numbers}; look for images that belong to other samples, or a connector that is "
                "not the one that was trained"
            )
        if self.fresh:
            return (
                f"the image makes no difference yet: {numbers}; a new connector is ignored at first, so look again "
                "after some hundred steps"
            )
        return (
            f"the image makes no difference: {numbers}; look for a connector whose weights were not restored, other "
            "preprocessing than it was trained with, or answers that need no image"
        )


def image_use(
    model: VisionLanguageModel,
    processor: VLMProcessor,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    autocast: torch.dtype | None = None,
    fresh: bool = False,
) -> ImageUse:
    """Measure what the image does for the loss of some samples, each compared with itself.

    Args:
        model: on the device to compute on.
        processor: makes batches.
        samples: those without an image, or without a supervised token behind it, are left out.
        batch_size: samples of a forward pass.
        autocast: dtype to compute in, None for that of the weights.
        fresh: whether the connector is new.
    """
    seen = [each for each in samples if each.plans and any(label != -100 for label in each.labels[1:])]

    def losses(chosen: Sequence[Sample]) -> list[float]:
        return sample_losses(model, processor, chosen, batch_size=batch_size, autocast=autocast)

    if not seen:
        return ImageUse(math.nan, None, None, fresh)
    right = losses(seen)
    blank = losses([replace(each, pixel_values=_blank(each.pixel_values)) for each in seen])
    partners = _partners(seen)
    places = sorted(partners)
    # All of them, in the same batches: in others, rounding alone would make a difference.
    swapped = losses(
        [replace(each, pixel_values=seen[partners.get(at, at)].pixel_values) for at, each in enumerate(seen)]
    )
    return ImageUse(
        sum(right) / len(right),
        Difference.of([swapped[at] for at in places], [right[at] for at in places]),
        Difference.of(blank, right),
        fresh,
    )


@torch.no_grad()
def sample_losses(
    model: VisionLanguageModel,
    processor: VLMProcessor,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    autocast: torch.dtype | None = None,
) -> list[float]:
    """Give the mean loss of each sample over its supervised tokens, in eval mode; nats a token."""
    found: list[float] = []
    training = model.training
    model.eval()
    try:
        for first in range(0, len(samples), batch_size):
            batch = to_device(processor.collate(samples[first : first + batch_size]), model.device)
            with torch.autocast(model.device.type, dtype=autocast) if autocast else nullcontext():
                logits = model(**batch).logits
            found += _by_row(logits, batch["labels"])
    finally:
        model.train(training)
    return found


def _by_row(logits: Tensor, labels: Tensor) -> list[float]:
    """Give the mean loss of each row of labels (B, T) from the logits of all supervised tokens."""
    supervised = labels[:, 1:] != -100
    losses = F.cross_entropy(logits.float(), labels[:, 1:][supervised], reduction="none")
    counts: list[int] = supervised.sum(1).tolist()
    return [float(row.mean()) for row in losses.split(counts)]


def _partners(samples: Sequence[Sample]) -> dict[int, int]:
    """Give each sample another one whose images cost the same tokens and are not the same pictures."""
    groups: dict[Any, list[int]] = {}
    for place, sample in enumerate(samples):
        groups.setdefault(tuple(sample.plans), []).append(place)
    partners: dict[int, int] = {}
    for places in groups.values():
        for turn, place in enumerate(places):
            others = places[turn + 1 :] + places[:turn]
            other = next((each for each in others if not _same(samples[place], samples[each])), None)
            if other is not None:
                partners[place] = other
    return partners


def _same(one: Sample, other: Sample) -> bool:
    first, second = one.pixel_values, other.pixel_values
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    assert isinstance(first, list)
    assert isinstance(second, list)
    return all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))


def _blank(pixels: Tensor | list[Tensor] | None) -> Tensor | list[Tensor] | None:
    # Pixels are normalised, so that 0 is the mean colour.
    if isinstance(pixels, Tensor):
        return torch.zeros_like(pixels)
    return None if pixels is None else [torch.zeros_like(view) for view in pixels]
