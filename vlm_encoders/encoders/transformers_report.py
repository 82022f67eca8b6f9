"""What transformers reports of the weights that it loaded: every key accounted for, or an error."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from connectors.errors import VlmError
from vlm_encoders.encoders.towers.base import Tower
from vlm_encoders.spec import EncoderSpec

__all__ = ["check_report", "quiet", "told"]


def check_report(report: dict[str, Any], found: Tower, spec: EncoderSpec, path: Path) -> None:
    """Refuse weights that are missing, or left over though they are no head and no cut layer.

    Raises:
        VlmError: the first keys are named.
    """
    unused = re.compile("|".join([*(re.escape(name) + r"\b" for name in found.idle)] or [r"(?!)"]))
    norm = re.compile(re.escape(found.norm) + r"\." if found.norm and not spec.final_norm else r"(?!)")
    needed = [key for key in report["missing_keys"] if not norm.match(key) and not unused.match(key)]
    leftover = re.compile(found.leftover(spec))
    unexpected = [key for key in report["unexpected_keys"] if not leftover.match(key)]
    misshapen = [key for key, *_ in report["mismatched_keys"] if not norm.match(key) and not unused.match(key)]
    if misshapen:
        raise VlmError(
            f"{spec.name}: weights in '{path}' have other shapes than {spec.source} of its config: "
            f"{_few('misshapen', misshapen)}; give a checkpoint of this encoder"
        )
    if needed or unexpected:
        raise VlmError(
            f"{spec.name}: weights in '{path}' do not fit {spec.source}: {_few('missing', needed)}, "
            f"{_few('unexpected', unexpected)}; give a checkpoint of this encoder"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' report of dropped heads and its progress bar to ourselves: `check_report` reads it."""
    from transformers.utils import logging as theirs

    logger = logging.getLogger("transformers.modeling_utils")
    # A higher level instead would start a check of sharding plans, with a report of its own.
    before, bars = logger.disabled, theirs.is_progress_bar_enabled()
    logger.disabled = True
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        logger.disabled = before
        if bars:
            theirs.enable_progress_bar()


@contextmanager
def told(what: str, advice: str) -> Iterator[None]:
    """Tell any error of transformers in one sentence.

    Args:
        what: the start of the sentence, before the reason.
        advice: what to do.

    Raises:
        VlmError: something was raised; a `VlmError` is passed on as it is.
    """
    try:
        yield
    except VlmError:
        raise
    # A value that a config's class was not written for fails wherever it is first used, by any error.
    except Exception as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        # A KeyError is nothing but the key.
        reason = f"it does not know {reason}" if isinstance(error, KeyError) else reason
        raise VlmError(f"{what}: {reason}; {advice}") from error


def _few(kind: str, keys: list[str]) -> str:
    keys = sorted(keys)
    return f"{len(keys)} {kind}" + (f" ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "")
