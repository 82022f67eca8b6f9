"""The doctor: what a run would train, see and wait for, and whether it learns, before it is begun."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from connectors.errors import VlmError
from vlm_encoders.training.feeding.stream import ConversationStream
from vlm_encoders.training.masters import hold_masters
from vlm_encoders.training.processes.distributed import join_processes, make_accelerator
from vlm_encoders.training.proving.build_report import BuildReport, build_report, typical_sample
from vlm_encoders.training.proving.image_use import Difference, ImageUse, image_use, sample_losses
from vlm_encoders.training.proving.proof import PROOF_STEPS
from vlm_encoders.training.proving.trial import StepFindings, take_steps, weights_kept

if TYPE_CHECKING:
    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.training.feeding.batches import Samples
    from vlm_encoders.vlm.batch import Sample
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["DataFindings", "Diagnosis", "examine"]


@dataclass(frozen=True)
class DataFindings:
    """What some samples of the data are.

    Attributes:
        samples: those that could be made.
        bad: sentences on those that could not.
        supervised_share: supervised tokens of all tokens.
        unsupervised: samples without a supervised token.
        with_images: samples with an image.
        longest: tokens of the longest samples, the longest first.
        max_length: the limit of the processor; None for none.
    """

    samples: int
    bad: tuple[str, ...]
    supervised_share: float
    unsupervised: int
    with_images: int
    longest: tuple[int, ...]
    max_length: int | None


@dataclass(frozen=True)
class Diagnosis:
    """All that the doctor found.

    Attributes:
        build: the build report.
        data: of the samples.
        steps: of the training steps; None where they could not be taken.
        before: what the image does before them; None where no sample could be made.
        after: and after them.
        failures: what a run would fail by, or train nothing by, in sentences.
    """

    build: BuildReport
    data: DataFindings
    steps: StepFindings | None
    before: ImageUse | None
    after: ImageUse | None
    failures: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain values, with the verdicts."""
        verdicts = {
            name: use.verdict() for name, use in (("before", self.before), ("after", self.after)) if use is not None
        }
        return asdict(self) | {"verdicts": verdicts}


def examine(
    model: VisionLanguageModel,
    processor: VLMProcessor,
    dataset: Samples | ConversationStream,
    config: TrainConfig,
    *,
    eval_dataset: Samples | ConversationStream | None = None,
    samples: int = 64,
    steps: int = PROOF_STEPS[-1],
    fresh: bool | None = None,
) -> Diagnosis:
    """Examine a run without taking it; the weights are afterwards as they were.

    Args:
        model: a model whose stage is applied.
        processor: the processor of that model.
        dataset: what would be trained on.
        config: the settings of the run.
        eval_dataset: where the samples that are looked at come from; None for `dataset`.
        samples: how many are looked at.
        steps: training steps to take, at the peak learning rate.
        fresh: whether the connector is new; None for what the settings say.

    Raises:
        VlmError: several processes were launched, or the settings contradict the model.
    """
    if join_processes(cpu=config.cpu).num_processes > 1:
        raise VlmError("the check runs on one process, several were launched; run it without accelerate launch")
    made, bad = _draw(dataset if eval_dataset is None else eval_dataset, samples, config.seed)
    data = _findings(made, bad, processor)
    model.to(make_accelerator(config).device).train()
    hold_masters(model, config.mixed_precision)
    typical = typical_sample(made, processor.image_token_id)
    build = build_report(model, typical, mixed_precision=config.mixed_precision)
    failures = list(_data_failures(data, config))
    good = [each for each in made if any(label != -100 for label in each.labels[1:])]
    if not good:
        return Diagnosis(build, data, None, None, None, tuple(failures))
    autocast = torch.bfloat16 if config.mixed_precision == "bf16" else None
    options: dict[str, Any] = {"batch_size": config.batch_size, "autocast": autocast}
    is_fresh = config.model is None if fresh is None else fresh
    losses = partial(sample_losses, model, processor, good, **options)
    before = image_use(model, processor, good, fresh=is_fresh, **options)
    if before.ignored:
        failures.append(before.verdict())
    found, after = None, None
    with weights_kept(model), tempfile.TemporaryDirectory() as folder:
        first = losses()
        try:
            found = take_steps(model, processor, dataset, config, steps, folder)
            found = replace(found, change=Difference.of(losses(), first))
            after = image_use(model, processor, good, fresh=is_fresh, **options)
        except VlmError as error:
            failures.append(str(error))
    return Diagnosis(build, data, found, before, after, tuple(failures))


def _draw(dataset: Samples | ConversationStream, count: int, seed: int) -> tuple[list[Sample], list[str]]:
    """Make samples from all over the data, and say why others could not be made."""
    made: list[Sample] = []
    bad: list[str] = []
    if isinstance(dataset, ConversationStream):
        tickets: Iterator[Any] = islice(dataset.draws(seed=seed, buffer=1), count)
        make: Any = dataset.make
    else:
        total = len(dataset)
        tickets = iter(sorted({place * total // min(count, total) for place in range(min(count, total))}))
        make = dataset.__getitem__
    for ticket in tickets:
        try:
            made.append(make(ticket))
        except VlmError as error:
            bad.append(str(error))
    return made, bad


def _findings(made: Sequence[Sample], bad: Sequence[str], processor: VLMProcessor) -> DataFindings:
    tokens = [len(each.input_ids) for each in made]
    supervised = [sum(label != -100 for label in each.labels[1:]) for each in made]
    return DataFindings(
        samples=len(made),
        bad=tuple(bad),
        supervised_share=sum(supervised) / sum(tokens) if tokens else 0.0,
        unsupervised=supervised.count(0),
        with_images=sum(bool(each.plans) for each in made),
        longest=tuple(sorted(tokens, reverse=True)[:3]),
        max_length=processor.max_length,
    )


def _data_failures(data: DataFindings, config: TrainConfig) -> Iterator[str]:
    looked = data.samples + len(data.bad)
    if data.unsupervised:
        yield (
            f"{data.unsupervised} of {looked} samples have no supervised token, so nothing is learned from them; look "
            "at their answers and at the chat template"
        )
    if data.bad and (config.on_bad_sample == "error" or not data.samples):
        yield f"{len(data.bad)} of {looked} samples cannot be made and would stop the run: {data.bad[0]}"
