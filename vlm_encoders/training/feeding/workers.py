"""Work on many items in several processes, in order and a bounded part at a time."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from connectors.errors import VlmError

__all__ = ["map_chunks"]

T = TypeVar("T")
R = TypeVar("R")

CHUNK = 64

_work: Callable[[Any], Any] | None = None


def map_chunks(
    work: Callable[[T], R],
    items: Iterable[T],
    *,
    workers: int = 0,
    chunk: int = CHUNK,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[R]:
    """Give `work(item)` of each item in order; at most a few chunks a process are under way or waiting.

    Args:
        work: what is done; it must not raise. On Linux it need not be picklable, its results must be.
        items: any number of them, read as they are needed.
        workers: processes; 0 to work in this one.
        chunk: items that a process is given at once.
        on_progress: called with the number of items that are newly done.

    Raises:
        VlmError: a process died, for want of memory as a rule.
    """
    tell = on_progress or (lambda _: None)
    source = iter(items)
    chunks = iter(lambda: list(itertools.islice(source, chunk)), [])
    if workers < 1:
        for some in chunks:
            yield from map(work, some)
            tell(len(some))
        return
    # Forked processes share what `work` holds; elsewhere threads of the system's own make that unsafe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting: deque[tuple[int, Future[list[R]]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_install, initargs=(work,)) as pool:
        try:
            for some in chunks:
                waiting.append((len(some), _submit(pool, some)))
                if len(waiting) < 4 * workers:
                    continue
                count, future = waiting.popleft()
                yield from future.result()
                tell(count)
            for count, future in waiting:
                yield from future.result()
                tell(count)
        except BrokenProcessPool as error:
            raise VlmError(
                f"one of {workers} processes died, for want of memory as a rule; use fewer workers"
            ) from error
        finally:
            # Not waited for, it may fail at the interpreter's own end.
            pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, items: list[Any]) -> Future[list[Any]]:
    with warnings.catch_warnings():
        # Python warns of threads in a process that forks; the libraries' own pools are idle here, and unused there.
        warnings.simplefilter("ignore", DeprecationWarning)
        return pool.submit(_do, items)


def _install(work: Callable[[Any], Any]) -> None:
    global _work  # noqa: PLW0603
    _work = work
    # Ctrl-C is for the first process, which then stops the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _do(items: list[Any]) -> list[Any]:
    assert _work is not None
    return [_work(item) for item in items]
