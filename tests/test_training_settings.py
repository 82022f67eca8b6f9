"""Every setting of the loop through a whole run: what it promises, and that a resume is exact under it."""

import copy
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from connectors import build_connector
from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.training import TrainConfig, Trainer, TrainResult
from vlm_encoders.training.feeding.stream import open_dataset
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import VLMProcessor
from vlm_encoders.vlm.stages import STAGES, apply_stage

Fit = Callable[..., TrainResult]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve samples of unequal length, every fourth without an image."""
    records = []
    for index in range(12):
        Image.new("RGB", (28, 28), (20 * index, 255 - 20 * index, 90)).save(tmp_path / f"{index:02}.png")
        record: dict[str, Any] = {"id": f"s{index}", "image": f"{index:02}.png"}
        asked = "<image> " + " ".join(["w40"] * (1 + 5 * (index % 3)))
        if index % 4 == 3:
            del record["image"]
            asked = "w41 w42 w43"
        answer = " ".join(f"w{(index + word) % 9}" for word in range(index % 4 + 1))
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        records.append(record | {"conversations": turns})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def shards(data: Path) -> str:
    """The samples with an image as two tar shards."""
    records = [record for record in json.loads(data.read_text()) if "image" in record]
    for number in range(2):
        with tarfile.open(data.parent / f"shard-{number}.tar", "w") as shard:
            for record in records[number::2]:
                picture = record.pop("image")
                side = data.parent / f"{record['id']}.json"
                side.write_text(json.dumps(record))
                shard.add(data.parent / picture, f"{record['id']}.png")
                shard.add(side, f"{record['id']}.json")
    return str(data.parent / "shard-*.tar")


@pytest.fixture
def fit(clip: Encoder, llama: Any, tokenizer: Any, data: Path, tmp_path: Path) -> Fit:
    """Runs six steps of a fresh copy of the model, or stops behind a step as a kill would."""
    torch.manual_seed(5)
    connector = build_connector("mlp", clip.token_spec, 32)
    processor = VLMProcessor(clip, connector, tokenizer)
    model = VisionLanguageModel(clip, connector, llama, image_token_id=processor.image_token_id)

    def run(name: str, *, stop: int = 0, resume: bool = False, half: bool = False, **settings: Any) -> TrainResult:
        known = {"data": str(data), "steps": 6, "batch_size": 4, "log_every": 1, "save_every": 2, "tracker": "none"}
        config = TrainConfig(output=str(tmp_path / name), cpu=True, progress=False, **(known | settings))
        fresh = copy.deepcopy(model)
        if half:
            fresh.llm.to(torch.bfloat16)
        samples = open_dataset(config.data, None, processor, check=config.on_bad_sample == "error")

        def interrupt(entry: dict[str, float]) -> None:
            if entry["step"] == stop:
                raise KeyboardInterrupt

        # Adapters are drawn when the stage is applied; a resume must not depend on how.
        torch.manual_seed(99 if resume else 3)
        trained = apply_stage(fresh, STAGES[config.stage])
        return Trainer(trained, processor, samples, config, on_log=interrupt).fit(resume=resume)

    return run


SETTINGS: dict[str, dict[str, Any]] = {
    "packed": {"pack_tokens": 60, "batch_size": 2, "stage": "stage-2"},
    "grouped": {"group_by_length": True},
    "recomputed": {"gradient_checkpointing": True, "stage": "stage-2"},
    "in bfloat16": {"mixed_precision": "bf16", "stage": "stage-2", "half": True},
    "from kept tokens": {"token_cache": "CACHE"},
    "loaded by workers": {"num_workers": 2},
    "stable, then falling": {"schedule": "wsd", "gradient_accumulation": 2},
    "adapters": {"stage": "stage-2-lora"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_is_the_uninterrupted_one_under_every_setting(fit: Fit, tmp_path: Path, name: str) -> None:
    settings = {key: str(tmp_path / "cache") if value == "CACHE" else value for key, value in SETTINGS[name].items()}
    whole = fit("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        fit("killed", stop=5, **settings)
    resumed = fit("killed", resume=True, **settings)
    assert resumed.losses == whole.losses
    assert whole.moved["connector"]


def test_settings_that_change_no_number_change_no_number(fit: Fit, tmp_path: Path) -> None:
    plain = fit("plain").losses
    assert fit("recomputed", gradient_checkpointing=True).losses == plain
    assert fit("workers", num_workers=2).losses == plain
    cached = fit("cached", token_cache=str(tmp_path / "cache")).losses
    assert cached == pytest.approx(plain, rel=1e-6)
    assert fit("cached again", token_cache=str(tmp_path / "cache")).losses == cached


def test_a_packed_step_has_the_loss_of_a_padded_one(fit: Fit) -> None:
    settings = {"batch_size": 12, "steps": 1}
    padded = fit("padded", **settings).losses
    # One pack holds all twelve samples.
    packed = fit("packed", **(settings | {"batch_size": 1, "pack_tokens": 10_000})).losses
    assert packed == pytest.approx(padded, rel=1e-6)


def test_a_run_in_bfloat16_follows_the_one_in_float32(fit: Fit) -> None:
    exact = fit("float32", stage="stage-2", learning_rate=1e-3).losses
    rounded = fit("bfloat16", stage="stage-2", learning_rate=1e-3, mixed_precision="bf16", half=True).losses
    # 8 bits of every product: 0.4 % of the loss.
    assert rounded == pytest.approx(exact, rel=4e-3)
    with pytest.raises(VlmError, match=r'parameters would train in bfloat16.*set mixed_precision = "bf16"'):
        fit("refused", stage="stage-2", half=True)


def test_a_stream_is_gone_on_with_where_it_was(fit: Fit, shards: str) -> None:
    settings = {"data": shards, "shuffle_buffer": 3, "batch_size": 2}
    whole = fit("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        fit("killed", stop=5, **settings)
    assert fit("killed", resume=True, **settings).losses == whole.losses
    with pytest.raises(VlmError, match="a stream has no length, so epochs cannot be counted; set steps"):
        fit("epochs", **(settings | {"steps": None, "epochs": 1}))


def test_bad_samples_stop_a_run_or_are_left_out_and_counted(fit: Fit, data: Path) -> None:
    (data.parent / "02.png").write_bytes(b"no picture")
    (data.parent / "05.png").unlink()
    with pytest.raises(VlmError, match=r"sample 5 \(id 's5'\).*is missing"):
        fit("stopped", num_workers=1)
    result = fit("skipped", on_bad_sample="skip")
    assert result.skipped == 2
    log = [json.loads(line) for line in (data.parent / "skipped" / "bad_samples.jsonl").read_text().splitlines()]
    assert {entry["id"] for entry in log} == {"s2", "s5"}
    with pytest.raises(VlmError, match="max_bad_samples"):
        fit("capped", on_bad_sample="skip", max_bad_samples=1)
