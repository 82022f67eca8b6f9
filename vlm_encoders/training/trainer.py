"""The training loop: one for every stage, on one process or many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from connectors.errors import VlmError
from vlm_encoders.training.batches import Samples, iterate_batches
from vlm_encoders.training.config import TrainConfig
from vlm_encoders.training.evaluate import summed_loss
from vlm_encoders.training.guard import FreezeGuard
from vlm_encoders.training.optim import build_optimizer, build_schedule
from vlm_encoders.training.order import SeededBatches
from vlm_encoders.training.progress import LogEntry, RunProgress, write_log
from vlm_encoders.training.state import (
    RunState,
    checkpoints,
    load_state,
    random_state,
    restore_random_state,
    restore_weights,
    save_checkpoint,
    weights_to_save,
)
from vlm_encoders.training.step import StepResult, SummedLoss, take_step
from vlm_encoders.vlm.stages import Part

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["TrainResult", "Trainer"]

LOG_FILE = "log.jsonl"


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        steps: steps of the whole run, those before a resume included.
        losses: the loss of each step, a mean over its supervised tokens.
        eval_losses: step -> loss on the evaluation data.
        seconds: time of the steps of this call, evaluation and saving included.
        tokens: LLM tokens seen by the whole run, padding left out.
        tokens_per_second: LLM tokens a second, over this call.
        moved: whether the weights of each part moved in this call.
        checkpoint: the last checkpoint.
    """

    steps: int
    losses: list[float]
    eval_losses: dict[int, float]
    seconds: float
    tokens: int
    tokens_per_second: float
    moved: dict[Part, bool]
    checkpoint: Path
