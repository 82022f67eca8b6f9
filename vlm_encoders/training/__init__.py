"""Training: LLaVA conversations, one readable loop, exact resume."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm_encoders.training.check import DataReport, Problem, check_data
    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.training.data import ConversationDataset
    from vlm_encoders.training.evaluate import EvalResult, Prediction, exact_match, mean_loss
    from vlm_encoders.training.optim import build_optimizer, cosine_with_warmup
    from vlm_encoders.training.order import SeededBatches
    from vlm_encoders.training.trainer import Trainer, TrainResult

__all__ = [
    "ConversationDataset",
    "DataReport",
    "EvalResult",
    "Prediction",
    "Problem",
    "SeededBatches",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "build_optimizer",
    "check_data",
    "cosine_with_warmup",
    "exact_match",
    "mean_loss",
]

_HOME = {
    "check": ("DataReport", "Problem", "check_data"),
    "config": ("TrainConfig",),
    "data": ("ConversationDataset",),
    "evaluate": ("EvalResult", "Prediction", "exact_match", "mean_loss"),
    "optim": ("build_optimizer", "cosine_with_warmup"),
    "order": ("SeededBatches",),
    "trainer": ("TrainResult", "Trainer"),
}
_MODULE = {name: f"vlm_encoders.training.{module}" for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a name from its module on first use, so that checking data needs no torch."""
    if name not in _MODULE:
        raise AttributeError(f"module 'vlm_encoders.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE[name]), name)
