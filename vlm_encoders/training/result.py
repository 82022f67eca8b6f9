"""What a run gave."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlm_encoders.vlm.policy import Part

__all__ = ["TrainResult"]


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        steps: steps of the whole run, those before a resume included.
        losses: the loss of each step, a mean over its supervised tokens.
        eval_losses: step -> loss on the evaluation data, in this call.
        seconds: time of the steps of this call, evaluation and saving included.
        tokens: LLM tokens seen by the whole run, padding left out.
        tokens_per_second: LLM tokens a second, in this call.
        moved: whether the weights of each part moved in this call.
        checkpoint: the last checkpoint, a folder.
        best: the model of the lowest evaluation loss, a folder; None without evaluation.
        skipped: samples that were left out, on all processes, because they could not be made.
        stopped: whether SIGTERM ended it before its last step.
    """

    steps: int
    losses: list[float]
    eval_losses: dict[int, float]
    seconds: float
    tokens: int
    tokens_per_second: float
    moved: dict[Part, bool]
    checkpoint: Path
    best: Path | None = None
    skipped: int = 0
    stopped: bool = False
