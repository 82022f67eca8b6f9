"""Stages from a file: each mistake is told with the table and the field."""

from pathlib import Path

import pytest

from connectors.errors import VlmError
from vlm_encoders.training.policy_file import stage_policy
from vlm_encoders.vlm.policy import PartPolicy
from vlm_encoders.vlm.published import STAGES


def test_a_name_gives_its_stage_and_a_file_its_policies(tmp_path: Path) -> None:
    assert stage_policy("stage-2") is STAGES["stage-2"]
    path = tmp_path / "mine.toml"
    path.write_text('[llm]\nmode = "lora"\nlr = 1e-4\nlora_rank = 8\n')
    stage = stage_policy(str(path))
    assert stage.name == str(path)
    assert stage.llm == PartPolicy("lora", lr=1e-4, lora_rank=8)
    assert stage.encoder == stage.connector == PartPolicy()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[lm]\nlr = 1.0\n", r"has 'lm', no part; use the tables \[encoder\], \[connector\], \[llm\]"),
        ("[llm]\nmod = 'train'\n", r"\[llm\] has no field 'mod'; did you mean mode"),
        ("[llm]\nmode = 'train'\nlr = '1e-4'\n", r"\[llm\] lr must be a number, got '1e-4'"),
        ("[llm]\nmode = 'train'\n", r"\[llm\]: mode 'train' needs a learning rate above 0"),
        ("[llm]\nmode = 'full'\nlr = 1.0\n", r"\[llm\] mode must be 'frozen' or 'train'"),
        ("llm = 'train'\n", r"'llm' must be a table of policy fields, got 'train'"),
        ("[llm\n", "is not TOML"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(VlmError, match=sentence):
        stage_policy(str(path))
    with pytest.raises(VlmError, match="cannot be read"):
        stage_policy(str(tmp_path / "none.toml"))
    with pytest.raises(VlmError, match="no stage 'stage-4'; did you mean"):
        stage_policy("stage-4")
