"""Work of the first process whose outcome all processes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from connectors.errors import VlmError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["on_first"]

T = TypeVar("T")


def on_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do something on the first process and give its result on all.

    Raises:
        VlmError: it failed; raised on every process, since those that went on would wait for the first for ever.
    """
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [work()]
        except VlmError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], VlmError):
        raise outcome[0]
    result: T = outcome[0]
    return result
