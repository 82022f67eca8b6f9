"""`vlm-encoders train --check`: the doctor's findings as text or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.training.feeding.batches import Samples
    from vlm_encoders.training.feeding.stream import ConversationStream
    from vlm_encoders.training.proving.doctor import DataFindings, Diagnosis
    from vlm_encoders.training.proving.trial import StepFindings
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["run_check", "told"]


def run_check(
    settings: TrainConfig,
    model: VisionLanguageModel,
    processor: VLMProcessor,
    dataset: Samples | ConversationStream,
    eval_dataset: Samples | ConversationStream | None = None,
    *,
    samples: int = 64,
    as_json: bool = False,
) -> int:
    """Examine a run, print what was found, and give the exit code.

    Args:
        settings: of the run.
        model: a model whose stage is applied.
        processor: the processor of that model.
        dataset: what would be trained on.
        eval_dataset: what would be evaluated on.
        samples: how many are looked at.
        as_json: print plain values in place of sentences.

    Returns:
        0, or 1 where a run would fail or train nothing.

    Raises:
        VlmError: several processes were launched, or settings and model contradict each other.
    """
    from vlm_encoders.training.proving.doctor import examine

    found = examine(model, processor, dataset, settings, eval_dataset=eval_dataset, samples=samples)
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else "\n".join(told(found)))
    return int(bool(found.failures))


def told(found: Diagnosis) -> Iterator[str]:
    """Tell a diagnosis line by line."""
    yield str(found.build)
    yield ""
    yield from _data(found.data)
    if found.steps is not None:
        yield from _steps(found.steps)
    if found.before is not None:
        yield f"before: {found.before.verdict()}"
    if found.after is not None:
        yield f"after {len(found.steps.losses) if found.steps else 0} steps: {found.after.verdict()}"
    yield ""
    yield from (f"FAILED: {failure}" for failure in found.failures)
    if not found.failures:
        yield "passed: what is to train trains, and nothing else moves"


def _data(data: DataFindings) -> Iterator[str]:
    yield (
        f"data: {data.samples} samples, {data.with_images} with images, {data.supervised_share:.1%} of the tokens "
        f"supervised, {data.unsupervised} samples without any"
    )
    if data.longest:
        limit = "no limit" if data.max_length is None else f"a limit of {data.max_length}"
        yield f"longest: {', '.join(map(str, data.longest))} tokens, {limit}"
    if data.bad:
        yield f"cannot be made: {len(data.bad)}, first: {data.bad[0]}"


def _steps(steps: StepFindings) -> Iterator[str]:
    falls = "" if steps.change is None else f"; on the samples above {steps.change}, {_direction(steps)}"
    yield f"loss: {steps.losses[0]:.4f} at step 1, {steps.losses[-1]:.4f} at step {len(steps.losses)}{falls}"
    moved = ", ".join(part for part, moves in steps.moved.items() if moves) or "nothing"
    still = ", ".join(part for part, moves in steps.moved.items() if not moves) or "nothing"
    yield f"moved: {moved}; bit-identical: {still}"
    yield "gradient norm: " + ", ".join(f"{unit} {norm:.3g}" for unit, norm in steps.grad_norms.items())
    verdict = "data keeps up" if steps.waiting < 0.1 else "raise num_workers, or keep tokens by token_cache"
    yield (
        f"time of a step: {steps.step_seconds * 1e3:.1f} ms, waiting for data {steps.data_seconds * 1e3:.1f} ms "
        f"({steps.waiting:.0%}): {verdict}"
    )
    yield from (f"warning: {sentence}" for sentence in steps.warnings)


def _direction(steps: StepFindings) -> str:
    change = steps.change
    if change is not None and change.lower:
        return "falling"
    return "rising: lower learning_rate" if change is not None and change.higher else "not falling yet"
