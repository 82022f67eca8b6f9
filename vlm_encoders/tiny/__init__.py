"""An embedded encoder, LLM and dataset: everything runs without a download."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm_encoders.tiny.dataset import write_dataset
    from vlm_encoders.tiny.weights_folder import encoder_folder, llm_folder

__all__ = ["encoder_folder", "llm_folder", "write_dataset"]

_MODULE = {"encoder_folder": "weights_folder", "llm_folder": "weights_folder", "write_dataset": "dataset"}


def __getattr__(name: str) -> object:
    """Import a name from its module on first use: `vlm-encoders list` reads this package's encoder row."""
    if name not in _MODULE:
        raise AttributeError(f"module 'vlm_encoders.tiny' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vlm_encoders.tiny.{_MODULE[name]}"), name)
