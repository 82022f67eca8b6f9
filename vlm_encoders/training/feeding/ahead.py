"""A slow source read on a thread of its own, while the step before is taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import NamedTuple, TypeVar

__all__ = ["read_ahead"]

_Item = TypeVar("_Item")
_PATIENCE_S = 0.2
"""How long the thread may still wait once nobody reads, seconds."""


class _End(NamedTuple):
    error: BaseException | None


def read_ahead(items: Iterator[_Item], count: int) -> Iterator[_Item]:
    """Give items in their order, up to `count` of which are read before they are asked for.

    The thread begins at the first item and ends when the iterator is closed, so that workers which
    are forked before do not inherit it.

    Args:
        items: read on one thread alone.
        count: items that may wait.

    Raises:
        BaseException: what reading raised, where it came.
    """
    waiting: Queue[_Item | _End] = Queue(maxsize=count)
    closed = Event()

    def hand_over(item: _Item | _End) -> None:
        while not closed.is_set():
            with suppress(Full):
                waiting.put(item, timeout=_PATIENCE_S)
                return

    def read() -> None:
        end = _End(None)
        try:
            for item in items:
                hand_over(item)
                if closed.is_set():
                    return
        except BaseException as error:  # noqa: BLE001
            end = _End(error)
        hand_over(end)

    thread = Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = waiting.get(timeout=_PATIENCE_S)
            except Empty:
                continue
            if not isinstance(item, _End):
                yield item
                continue
            if item.error is not None:
                raise item.error
            return
    finally:
        closed.set()
        thread.join(timeout=10 * _PATIENCE_S)
