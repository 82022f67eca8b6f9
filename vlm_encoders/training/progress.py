"""What a person sees of a run: a bar on a terminal, plain lines elsewhere, and a log file."""

from __future__ import annotations

import errno
import json
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeAlias

from connectors.errors import VlmError

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["LogEntry", "RunProgress", "make_output", "trim_log", "write_log"]

LogEntry: TypeAlias = dict[str, float]
"""step, loss, grad_norm (also of each unit), lr_<part>, tokens, tokens_per_second, data_wait (share of the time),
skipped samples, seconds_left, and eval_loss where it was measured."""


class RunProgress:
    """Shows loss, speed in LLM tokens and time left, on one process only.

    Args:
        total: steps of the run.
        done: steps that were done before it was resumed.
        bar: True for a bar, False for lines, None for a bar on a terminal.
        active: False on all processes but the first, which show nothing.
    """

    def __init__(self, total: int, done: int, *, bar: bool | None, active: bool) -> None:
        self.total = total
        self.active = active
        self._bar: Progress | None = None
        if active and (sys.stderr.isatty() if bar is None else bar):
            self._bar = _make_bar()
            self._task = self._bar.add_task("training", total=total, completed=done, loss="-", speed="-")

    def step(self, entry: LogEntry) -> None:
        """Move the bar to a step that is done."""
        if self._bar is not None:
            loss, speed = f"{entry['loss']:.4f}", f"{entry['tokens_per_second']:,.0f}"
            self._bar.update(self._task, completed=entry["step"], loss=loss, speed=speed)

    def log(self, entry: LogEntry) -> None:
        """Write a log line where there is no bar."""
        if self.active and self._bar is None:
            sys.stderr.write(_line(entry, self.total) + "\n")
            sys.stderr.flush()

    def say(self, warning: str) -> None:
        """Write a warning where a person sees it."""
        if self._bar is not None:
            self._bar.console.print(f"warning: {warning}", highlight=False)
        elif self.active:
            sys.stderr.write(f"warning: {warning}\n")

    def __enter__(self) -> Self:
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()


def make_output(folder: Path) -> None:
    """Make the output folder of a run and see that it can be written.

    Raises:
        VlmError: it cannot, or a file is in its place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        advice = _advice(error, "give another folder")
        raise VlmError(f"the output folder '{folder}' cannot be written ({error.strerror}); {advice}") from error


def write_log(path: Path, entry: LogEntry) -> None:
    """Add an entry to a log of one JSON object a line.

    Raises:
        VlmError: the log cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        advice = _advice(error, "make it writable")
        raise VlmError(f"the log '{path}' cannot be written ({error.strerror}); {advice} and resume") from error


def trim_log(path: Path, step: int) -> None:
    """Drop what a log says of steps after `step`, which a resumed run takes again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
        # In its place at once: killed while it is written, the old one stands.
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text("".join(kept), encoding="utf-8")
        fresh.replace(path)


def _advice(error: OSError, otherwise: str) -> str:
    return "free some space" if error.errno == errno.ENOSPC else otherwise


def _make_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} tokens/s"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _line(entry: LogEntry, total: int) -> str:
    minutes, seconds = divmod(round(entry["seconds_left"]), 60)
    hours, minutes = divmod(minutes, 60)
    words = [
        f"step {entry['step']:.0f}/{total}",
        f"loss {entry['loss']:.4f}",
        f"{entry['tokens_per_second']:,.0f} tokens/s",
        f"{hours}:{minutes:02}:{seconds:02} left",
    ]
    if "eval_loss" in entry:
        words.append(f"eval loss {entry['eval_loss']:.4f}")
    return "  ".join(words)
