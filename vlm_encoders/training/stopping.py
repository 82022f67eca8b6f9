"""SIGTERM asks a run to save and end: batch systems send it before they kill."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["StopRequest", "stop_on_sigterm"]

_SAME_S = 10.0
"""How long more SIGTERM are the same request, seconds: a batch system sends one to each process, and so does the
launcher that it stops."""


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def everywhere(self, accelerator: Accelerator) -> bool:
        """Say whether any process was asked; all get the same answer, so that none waits for another."""
        if accelerator.num_processes == 1:
            return self.asked
        flag = torch.tensor(int(self.asked), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum").item())


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Take SIGTERM as a request while inside; one that comes seconds later ends the process at once.

    Outside of the main thread, where Python takes no signals, nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.getsignal(signal.SIGTERM)

    first = 0.0

    def ask(number: int, _: FrameType | None) -> None:
        nonlocal first
        if not request.asked:
            request.asked, first = True, time.monotonic()
        elif time.monotonic() - first >= _SAME_S:
            signal.signal(number, before)
            signal.raise_signal(number)

    signal.signal(signal.SIGTERM, ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
