"""The embedded Stage 1, then Stage 2 on the whole LLM, judged on held-out handwriting as they go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_encoders.tiny.stage1 import LEARNING_RATE, build_tiny, tiny_run

if TYPE_CHECKING:
    from vlm_encoders.training.progress import LogEntry
    from vlm_encoders.vlm.stages import StagePolicy

__all__ = ["STAGE_STEPS", "Curve", "Judged", "train_two_stages"]

STAGE_STEPS = (100, 200)
POINTS = 4
SHARE = 0.05
"""Part of Stage 1's rate that Stage 2 takes; LLaVA-1.5 takes a fiftieth."""


@dataclass(frozen=True)
class Judged:
    """How good the model was after a step.

    Attributes:
        stage: "stage-1" or "stage-2".
        step: of both stages together.
        loss: on held-out conversations, a mean over their supervised tokens.
        accuracy: part of the held-out answers that match exactly, from 0 to 1.
    """

    stage: str
    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Curve:
    """What both stages gave.

    Attributes:
        judged: before the first step, and in even parts of each stage.
        losses: the training loss of each step.
        boundary: the step at which Stage 2 begins.
        trained: parameters that trained, by stage.
    """

    judged: list[Judged]
    losses: list[float]
    boundary: int
    trained: dict[str, int]


def train_two_stages(
    folder: Path,
    recipe: str = "mlp",
    *,
    steps: tuple[int, int] = STAGE_STEPS,
    seed: int = 0,
    on_judged: Callable[[Judged], None] | None = None,
) -> Curve:
    """Train Stage 1, go on with Stage 2, and judge the model in even parts of both.

    Args:
        folder: where data and checkpoints go.
        recipe: the connector.
        steps: of Stage 1 and of Stage 2.
        seed: of the data, the connector's initial weights and the order.
        on_judged: called with each judgement as it is made.

    Raises:
        VlmError: scikit-learn is not installed, or the recipe does not fit.
    """
    from vlm_encoders.training.evaluate import exact_match, mean_loss
    from vlm_encoders.training.trainer import Trainer
    from vlm_encoders.vlm.stages import STAGE_1, STAGE_2, apply_stage, trainable_parameters

    model, processor = build_tiny(recipe, seed=seed)
    judged: list[Judged] = []
    losses: list[float] = []
    trained: dict[str, int] = {}
    run = tiny_run(folder, recipe, steps=sum(steps), seed=seed)
    data, held_out = run.load(processor)

    def judge(stage: StagePolicy, step: int) -> None:
        loss = mean_loss(model, processor, held_out, batch_size=48)
        accuracy = exact_match(model, processor, held_out, batch_size=48).accuracy
        judged.append(Judged(stage.name, step, loss, accuracy))
        if on_judged is not None:
            on_judged(judged[-1])

    judge(STAGE_1, 0)
    for stage, length, rate in ((STAGE_1, steps[0], LEARNING_RATE), (STAGE_2, steps[1], LEARNING_RATE * SHARE)):
        apply_stage(model, stage.with_lr(rate))
        trained[stage.name] = sum(each.numel() for named in trainable_parameters(model).values() for _, each in named)
        config = replace(
            run.config,
            stage=stage.name,
            steps=length,
            learning_rate=rate,
            output=str(folder / stage.name),
            log_every=max(length // POINTS, 1),
            # Stage 2 reads the data in another order.
            seed=seed + (stage is STAGE_2),
        )

        def follow(entry: LogEntry, stage: StagePolicy = stage, begun: int = len(losses)) -> None:
            judge(stage, begun + int(entry["step"]))

        losses += Trainer(model, processor, data, config, on_log=follow).fit().losses
    return Curve(judged, losses, steps[0], trained)
