"""Training: LLaVA conversations, one readable loop, exact resume."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.training.evaluate import EvalResult, Prediction, exact_match, mean_loss
    from vlm_encoders.training.feeding.check import DataReport, Problem, check_data
    from vlm_encoders.training.feeding.data import ConversationDataset
    from vlm_encoders.training.feeding.data_check import check_conversations
    from vlm_encoders.training.feeding.findings import DataCheck
    from vlm_encoders.training.feeding.length_order import GroupedBatches, PackedBatches
    from vlm_encoders.training.feeding.lengths import DataLengths, data_lengths
    from vlm_encoders.training.feeding.order import SeededBatches, make_order
    from vlm_encoders.training.feeding.stream import ConversationStream, open_dataset
    from vlm_encoders.training.optim import build_optimizer
    from vlm_encoders.training.proving.proof import Proof, ProofError
    from vlm_encoders.training.schedule import cosine_with_warmup, warmup_stable_decay
    from vlm_encoders.training.trainer import Trainer, TrainResult

__all__ = [
    "ConversationDataset",
    "ConversationStream",
    "DataCheck",
    "DataLengths",
    "DataReport",
    "EvalResult",
    "GroupedBatches",
    "PackedBatches",
    "Prediction",
    "Problem",
    "Proof",
    "ProofError",
    "SeededBatches",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "build_optimizer",
    "check_conversations",
    "check_data",
    "cosine_with_warmup",
    "data_lengths",
    "exact_match",
    "make_order",
    "mean_loss",
    "open_dataset",
    "warmup_stable_decay",
]

_HOME = {
    "feeding.check": ("DataReport", "Problem", "check_data"),
    "config": ("TrainConfig",),
    "feeding.data": ("ConversationDataset",),
    "evaluate": ("EvalResult", "Prediction", "exact_match", "mean_loss"),
    "optim": ("build_optimizer",),
    "feeding.data_check": ("check_conversations",),
    "feeding.findings": ("DataCheck",),
    "feeding.length_order": ("GroupedBatches", "PackedBatches"),
    "feeding.lengths": ("DataLengths", "data_lengths"),
    "feeding.order": ("SeededBatches", "make_order"),
    "schedule": ("cosine_with_warmup", "warmup_stable_decay"),
    "proving.proof": ("Proof", "ProofError"),
    "feeding.stream": ("ConversationStream", "open_dataset"),
    "trainer": ("TrainResult", "Trainer"),
}
_MODULE = {name: f"vlm_encoders.training.{module}" for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a name from its module on first use, so that checking data needs no torch."""
    if name not in _MODULE:
        raise AttributeError(f"module 'vlm_encoders.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE[name]), name)
