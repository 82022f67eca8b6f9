"""SIGKILL at drawn moments, also inside a save: nothing lost, nothing half-written, the same losses to the bit."""

import copy
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from connectors import build_connector
from vlm_encoders.encoder import Encoder
from vlm_encoders.training import ConversationDataset, TrainConfig, Trainer
from vlm_encoders.training.checkpoints import checkpoints, load_state
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import VLMProcessor
from vlm_encoders.vlm.stages import STAGE_2, apply_stage

STEPS = 8
MOMENTS = 10
FILE_CALLS = ("fsync", "rename", "write", "mkdir", "open")


@dataclass
class Setup:
    """One run that can be started in a child process, killed, and gone on with."""

    model: VisionLanguageModel
    processor: VLMProcessor
    data: Path

    def trainer(self, output: Path) -> Trainer:
        config = TrainConfig(
            data=str(self.data),
            image_folder=str(self.data.parent),
            output=str(output),
            eval_data=str(self.data),
            stage=STAGE_2.name,
            steps=STEPS,
            batch_size=2,
            save_every=1,
            eval_every=2,
            log_every=1,
            cpu=True,
            progress=False,
            tracker="none",
        )
        samples = ConversationDataset(self.data, self.data.parent, self.processor)
        model = apply_stage(copy.deepcopy(self.model), STAGE_2)
        return Trainer(model, self.processor, samples, config, eval_dataset=samples)

    def child(self, output: Path, before: Callable[[], None]) -> int:
        """Start the run in a forked process, which has all libraries imported already."""
        process = os.fork()
        if process:
            return process
        # A forked process must make its thread pool anew.
        torch.set_num_threads(1)
        try:
            before()
            self.trainer(output).fit()
            os._exit(0)
        finally:
            os._exit(1)


_WHOLE: dict[str, Any] = {}
"""What the uninterrupted run gave, measured once."""


@pytest.fixture
def setup(clip: Encoder, llama: Any, tokenizer: Any, tmp_path: Path) -> Setup:
    records = []
    for index in range(7):
        Image.new("RGB", (28, 28), (30 * index, 200, 90)).save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": "<image> w40"}, {"from": "gpt", "value": f"w{index} w{index + 1}"}]
        records.append({"id": f"s{index}", "image": f"{index}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    torch.manual_seed(5)
    connector = build_connector("mlp", clip.token_spec, 32)
    processor = VLMProcessor(clip, connector, tokenizer)
    for layer in llama.model.layers:
        # Dropout makes the loss depend on the random state that a resume must put back.
        layer.self_attn.attention_dropout = 0.2
    model = VisionLanguageModel(clip, connector, llama, image_token_id=processor.image_token_id)
    made = Setup(model, processor, tmp_path / "data.json")
    if not _WHOLE:
        made.trainer(tmp_path / "warm").fit()
        started = time.monotonic()
        _WHOLE["losses"] = made.trainer(tmp_path / "whole").fit().losses
        _WHOLE["seconds"] = time.monotonic() - started
    return made


def held_to_the_uninterrupted_run(setup: Setup, output: Path) -> None:
    """Every checkpoint that is there is whole, and the run that goes on is the one that was never killed."""
    present = checkpoints(output)
    for folder in present:
        state = load_state(folder)
        assert state.losses == _WHOLE["losses"][: state.step]
        assert f"step-{state.step:06d}" == folder.name
        assert (folder / "model.json").is_file()
    result = setup.trainer(output).fit(resume=bool(present))
    assert result.losses == _WHOLE["losses"]
    steps = [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    leftovers = [path.name for path in output.iterdir() if path.name.startswith(".")]
    assert leftovers == []


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_killed_at_a_drawn_time(setup: Setup, tmp_path: Path, moment: int) -> None:
    delay = random.Random(moment).uniform(0.02, 1.0) * _WHOLE["seconds"]
    process = setup.child(tmp_path / "run", lambda: None)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    held_to_the_uninterrupted_run(setup, tmp_path / "run")


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_killed_inside_a_save(setup: Setup, tmp_path: Path, moment: int) -> None:
    draw = random.Random(100 + moment)
    name, left = FILE_CALLS[moment % len(FILE_CALLS)], draw.randrange(3, 40)

    def arrange() -> None:
        count = iter(range(10**6))

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **options: Any) -> Any:
                if next(count) == left:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **options)

            return wrapped

        if name == "write":
            Path.write_bytes = counted(Path.write_bytes)  # type: ignore[method-assign]
            Path.write_text = counted(Path.write_text)  # type: ignore[method-assign]
        elif name == "open":
            Path.open = counted(Path.open)  # type: ignore[method-assign]
        else:
            setattr(os, name, counted(getattr(os, name)))

    process = setup.child(tmp_path / "run", arrange)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status)
    held_to_the_uninterrupted_run(setup, tmp_path / "run")
