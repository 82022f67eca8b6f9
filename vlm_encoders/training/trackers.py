"""Where a run's log goes beside its file: TensorBoard, or Weights & Biases."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from connectors.errors import VlmError

__all__ = ["Tracker", "check_tracker", "open_tracker"]

_MODULES = {"tensorboard": "tensorboard", "wandb": "wandb"}
_INSTALL = {"tensorboard": "pip install 'vlm-encoders[track]'", "wandb": "pip install wandb"}
PROJECT = "vlm-encoders"


class Tracker(Protocol):
    """Takes the log entries of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step."""

    def close(self) -> None:
        """Write what is not written yet."""


def check_tracker(kind: str) -> None:
    """Refuse a tracker that is asked for by name and not installed.

    Raises:
        VlmError: it is not installed.
    """
    if kind in _MODULES and find_spec(_MODULES[kind]) is None:
        raise VlmError(f"tracker '{kind}' is not installed; {_INSTALL[kind]}, or set tracker = \"none\"")


def open_tracker(kind: str, output: Path, settings: Mapping[str, Any], *, step: int) -> Tracker:
    """Open the tracker of a run, or go on with it.

    Args:
        kind: "auto", "tensorboard", "wandb" or "none".
        output: folder of the run.
        settings: of the run, kept beside its curves.
        step: steps that are done; what was logged of later ones is replaced.

    Raises:
        VlmError: it is asked for by name and not installed.
    """
    check_tracker(kind)
    if kind == "wandb":
        return _Wandb(output, settings)
    if kind == "tensorboard" or (kind == "auto" and find_spec("tensorboard") is not None):
        return _TensorBoard(output / "tensorboard", settings, step)
    return _Nothing()


class _Nothing:
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Forget them."""

    def close(self) -> None:
        """Nothing is open."""


class _TensorBoard:
    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=step + 1 if step else None)
        if not step:
            rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
            self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write the event file out."""
        self._writer.close()


class _Wandb:
    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        marker = output / "wandb-run"
        # The same run goes on when training is resumed.
        identity = marker.read_text(encoding="utf-8").strip() if marker.is_file() else secrets.token_hex(4)
        marker.write_text(identity + "\n", encoding="utf-8")
        self._run = wandb.init(
            project=PROJECT, name=output.name, id=identity, resume="allow", dir=str(output), config=dict(settings)
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Hand over what is not sent yet."""
        self._run.finish()
