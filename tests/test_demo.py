"""The main job as a user sees it: the demo without a network, and training from the command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from connectors.errors import VlmError
from vlm_encoders.cli.main import app
from vlm_encoders.tiny import write_dataset

NO_NETWORK = """
import socket

def refuse(*args, **kwargs):
    raise RuntimeError("the network was touched")

socket.getaddrinfo = socket.create_connection = refuse
socket.socket.connect = socket.socket.connect_ex = refuse
"""


def run(*arguments: str) -> str:
    """Run a sub-command in this process and give what it prints; a VlmError is raised on."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_demo_reaches_its_goal_without_a_network(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    command = [sys.executable, "-m", "vlm_encoders", "demo", "--steps", "250", "--output", str(tmp_path / "demo")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr
    before, after = re.findall(r"^all questions +([\d.]+)% +([\d.]+)%$", done.stdout, re.MULTILINE)[0]
    assert float(before) <= 5
    assert float(after) >= 90
    for row in ("encoder .* bit-identical", "connector .* moved", "llm .* bit-identical"):
        assert re.search(rf"^{row}$", done.stdout, re.MULTILINE)
    for name, tokens in (("LLaVA-1.5", 576), ("BLIP-2", 32), ("tiny-digits  mlp", 64)):
        assert re.search(rf"^{name} .* {tokens} ", done.stdout, re.MULTILINE), name
    samples = json.loads((tmp_path / "demo/data/held_out/conversations.json").read_text())
    assert samples[0]["id"].endswith("read")
    answer = done.stdout.split("--prompt")[1].splitlines()[1]
    assert re.fullmatch(r"\d( \d)+", answer)
    assert done.stdout.count("\n  vlm-encoders ") == 3
    assert Image.open(tmp_path / "demo/answers.png").width > 800


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve conversations about scenes."""
    return write_dataset(tmp_path / "data", "train", 12, seed=0)


def train_options(data: Path, output: Path) -> list[str]:
    """Give the options of a run of a few steps on the embedded parts."""
    return [
        *("train", "--data", str(data), "--image-folder", str(data.parent), "--output", str(output)),
        *("--encoder", "tiny-digits", "--connector", "pixel_shuffle:factor=2+mlp", "--llm", "tiny"),
        *("--batch-size", "4"),
    ]


def test_train_then_ask_then_train_on(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    printed = run(*train_options(data, output), "--steps", "2", "--learning-rate", "0.003")
    assert re.search(r"^connector +pixel_shuffle\+mlp .* 0.003 +train", printed, re.MULTILINE)
    picture = next(data.parent.glob("images/*.png"))
    question = ["--prompt", "How many digits are in each row?", "--max-new-tokens", "5"]
    greedy = run("generate", str(output / "model"), str(picture), *question)
    assert run("generate", str(output / "model"), str(picture), *question) == greedy
    run("generate", str(output / "model"), str(picture), *question, "--beams", "2")
    run("generate", str(output / "model"), str(picture), *question, "--sample", "--temperature", "0.7")
    second = ["train", "--data", str(data), "--image-folder", str(data.parent), "--model", str(output / "model")]
    printed = run(*second, "--output", str(tmp_path / "second"), "--stage", "stage-2", "--steps", "1")
    assert re.search(r"^llm .* 2e-05 +train", printed, re.MULTILINE)


def test_resume_goes_on_and_a_second_run_is_refused(data: Path, tmp_path: Path) -> None:
    options = train_options(data, tmp_path / "run")
    run(*options, "--steps", "1")
    with pytest.raises(VlmError, match="holds checkpoints up to 'step-000001' already"):
        run(*options, "--steps", "1")
    assert "1 steps" in run(*options, "--steps", "1", "--resume")


def test_settings_come_from_toml_and_options_stand_over_them(data: Path, tmp_path: Path) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text(
        f'data = "{data}"\nimage_folder = "{data.parent}"\noutput = "{tmp_path / "run"}"\n'
        'encoder = "tiny-digits"\nconnector = "linear"\nllm = "tiny"\nsteps = 50\nbatch_size = 2\n'
    )
    assert "1 steps" in run("train", str(toml), "--steps", "1")


def test_training_mistakes_are_told_before_anything_trains(data: Path, tmp_path: Path) -> None:
    options = train_options(data, tmp_path / "run")
    with pytest.raises(VlmError, match="no stage 'stage1'; did you mean stage-1"):
        run(*options, "--stage", "stage1")
    records = json.loads(data.read_text())
    records[3]["image"] = "images/gone.png"
    data.write_text(json.dumps(records))
    with pytest.raises(VlmError, match=r"gone\.png"):
        run(*options, "--steps", "1")
    assert not (tmp_path / "run").exists()


def test_generate_says_which_placeholder_has_no_picture(data: Path, tmp_path: Path) -> None:
    run(*train_options(data, tmp_path / "run"), "--steps", "1")
    model = str(tmp_path / "run" / "model")
    with pytest.raises(VlmError, match="2 image placeholders, 0 images"):
        run("generate", model, "--prompt", "<image><image>What is in row 1?")


def test_the_demo_leaves_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    precious = tmp_path / "data" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    with pytest.raises(VlmError, match="holds something that is not an earlier demo's"):
        run("demo", "--output", str(tmp_path), "--steps", "1")
    assert precious.read_text() == "mine"
