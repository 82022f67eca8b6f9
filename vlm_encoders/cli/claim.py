"""Output folders that a sub-command empties when it runs again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from connectors.errors import VlmError

__all__ = ["check_claim", "claim_folder"]


def check_claim(output: Path, command: str) -> None:
    """Refuse a folder that holds something else than an earlier run.

    Args:
        output: the folder.
        command: the sub-command, whose mark is `<command>.txt`.

    Raises:
        VlmError: the folder holds something else.
    """
    mark = output / f"{command}.txt"
    if output.exists() and not mark.is_file() and (not output.is_dir() or any(output.iterdir())):
        raise VlmError(f"'{output}' holds something that is not an earlier {command}'s; give a new folder by --output")


def claim_folder(output: Path, command: str, inside: Sequence[str]) -> None:
    """Empty the folder of an earlier run; any other folder that holds something is left alone.

    Args:
        output: the folder.
        command: the sub-command, whose mark is `<command>.txt`.
        inside: files and folders in it that are removed.

    Raises:
        VlmError: the folder holds something else, or cannot be emptied or written.
    """
    check_claim(output, command)
    try:
        for path in (output / name for name in inside):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise VlmError(
            f"the earlier run in '{output}' cannot be removed ({error.strerror or error}); remove it, or give another "
            "folder by --output"
        ) from error
    try:
        output.mkdir(parents=True, exist_ok=True)
        mark = output / f"{command}.txt"
        mark.write_text(f"written by vlm-encoders {command}, which empties this folder when it runs again\n")
    except OSError as error:
        raise VlmError(f"'{output}' cannot be written: {error.strerror}; give another folder by --output") from error
