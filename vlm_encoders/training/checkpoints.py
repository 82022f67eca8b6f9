"""Checkpoints on the disk: the model beside all that an exact resume needs, whole or not there."""

from __future__ import annotations

import io
import pickle
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from connectors.errors import VlmError
from vlm_encoders.training.state import RunState
from vlm_encoders.vlm.atomic import atomic_folder, recover
from vlm_encoders.vlm.checkpoint import save_model

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["STATE_FILE", "checkpoint_to_resume", "checkpoints", "load_state", "save_checkpoint", "tidy"]

STATE_FILE = "trainer.pt"
LATEST = "latest"
_NEWLINE = {"newline": "connector.newline"}


def checkpoints(output: Path) -> list[Path]:
    """List the whole checkpoints of a run, oldest first."""
    found = {int(match[1]): path for path in output.glob("step-*") if (match := re.fullmatch(r"step-(\d+)", path.name))}
    return [found[step] for step in sorted(found) if (found[step] / STATE_FILE).is_file()]


def checkpoint_to_resume(output: Path, *, resume: bool | str | Path) -> Path | None:
    """Find the checkpoint that a run begins from; None for a new run.

    Raises:
        VlmError: there is none to resume from, or a new run would write over an old one.
    """
    present = checkpoints(output)
    if not isinstance(resume, bool):
        if present and Path(resume).resolve().parent != output.resolve():
            raise VlmError(
                f"'{output}' holds checkpoints up to '{present[-1].name}' of another run than '{resume}'; resume from "
                "them, or give another output"
            )
        return Path(resume)
    if resume and not present:
        raise VlmError(f"'{output}' holds no checkpoint to resume from; run without resume, or give its folder")
    if present and not resume:
        raise VlmError(
            f"'{output}' holds checkpoints up to '{present[-1].name}' already; go on with --resume "
            "(fit(resume=True)), or give another output"
        )
    return present[-1] if resume else None


def save_checkpoint(
    output: Path, state: RunState, model: VisionLanguageModel, processor: VLMProcessor, *, keep: int
) -> Path:
    """Write a checkpoint whole or not at all, then drop the oldest ones, and later ones.

    The folder is a model that `VisionLanguageModel.from_pretrained` loads, with the
    state of the run beside it.

    Raises:
        VlmError: it cannot be written; earlier checkpoints are as they were.
    """
    folder = output / f"step-{state.step:06d}"
    try:
        with atomic_folder(folder) as inside:
            save_model(model, inside, partial=True)
            processor.save_pretrained(inside)
            _write_state(state, inside / STATE_FILE)
    except VlmError as error:
        good = checkpoints(output)
        kept = f"the last good checkpoint is '{good[-1]}', resume from it" if good else "there is no earlier checkpoint"
        raise VlmError(f"checkpoint of step {state.step} is not saved: {error.__cause__ or error}; {kept}") from error
    _point(output / LATEST, folder.name)
    present = checkpoints(output)
    place = present.index(folder)
    # Later ones are of a run that this one, resumed from an earlier checkpoint, has replaced.
    for old in (*present[: max(place + 1 - keep, 0)], *present[place + 1 :]):
        # Renamed first: killed half-way, what is left must not pass for a checkpoint.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.dropped")), ignore_errors=True)
    return folder


def tidy(output: Path) -> None:
    """Put right what a killed save left in the folder of a run."""
    for aside in output.glob(".*.old"):
        recover(output / aside.name.removeprefix(".").removesuffix(".old"))
    for pattern in (".step-*", ".best.*"):
        for leftover in output.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _write_state(state: RunState, path: Path) -> None:
    # Once some bytes fit, torch tells a full disk as a RuntimeError about positions; written whole, it is an OSError.
    buffer = io.BytesIO()
    torch.save(vars(state), buffer)
    path.write_bytes(buffer.getbuffer())


def load_state(folder: Path) -> RunState:
    """Read the state of a run from a checkpoint folder.

    Raises:
        VlmError: there is none, or it cannot be read.
    """
    try:
        values = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        # Earlier checkpoints have the newline as the model's own; its place in the optimizer is the same.
        values["weights"] = {_NEWLINE.get(name, name): tensor for name, tensor in values["weights"].items()}
        values.pop("schedule", None)
        return RunState(**{"factors": [], "best": None, "feed": [{}] * values["world"], **values})
    except (OSError, RuntimeError, TypeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise VlmError(f"'{folder}' holds no readable training state; give a folder such as step-000100") from error


def _point(link: Path, target: str) -> None:
    # A convenience: some file systems have no links, and resume does not need one.
    with suppress(OSError, NotImplementedError):
        temporary = link.with_name(f".{link.name}.new")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(link)
