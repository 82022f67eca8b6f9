"""Any image encoder in front of any language model, with its cost known first."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm_encoders.encoder import Encoder
    from vlm_encoders.preprocess import Preprocessor, load_image
    from vlm_encoders.registry import create_encoder, encoder_spec, list_encoders, register_encoder
    from vlm_encoders.spec import EncoderSpec

__all__ = [
    "Encoder",
    "EncoderSpec",
    "Preprocessor",
    "create_encoder",
    "encoder_spec",
    "list_encoders",
    "load_image",
    "register_encoder",
]

_HOME = {
    "encoder": ("Encoder",),
    "preprocess": ("Preprocessor", "load_image"),
    "registry": ("create_encoder", "encoder_spec", "list_encoders", "register_encoder"),
    "spec": ("EncoderSpec",),
}
_MODULE = {name: f"vlm_encoders.{module}" for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a name from its module on first use, so that the package itself is light."""
    if name not in _MODULE:
        raise AttributeError(f"module 'vlm_encoders' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE[name]), name)
