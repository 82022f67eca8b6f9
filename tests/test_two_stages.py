"""The embedded Stage 1 then Stage 2, judged on the way; its table, file and picture."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from connectors.errors import VlmError
from vlm_encoders.cli.main import app
from vlm_encoders.report.training_figure import draw_training
from vlm_encoders.tiny import stage1


def test_both_stages_are_trained_judged_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage1, "HELD_OUT_SAMPLES", 12)
    output = tmp_path / "stages"
    arguments = ["demo", "--stages", "--steps", "4", "--output", str(output)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = re.findall(r"^(no training|stage-\d) +(\d+) +(-|[\d,]+) +([\d.]+) +([\d.]+)%$", result.output, re.MULTILINE)
    assert [(row[0], int(row[1])) for row in rows] == [
        ("no training", 0),
        *(("stage-1", step) for step in range(1, 5)),
        *(("stage-2", step) for step in range(5, 9)),
    ]
    # The projector alone, then the LLM beside it.
    assert [row[2] for row in rows[1::4]] == ["33,024", "890,880"]
    assert float(rows[-1][3]) < float(rows[0][3])
    curve = json.loads((output / "stages.json").read_text())
    assert len(curve["losses"]) == 8
    assert curve["boundary"] == 4
    picture = (output / "stages.svg").read_text()
    assert "Stage 2 the LLM too" in picture
    assert not re.search(r"<dc:date>", picture)


def test_nothing_to_draw_is_told(tmp_path: Path) -> None:
    with pytest.raises(VlmError, match="there is no step to draw"):
        draw_training(tmp_path / "a.svg", [], [], [], "")
