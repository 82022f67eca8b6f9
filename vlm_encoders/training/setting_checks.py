"""What each setting of a run may be: types from the annotations, ranges by name."""

from __future__ import annotations

import math
import types
from typing import Any, Literal, get_args, get_origin

from connectors.errors import VlmError

__all__ = ["check_range", "check_type"]

_AT_LEAST_ONE = (
    "batch_size",
    "gradient_accumulation",
    "steps",
    "epochs",
    "save_every",
    "log_every",
    "eval_every",
    "keep_checkpoints",
    "max_length",
    "max_image_tokens",
    "chunk_tokens",
    "pack_tokens",
    "max_bad_samples",
    "shuffle_buffer",
)
_AT_LEAST_ZERO = ("weight_decay", "num_workers", "seed")
_ABOVE_ZERO = ("learning_rate", "max_grad_norm")
_WORDS = {str: "a text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
_LAST_SEED = 2**31 - 1
"""NumPy's generator takes 32 bits, and each process adds its number."""
_FRACTIONS = ("warmup_ratio", "floor_ratio", "decay_ratio")


def check_type(name: str, value: object, hint: Any) -> None:
    """Refuse a setting of another type than its field's.

    Raises:
        VlmError: the value is none of the hint's types or words.
    """
    options = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    words: list[str] = []
    for option in options:
        if get_origin(option) is Literal:
            if value in get_args(option):
                return
            words.extend(repr(choice) for choice in get_args(option))
        elif _is_a(value, option):
            return
        elif option is not type(None):
            words.append(_WORDS[option])
    raise VlmError(f"{name} must be {' or '.join(words)}, got {value!r} ({type(value).__name__})")


def _is_a(value: object, kind: Any) -> bool:
    # bool is an int to Python, never to a reader of the file.
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def check_range(name: str, value: Any) -> None:
    """Refuse a setting that no run can have.

    Raises:
        VlmError: the value is too small or too large.
    """
    if value is None:
        return
    if name in _AT_LEAST_ONE and value < 1:
        raise VlmError(f"{name} must be at least 1, got {value}")
    if name in _AT_LEAST_ZERO and not 0 <= value < math.inf:
        raise VlmError(f"{name} must be 0 or more, got {value}")
    if name == "seed" and value > _LAST_SEED:
        raise VlmError(f"seed must be at most {_LAST_SEED}, got {value}")
    if name in _ABOVE_ZERO and not 0 < value < math.inf:
        raise VlmError(f"{name} must be above 0, got {value}")
    if name in _FRACTIONS and not 0 <= value <= 1:
        raise VlmError(f"{name} must be between 0 and 1, got {value}")
