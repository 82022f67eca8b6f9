"""`train` and `generate` as commands: killed and resumed, launched twice over, and refused early."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from connectors.errors import VlmError
from vlm_encoders.cli.main import app
from vlm_encoders.tiny import llm_folder, write_dataset
from vlm_encoders.training.checkpoints import load_state
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import VLMProcessor

PARTS = ("--encoder", "tiny-digits", "--connector", "mlp", "--llm", "tiny")


def run(*arguments: str) -> str:
    """Run a sub-command in this process and give what it prints; a VlmError is raised on."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """Six samples, and a file of settings that names them."""
    data = write_dataset(tmp_path / "data", "train", 6, seed=0)
    path = tmp_path / "train.toml"
    path.write_text(
        f'data = "{data}"\nimage_folder = "{data.parent}"\noutput = "{tmp_path / "out"}"\n'
        "batch_size = 2\nlog_every = 1\ncpu = true\nprogress = false\n"
    )
    return path


@pytest.fixture
def trained(settings: Path, tmp_path: Path) -> Path:
    """A model of one step."""
    run("train", str(settings), *PARTS, "--steps", "1")
    return tmp_path / "out" / "model"


def losses(output: Path) -> list[tuple[int, float]]:
    lines = (output / "log.jsonl").read_text().splitlines()
    return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines)]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vlm_encoders", *arguments]


def test_a_killed_run_goes_on_as_if_it_had_not_been(settings: Path, tmp_path: Path) -> None:
    arguments = ("train", str(settings), *PARTS, "--save-every", "1", "--steps", "30")
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    killed = tmp_path / "out"
    deadline = time.monotonic() + 120
    while not list(killed.glob("step-00000[2-9]")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors
    assert not (killed / "model").exists()
    assert "30 steps" in run(*arguments, "--resume")
    whole = tmp_path / "whole"
    run(*arguments, "--output", str(whole))
    assert losses(killed) == losses(whole)
    assert len(losses(whole)) == 30


def launch(arguments: tuple[str, ...], **environment: str) -> list[tuple[int, str, str]]:
    """Run the command as two processes of one launch: status, stdout and stderr of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            command(*arguments),
            env=os.environ
            | place
            | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    ended = [process.communicate(timeout=120) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, ended, strict=True)]


def test_of_two_processes_one_saves_and_prints(settings: Path, tmp_path: Path) -> None:
    first, second = launch(("train", str(settings), *PARTS, "--steps", "2"))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert "2 steps in" in first[1]
    assert "connector" in first[1]
    assert second[1] == ""
    loaded = VisionLanguageModel.from_pretrained(tmp_path / "out" / "model")
    VLMProcessor.from_pretrained(tmp_path / "out" / "model", loaded)


@pytest.mark.skipif(torch.cuda.is_available(), reason="each process finds an accelerator")
def test_two_processes_without_an_accelerator_join_on_the_cpu(settings: Path, tmp_path: Path) -> None:
    settings.write_text(settings.read_text().replace("cpu = true", "cpu = false"))
    for status, _, errors in launch(("train", str(settings), *PARTS, "--steps", "2")):
        assert status == 0, errors
    # Trained alone, each would have written for one process.
    assert load_state(tmp_path / "out" / "step-000002").world == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--stage", "stage-4"], "no stage 'stage-4'"),
        (["--data", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--image-folder", "nowhere"], "image folder 'nowhere' is no folder"),
        (["--image-folder", "."], "image file .* is missing"),
        (["--output", "{file}"], "output folder '.*' cannot be written .*give another folder"),
        (["--encoder", "tiny-digit"], "no encoder 'tiny-digit'"),
        (["--connector", "mpl"], "no connector 'mpl'"),
        (["--tiler", "anyre"], "no tiler 'anyre'"),
        (["--dtype", "float8"], "dtype must be 'float32' or 'bfloat16' or 'float16', got 'float8'"),
        (["--resume"], "holds no checkpoint to resume from"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    settings: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], sentence: str
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the LLM was loaded")

    monkeypatch.setattr("vlm_encoders.vlm.build.load_llm", load)
    chosen = [option.format(file=settings) for option in options]
    with pytest.raises(VlmError, match=sentence):
        run("train", str(settings), *PARTS, *chosen)


def test_a_saved_model_trains_at_another_length(trained: Path, settings: Path, tmp_path: Path) -> None:
    settings.write_text(settings.read_text() + "max_length = 300\nsteps = 1\n")
    again = tmp_path / "again"
    run("train", str(settings), "--model", str(trained), "--output", str(again))
    assert json.loads((again / "model" / "processor" / "processor.json").read_text())["max_length"] == 300


def test_the_dtype_is_of_encoder_and_llm(settings: Path, tmp_path: Path) -> None:
    run("train", str(settings), *PARTS, "--steps", "1", "--dtype", "bfloat16")
    loaded = VisionLanguageModel.from_pretrained(tmp_path / "out" / "model")
    found = [{each.dtype for each in part.parameters()} for part in (loaded.encoder, loaded.connector, loaded.llm)]
    assert found == [{torch.bfloat16}, {torch.float32}, {torch.bfloat16}]


def picture(trained: Path) -> str:
    return str(min((trained.parents[1] / "data" / "images").glob("*.png")))


def test_a_missing_data_file_is_not_taken_for_a_missing_image_folder(tmp_path: Path) -> None:
    options = ("--data", "none/there.json", "--output", str(tmp_path / "out"))
    with pytest.raises(VlmError, match=r"none/there\.json: cannot be read"):
        run("train", *PARTS, *options)


@pytest.mark.parametrize("option", ["--max-new-tokens", "--beams"])
def test_generate_wants_at_least_one(tmp_path: Path, option: str) -> None:
    result = CliRunner().invoke(app, ["generate", str(tmp_path), "--prompt", "w", option, "0"])
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.output


@pytest.mark.parametrize("temperature", ["0", "-1", "nan"])
def test_generate_wants_a_temperature_above_zero(tmp_path: Path, temperature: str) -> None:
    with pytest.raises(VlmError, match=r"temperature must be above 0, got .* leave out --sample"):
        run("generate", str(tmp_path), "--prompt", "w", "--sample", "--temperature", temperature)


def test_generate_finds_parts_that_moved(trained: Path) -> None:
    question = ("generate", str(trained), picture(trained), "--prompt", "Which digits?", "--max-new-tokens", "3")
    expected = run(*question)
    path = trained / "model.json"
    manifest: dict[str, Any] = json.loads(path.read_text())
    manifest["llm"]["source"] = "/gone/llm"
    path.write_text(json.dumps(manifest))
    with pytest.raises(VlmError, match="give --llm with the place"):
        run(*question)
    assert run(*question, "--llm", "tiny") == run(*question, "--llm", str(llm_folder())) == expected
    manifest["encoder"]["origin"]["name"] = "hf:/gone/vit"
    path.write_text(json.dumps(manifest))
    with pytest.raises(VlmError, match="or give --encoder"):
        run(*question, "--llm", "tiny")
    assert run(*question, "--llm", "tiny", "--encoder", "tiny-digits") == expected


def test_generate_takes_an_encoder_that_moved_as_it_was_built(settings: Path, tmp_path: Path) -> None:
    run("train", str(settings), *PARTS, "--steps", "1", "--dtype", "bfloat16")
    trained = tmp_path / "out" / "model"
    question = ("generate", str(trained), picture(trained), "--prompt", "Which digits?", "--max-new-tokens", "3")
    assert run(*question, "--encoder", "tiny-digits") == run(*question)
