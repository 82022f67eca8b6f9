"""Checkpoints of a run: the model beside all that an exact resume needs."""

from __future__ import annotations

import io
import pickle
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from connectors.errors import VlmError
from vlm_encoders.training.config import TrainConfig
from vlm_encoders.vlm.atomic import atomic_folder
from vlm_encoders.vlm.stages import Part

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = [
    "RunState",
    "checkpoint_to_resume",
    "checkpoints",
    "load_state",
    "restore_weights",
    "save_checkpoint",
    "weights_to_save",
]

STATE_FILE = "trainer.pt"
LATEST = "latest"
_NEWLINE = {"newline": "connector.newline"}
# What may differ when a run goes on: it changes where things go and what is seen, not what is computed.
_FREE = {"output", "image_folder", "data", "eval_data", "model"} | {
    "num_workers", "save_every", "keep_checkpoints", "log_every", "eval_every", "progress",
}  # fmt: skip


@dataclass(frozen=True)
class RunState:
    """Where a run stands after a step.

    Attributes:
        step: steps that are done; with the seed, also the position in the data.
        losses: the loss of each step.
        tokens: LLM tokens seen.
        world: number of processes.
        samples: length of the dataset.
        config: the settings of the run.
        weights: what can move: trained parameters and buffers.
        optimizer: state of the optimizer.
        schedule: state of the learning-rate schedule.
        random: random states, one a process.
        frozen: hash of the frozen tensors of each part.
    """

    step: int
    losses: list[float]
    tokens: int
    world: int
    samples: int
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    random: list[dict[str, Any]]
    frozen: dict[Part, str]

    def check_settings(self, config: TrainConfig, world: int, samples: int) -> None:
        """Refuse to go on with a run that is not this one.

        Raises:
            VlmError: settings, number of processes or of samples differ.
        """
        for name, now in config.to_dict().items():
            if name not in _FREE and self.config.get(name) != now:
                raise VlmError(
                    f"the checkpoint was made with {name}={self.config.get(name)!r}, now it is {now!r}, so the run "
                    "would not go on as it began; set it back, or start a new run from the checkpoint's model"
                )
        if self.world != world:
            raise VlmError(f"the checkpoint was made by {self.world} processes, now there are {world}; use as many")
        if self.samples != samples:
            raise VlmError(f"the checkpoint was made with {self.samples} samples, the dataset has {samples} now")

    def check_frozen(self, frozen: dict[Part, str]) -> None:
        """Refuse to go on with frozen weights that are not those of the run.

        Raises:
            VlmError: the hash of a part's frozen tensors differs.
        """
        for part, digest in self.frozen.items():
            if frozen[part] != digest:
                raise VlmError(f"the frozen weights of the {part} are not those of the checkpoint; load the same ones")


def checkpoints(output: Path) -> list[Path]:
    """List the whole checkpoints of a run, oldest first."""
    found = {int(match[1]): path for path in output.glob("step-*") if (match := re.fullmatch(r"step-(\d+)", path.name))}
    return [found[step] for step in sorted(found) if (found[step] / STATE_FILE).is_file()]


def checkpoint_to_resume(output: Path, *, resume: bool | str | Path) -> Path | None:
    """Find the checkpoint that a run begins from; None for a new run.

    Raises:
        VlmError: there is none to resume from, or a new run would write over an old one.
    """
    if not isinstance(resume, bool):
        return Path(resume)
    present = checkpoints(output)
    if resume and not present:
        raise VlmError(f"'{output}' holds no checkpoint to resume from; run without resume, or give its folder")
    if present and not resume:
        raise VlmError(
            f"'{output}' holds checkpoints up to '{present[-1].name}' already; resume from them, or give another output"
        )
    return present[-1] if resume else None


def save_checkpoint(
    output: Path, state: RunState, model: VisionLanguageModel, processor: VLMProcessor, *, keep: int
) -> Path:
    """Write a checkpoint whole or not at all, then drop the oldest ones.

    The folder is a model that `VisionLanguageModel.from_pretrained` loads, with the
    state of the run beside it.

    Raises:
        VlmError: it cannot be written; earlier checkpoints are as they were.
    """
    folder = output / f"step-{state.step:06d}"
    try:
        with atomic_folder(folder) as inside:
            model.save_pretrained(inside)
            processor.save_pretrained(inside)
            _write_state(state, inside / STATE_FILE)
    except VlmError as error:
        good = checkpoints(output)
        kept = f"the last good checkpoint is '{good[-1]}', resume from it" if good else "there is no earlier checkpoint"
        raise VlmError(f"checkpoint of step {state.step} is not saved: {error.__cause__ or error}; {kept}") from error
    for old in checkpoints(output)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    _point(output / LATEST, folder.name)
    return folder


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
        return RunState(**values)
    except (OSError, RuntimeError, TypeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise VlmError(f"'{folder}' holds no readable training state; give a folder such as step-000100") from error


def weights_to_save(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """Give what can move, by name: all of the model but its frozen parameters."""
    frozen = _frozen_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def restore_weights(model: VisionLanguageModel, weights: dict[str, torch.Tensor]) -> None:
    """Put saved weights back.

    Raises:
        VlmError: the model has other trained parameters, or other shapes.
    """
    own = weights_to_save(model)
    wrong = sorted(own.keys() ^ weights.keys()) or [name for name in own if own[name].shape != weights[name].shape]
    if wrong:
        raise VlmError(
            f"the checkpoint does not fit the model: {', '.join(wrong[:3])} ({len(wrong)} in all) are missing, "
            "unexpected or of another shape; build the same model and stage"
        )
    model.load_state_dict(weights, strict=False)


def _frozen_names(model: VisionLanguageModel) -> set[str]:
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def _point(link: Path, target: str) -> None:
    # A convenience: some file systems have no links, and resume does not need one.
    with suppress(OSError, NotImplementedError):
        temporary = link.with_name(f".{link.name}.new")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(link)
