"""What goes to Weights & Biases: one run, also over a resume."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vlm_encoders.training.trackers import open_tracker


class Run:
    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.points.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_a_resumed_run_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    runs: list[Run] = []

    def init(**options: Any) -> Run:
        asked.append(options)
        runs.append(Run())
        return runs[-1]

    library = ModuleType("wandb")
    library.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", library)
    monkeypatch.setattr("vlm_encoders.training.trackers.find_spec", lambda _: True)
    for step in (0, 2):
        tracker = open_tracker("wandb", tmp_path, {"seed": 7}, step=step)
        tracker.log(step + 1, {"loss": 0.5})
        tracker.close()
    assert asked[0]["id"] == asked[1]["id"]
    assert {"project": "vlm-encoders", "name": tmp_path.name, "resume": "allow"}.items() <= asked[0].items()
    assert asked[0]["config"] == {"seed": 7}
    assert [run.points for run in runs] == [[(1, {"loss": 0.5})], [(3, {"loss": 0.5})]]
    assert all(run.finished for run in runs)
