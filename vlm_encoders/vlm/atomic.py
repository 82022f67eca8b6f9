"""Write a folder so that it is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from connectors.errors import VlmError

__all__ = ["atomic_folder", "recover"]


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to write to; it takes the place of `folder` when all is written.

    Args:
        folder: the final place; what is there stays until the new one is on the disk.

    Raises:
        VlmError: the disk is full or cannot be written; `folder` is as it was.
    """
    folder = folder.absolute()
    temporary, old = _beside(folder, "new"), _beside(folder, "old")
    if folder.exists() and not folder.is_dir():
        raise VlmError(f"cannot save to '{folder}': a file of that name is there; give the name of a folder")
    try:
        recover(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # What a killed save left behind.
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        _sync(temporary)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        _sync_path(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        recover(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_write_failure(error):
            kept = "what was there is untouched" if folder.exists() else "nothing was left behind"
            advice = "free some space or save" if "space" in str(error).lower() else "save"
            raise VlmError(f"cannot save to '{folder}': {error}; {kept}, {advice} to another place") from error
        raise


def recover(folder: Path) -> None:
    """Put back what a save that was killed between its two renames had moved aside."""
    folder = folder.absolute()
    old = _beside(folder, "old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def _is_write_failure(error: BaseException) -> bool:
    # safetensors reports a failed write as an error of its own, not as OSError.
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def _beside(folder: Path, word: str) -> Path:
    return folder.with_name(f".{folder.name}.{word}")


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync_path(path)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
