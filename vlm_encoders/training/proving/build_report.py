"""The report before the first step: what each unit is, what it trains, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from connectors.errors import VlmError
from vlm_encoders.training.proving.flops import TypicalSample, unit_flops
from vlm_encoders.vlm.describe import PartReport, describe_parts
from vlm_encoders.vlm.units import unit_parameters, units

if TYPE_CHECKING:
    from vlm_encoders.training.feeding.batches import Samples
    from vlm_encoders.training.feeding.stream import ConversationStream
    from vlm_encoders.vlm.batch import Sample
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["BuildReport", "BuildRow", "build_report", "typical_of", "typical_sample"]

_HEAD = (
    *("part", "class", "parameters", "trainable", "dtype", "lr", "mode"),
    *("tokens/image", "GFLOP/sample", "share"),
)
_NUMBERS = {2, 3, 7, 8, 9}
_PROBED = 8


@dataclass(frozen=True)
class BuildRow:
    """One unit.

    Attributes:
        about: what `describe` says of it.
        image_tokens: tokens that leave it for a typical image; None for the LLM, or unknown.
        flops: of a training step on a typical sample, forward and backward; None where not countable.
        share: part of all units' `flops`, from 0 to 1; None where one of them is not countable.
    """

    about: PartReport
    image_tokens: float | None
    flops: float | None
    share: float | None


@dataclass(frozen=True)
class BuildReport:
    """What a run is made of; printed, a table with what is odd below it.

    Attributes:
        rows: the units.
        sample: the sample that costs are counted for; None where there is none.
        warnings: what is odd, in sentences.
    """

    rows: tuple[BuildRow, ...]
    sample: TypicalSample | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        """Write aligned columns, the sample they are of, and the warnings."""
        lines = [_HEAD, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.rjust(width) if place in _NUMBERS else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        if self.sample is not None:
            text.append(f"costs are those of {self.sample}")
        return "\n".join([*text, *(f"warning: {sentence}" for sentence in self.warnings)])


def build_report(
    model: VisionLanguageModel, sample: TypicalSample | None = None, *, mixed_precision: str = "no"
) -> BuildReport:
    """Report what a run trains and what that costs.

    Args:
        model: a model whose stage is applied, its weights in the dtypes that they train in.
        sample: see `typical_sample`; None leaves costs out.
        mixed_precision: "bf16" where the forward pass runs under autocast, or "no".
    """
    about = describe_parts(model)
    flops = [None] * len(about) if sample is None else unit_flops(model, sample)
    counted = [each for each in flops if each is not None]
    total = sum(counted) if len(counted) == len(flops) else 0.0
    rows = tuple(
        BuildRow(row, _image_tokens(row, sample), cost, cost / total if cost is not None and total else None)
        for row, cost in zip(about, flops, strict=True)
    )
    return BuildReport(rows, sample, tuple(_warnings(model, rows, sample, mixed_precision)))


def typical_sample(samples: Sequence[Sample], image_token_id: int) -> TypicalSample | None:
    """Give the means of some samples; None of none."""
    if not samples:
        return None
    count = len(samples)
    return TypicalSample(
        tokens=sum(len(each.input_ids) for each in samples) / count,
        supervised=sum(sum(label != -100 for label in each.labels[1:]) for each in samples) / count,
        image_tokens=sum(each.input_ids.count(image_token_id) for each in samples) / count,
        images=sum(len(each.plans) for each in samples) / count,
        views=sum(plan.num_views for each in samples for plan in each.plans) / count,
    )


def typical_of(dataset: Samples | ConversationStream, image_token_id: int) -> TypicalSample | None:
    """Give the means of a few samples, spread over the data; None of a stream, or where none can be made."""
    length = getattr(dataset, "__len__", lambda: 0)()
    made: list[Sample] = []
    for index in range(0, length, max(length // _PROBED, 1))[:_PROBED]:
        with suppress(VlmError):
            made.append(dataset[index])  # type: ignore[index]
    return typical_sample(made, image_token_id)


def _image_tokens(row: PartReport, sample: TypicalSample | None) -> float | None:
    if row.part == "llm" or sample is None or not sample.images:
        return None
    if row.part == "connector":
        return sample.image_tokens / sample.images
    return float(row.tokens.split()[0]) * sample.views / sample.images


def _cells(row: BuildRow) -> tuple[str, ...]:
    about = row.about
    return (
        about.unit,
        about.module,
        f"{about.parameters:,}",
        f"{about.trainable:,}",
        about.dtype,
        "-" if about.lr is None else f"{about.lr:g}",
        about.mode,
        "-" if row.image_tokens is None else f"{row.image_tokens:,.0f}",
        "-" if row.flops is None else f"{row.flops / 1e9:,.4g}",
        "-" if row.share is None else f"{row.share:.1%}",
    )


def _warnings(
    model: VisionLanguageModel, rows: Iterable[BuildRow], sample: TypicalSample | None, mixed_precision: str
) -> Iterable[str]:
    for row, unit in zip(rows, units(model), strict=True):
        about = row.about
        held = [parameter for _, parameter in unit_parameters(model, unit) if not parameter.requires_grad]
        single = sum(each.numel() for each in held if str(each.dtype) == "torch.float32")
        if mixed_precision == "bf16" and 2 * single > about.parameters:
            yield (
                f"the {about.unit} holds {4 * single / 1e9:.2g} GB of frozen weights in float32, which bf16 autocast "
                'casts again in each step; load it with dtype = "bfloat16"'
            )
        if mixed_precision == "no" and model.device.type == "cuda" and 2 * single > about.parameters:
            yield (
                f"the {about.unit} computes in float32, at a fraction of the speed of bfloat16; set dtype = "
                '"bfloat16" and mixed_precision = "bf16"'
            )
        if about.lr is not None and not about.trainable:
            yield f"the {about.unit} is in mode {about.mode} and has no trainable parameter"
    if sample is not None and not sample.images:
        yield "no sample that was looked at has an image, so nothing before the LLM would train"
