"""Runs of two processes, killed and gone on with on two or on one: the same losses as one process alone."""

import copy
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from connectors import build_connector
from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.training import ConversationDataset, TrainConfig, Trainer
from vlm_encoders.training.checkpoints import checkpoints, load_state
from vlm_encoders.training.feeding.order import epoch_order
from vlm_encoders.training.processes.sharding import is_sharded
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import VLMProcessor
from vlm_encoders.vlm.stages import STAGE_2, apply_stage

STEPS = 6
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
KINDS: dict[str, tuple[dict[str, str], str]] = {
    "ddp": ({}, "replicated"),
    "fsdp2": (FSDP, "replicated"),
    "fsdp2, frozen parts sharded": (FSDP, "sharded"),
}


@dataclass
class Launcher:
    """Starts trainings in forked processes, which have all libraries imported already."""

    model: VisionLanguageModel
    processor: VLMProcessor
    data: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def run(self, output: Path, world: int, kind: str = "ddp", kill_at: tuple[int, float] | None = None) -> list[float]:
        """Run, or go on with, a training; kill it so many seconds behind a step, or give its losses."""
        processes = self.start(output, world, kind)
        if kill_at is not None:
            step, delay = kill_at
            limit = time.monotonic() + 120
            while not (output / f"step-{step:06d}").exists() and time.monotonic() < limit:
                time.sleep(0.002)
            time.sleep(delay)
            for process in processes:
                os.kill(process, signal.SIGKILL)
        statuses = [os.waitpid(process, 0)[1] for process in processes]
        if kill_at is not None:
            assert all(os.WIFSIGNALED(status) for status in statuses)
            return []
        assert statuses == [0] * world
        losses: list[float] = json.loads((output / "losses.json").read_text())
        return losses

    def start(self, output: Path, world: int, kind: str) -> list[int]:
        environment, frozen = KINDS[kind] if world > 1 else ({}, "replicated")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            launch = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        processes = []
        for rank in range(world):
            process = os.fork()
            if not process:
                if world > 1:
                    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "1"}
                    os.environ.update(environment | launch | place)
                self.child(output, rank, world, frozen)
            processes.append(process)
        return processes

    def child(self, output: Path, rank: int, world: int, frozen: str) -> NoReturn:
        # A forked process must make its thread pool anew before other threads, gloo's, ask for it.
        torch.set_num_threads(1)
        # What tests before this one have told accelerate of their processes.
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            self.train(output, rank, world, frozen)
            os._exit(0)
        except VlmError as error:
            (output / f"error-{rank}").write_text(str(error))
        except Exception:  # noqa: BLE001
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)

    def train(self, output: Path, rank: int, world: int, frozen: Any) -> None:
        config = TrainConfig(
            data=str(self.data),
            output=str(output),
            eval_data=str(self.data),
            stage=STAGE_2.name,
            steps=STEPS,
            batch_size=4 // world,
            save_every=1,
            log_every=1,
            frozen_parts=frozen,
            # What is launched for CPUs says so itself.
            cpu=world == 1,
            progress=False,
            tracker="none",
            **({"eval_every": 3} | self.settings),
        )
        samples = ConversationDataset(self.data, None, self.processor, check=not self.settings)
        model = apply_stage(copy.deepcopy(self.model), STAGE_2)
        trainer = Trainer(model, self.processor, samples, config, eval_dataset=samples)
        result = trainer.fit(resume=bool(checkpoints(output)))
        sharded = any(is_sharded(parameter) for parameter in model.parameters())
        assert sharded is (os.environ.get("ACCELERATE_USE_FSDP") == "true")
        trainer.save_pretrained(output / "model")
        if rank == 0:
            (output / "losses.json").write_text(json.dumps(result.losses))


@pytest.fixture
def launcher(clip: Encoder, llama: Any, tokenizer: Any, tmp_path: Path) -> Launcher:
    records = []
    for index in range(9):
        Image.new("RGB", (28, 28), (25 * index, 200, 90)).save(tmp_path / f"{index}.png")
        record = {"id": f"s{index}", "image": f"{index}.png"}
        asked = "<image> w40"
        if index % 3 == 2:
            # Text alone, so that some batches of one process reach no connector.
            del record["image"]
            asked = "w41 w42"
        answer = " ".join(f"w{index + word}" for word in range(index % 4 + 1))
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        records.append(record | {"conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    torch.manual_seed(5)
    connector = build_connector("mlp", clip.token_spec, 32)
    processor = VLMProcessor(clip, connector, tokenizer)
    model = VisionLanguageModel(clip, connector, llama, image_token_id=processor.image_token_id)
    return Launcher(model, processor, tmp_path / "data.json")


@pytest.mark.parametrize("kind", KINDS)
def test_killed_on_two_processes_and_gone_on_with_on_two_and_on_one(
    launcher: Launcher, tmp_path: Path, kind: str
) -> None:
    alone = launcher.run(tmp_path / "alone", 1)
    whole = launcher.run(tmp_path / "whole", 2, kind)
    assert whole == pytest.approx(alone, rel=1e-5)
    draw = random.Random(kind)
    launcher.run(tmp_path / "killed", 2, kind, kill_at=(draw.randrange(1, STEPS - 1), draw.uniform(0.0, 0.05)))
    for folder in checkpoints(tmp_path / "killed"):
        state = load_state(folder)
        assert state.losses == whole[: state.step]
    shutil.copytree(tmp_path / "killed", tmp_path / "on one", symlinks=True)
    assert launcher.run(tmp_path / "killed", 2, kind) == whole
    assert launcher.run(tmp_path / "on one", 1) == pytest.approx(alone, rel=1e-5)
    models = [
        VisionLanguageModel.from_pretrained(tmp_path / name / "model", encoder=copy.deepcopy(launcher.model.encoder))
        for name in ("killed", "on one", "alone")
    ]
    for name, tensor in models[2].state_dict().items():
        for other in models[:2]:
            torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_killed_on_one_process_and_gone_on_with_on_two(launcher: Launcher, tmp_path: Path) -> None:
    alone = launcher.run(tmp_path / "alone", 1)
    launcher.run(tmp_path / "killed", 1, kill_at=(2, 0.0))
    assert launcher.run(tmp_path / "killed", 2, "fsdp2") == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2, frozen parts sharded"])
def test_an_evaluation_sample_that_one_process_cannot_make_stops_both(
    launcher: Launcher, tmp_path: Path, kind: str
) -> None:
    lost = {1, 3}
    assert not lost & set(epoch_order(9, 0, 0)[:4])
    for index in lost:
        (tmp_path / f"{index}.png").unlink()
    launcher.settings = {"on_bad_sample": "skip", "max_bad_samples": 1, "eval_every": 1}
    statuses = [os.waitpid(process, 0)[1] for process in launcher.start(tmp_path / "run", 2, kind)]
    assert [os.waitstatus_to_exitcode(status) for status in statuses] == [1, 1]
    assert (tmp_path / "run" / "error-1").read_text().startswith("2 samples cannot be made, max_bad_samples=1")
    assert (tmp_path / "run" / "error-0").read_text().startswith("another process could not make its evaluation")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2, frozen parts sharded"])
def test_packs_of_one_sample_beside_packs_of_several(launcher: Launcher, tmp_path: Path, kind: str) -> None:
    # Samples of text alone share a pack, those with an image have one each.
    launcher.settings = {"pack_tokens": 26}
    alone = launcher.run(tmp_path / "alone", 1)
    assert launcher.run(tmp_path / "two", 2, kind) == pytest.approx(alone, rel=1e-5)
