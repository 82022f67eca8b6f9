"""SIGTERM saves and ends; what may differ when a run goes on; curves in TensorBoard."""

import copy
import json
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from connectors import build_connector
from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.training import ConversationDataset, TrainConfig, Trainer
from vlm_encoders.training.checkpoints import checkpoints
from vlm_encoders.training.feeding.order import epoch_order
from vlm_encoders.training.stopping import stop_on_sigterm
from vlm_encoders.training.trackers import open_tracker
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import VLMProcessor
from vlm_encoders.vlm.stages import STAGE_1, apply_stage

Make = Callable[..., Trainer]


@pytest.fixture
def make(clip: Encoder, llama: Any, tokenizer: Any, tmp_path: Path) -> Make:
    """Makes a trainer of a fresh copy of the model, on eight samples."""
    records = []
    for index in range(8):
        Image.new("RGB", (28, 28), (30 * index, 200, 90)).save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": "<image> w40"}, {"from": "gpt", "value": f"w{index} w{index % 3}"}]
        records.append({"id": f"s{index}", "image": f"{index}.png", "conversations": turns})
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    torch.manual_seed(5)
    connector = build_connector("mlp", clip.token_spec, 32)
    processor = VLMProcessor(clip, connector, tokenizer)
    model = VisionLanguageModel(clip, connector, llama, image_token_id=processor.image_token_id)

    def build(on_log: Any = None, *, evaluate: bool = False, **settings: Any) -> Trainer:
        known = {"output": str(tmp_path / "out"), "steps": 6, "batch_size": 2, "log_every": 1, "tracker": "none"}
        config = TrainConfig(data=str(data), cpu=True, progress=False, **(known | settings))
        samples = ConversationDataset(data, None, processor)
        fresh = apply_stage(copy.deepcopy(model), STAGE_1)
        return Trainer(fresh, processor, samples, config, eval_dataset=samples if evaluate else None, on_log=on_log)

    return build


def test_sigterm_saves_behind_the_step_under_way_and_the_run_goes_on(make: Make, tmp_path: Path) -> None:
    whole = make(output=str(tmp_path / "whole")).fit()

    def terminate(entry: dict[str, float]) -> None:
        if entry["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    stopped = make(terminate).fit()
    assert signal.getsignal(signal.SIGTERM) is before
    assert (stopped.stopped, stopped.steps, stopped.checkpoint.name) == (True, 3, "step-000003")
    resumed = make().fit(resume=True)
    assert (resumed.stopped, resumed.losses) == (False, whole.losses)


def test_workers_outlive_the_sigterm_that_launchers_send_to_all(make: Make, tmp_path: Path) -> None:
    whole = make(output=str(tmp_path / "whole")).fit()

    def terminate(entry: dict[str, float]) -> None:
        if entry["step"] == 1:
            workers = multiprocessing.active_children()
            assert len(workers) == 2
            for worker in workers:
                # By another process, as a launcher is one.
                subprocess.run(["/bin/kill", "-TERM", str(worker.pid)], check=True)

    assert make(terminate, num_workers=2).fit().losses == whole.losses


def test_evaluation_samples_that_vanish_are_counted_logged_and_capped(make: Make, tmp_path: Path) -> None:
    def lose(entry: dict[str, float]) -> None:
        lost = {1: 1, 2: 3}.get(int(entry["step"]))
        if lost is not None:
            (tmp_path / f"{lost}.png").unlink()

    settings: dict[str, Any] = {"evaluate": True, "eval_every": 2, "on_bad_sample": "skip"}
    capped = make(output=str(tmp_path / "capped"), max_bad_samples=1, steps=1, **settings)
    trainer = make(lose, steps=4, **settings)
    trainer.fit()
    log = [json.loads(line) for line in (Path(trainer.config.output) / "bad_samples.jsonl").read_text().splitlines()]
    found = {(line["key"], line["step"]) for line in log if line["key"].startswith("evaluation")}
    assert found == {("evaluation 1", 2), ("evaluation 3", 4)}
    assert not {1, 3} & set(epoch_order(8, 0, 0)[:2])
    with pytest.raises(VlmError, match="2 samples cannot be made, max_bad_samples=1 may be left out"):
        capped.fit()


def test_what_a_resume_from_an_earlier_checkpoint_replaces_is_dropped(make: Make, tmp_path: Path) -> None:
    make(save_every=1, keep_checkpoints=6).fit()
    output = tmp_path / "out"

    def stop(entry: dict[str, float]) -> None:
        if entry["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(stop, save_every=4, keep_checkpoints=2).fit(resume=output / "step-000003")
    assert [folder.name for folder in checkpoints(output)] == ["step-000003", "step-000004"]
    with pytest.raises(VlmError, match="holds checkpoints up to 'step-000004' of another run than"):
        make().fit(resume=tmp_path / "elsewhere" / "step-000001")


def test_a_second_sigterm_at_once_is_the_same_request() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as request:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert request.asked
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_later_sigterm_is_not_taken_as_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_encoders.training.stopping._SAME_S", 0.0)
    met = []
    before = signal.signal(signal.SIGTERM, lambda *_: met.append("the handler from before"))
    try:
        with stop_on_sigterm() as request:
            assert not request.asked
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.asked
            assert met == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert met == ["the handler from before"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_constant_run_can_be_lengthened_and_a_cosine_one_not(make: Make, tmp_path: Path) -> None:
    whole = make(output=str(tmp_path / "whole"), schedule="constant").fit()
    make(schedule="constant", steps=4).fit()
    longer = make(schedule="constant", steps=6)
    assert longer.fit(resume=True).losses == whole.losses
    assert len({entry["lr_connector"] for entry in _log(Path(longer.config.output))[2:]}) == 1
    cosine = str(tmp_path / "cosine")
    make(output=cosine, steps=4).fit()
    with pytest.raises(VlmError, match=r"took step 3 at .* of the peak learning rate, these settings say .*schedule"):
        make(output=cosine, steps=6).fit(resume=True)


def test_a_stable_run_can_go_on_to_its_fall(make: Make) -> None:
    make(schedule="constant", steps=3).fit()
    longer = make(schedule="wsd", steps=6, decay_ratio=0.5)
    longer.fit(resume=True)
    rates = [entry["lr_connector"] for entry in _log(Path(longer.config.output))]
    assert rates[2] > rates[3] > rates[4] > rates[5] == 0.0


def test_the_same_samples_a_step_may_be_dealt_otherwise(make: Make, tmp_path: Path) -> None:
    whole = make(output=str(tmp_path / "whole"), batch_size=4).fit()
    make(batch_size=4, save_every=2, steps=6).fit()
    two = make(batch_size=2, gradient_accumulation=2).fit(resume=Path(make().config.output) / "step-000004")
    assert two.losses[:4] == whole.losses[:4]
    assert two.losses == pytest.approx(whole.losses, rel=1e-5)
    with pytest.raises(
        VlmError, match=r"made with 4 samples a step on 1 processes, now there are 2 on 1; set batch_size"
    ):
        make(batch_size=2).fit(resume=True)


def test_the_best_model_is_kept_with_its_loss(make: Make) -> None:
    trainer = make(evaluate=True, eval_every=2, learning_rate=1e-2)
    result = trainer.fit()
    assert result.best == Path(trainer.config.output) / "best"
    best = min(result.eval_losses, key=result.eval_losses.__getitem__)
    loaded = VisionLanguageModel.from_pretrained(result.best, encoder=trainer.model.encoder, llm=trainer.model.llm)
    same = all(
        torch.equal(loaded.connector.state_dict()[name], tensor)
        for name, tensor in trainer.model.connector.state_dict().items()
    )
    assert same is (best == 6)
    assert make(output=f"{trainer.config.output}2", evaluate=True, keep_best=False).fit().best is None


def test_curves_are_in_tensorboard_once_also_after_a_resume(make: Make, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def stop(entry: dict[str, float]) -> None:
        if entry["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(stop, save_every=2, tracker="tensorboard").fit()
    result = make(save_every=2, tracker="auto").fit(resume=True)
    curves = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    points = {event.step: event.value for event in curves.Scalars("loss")}
    assert points == {step: pytest.approx(loss, rel=1e-6) for step, loss in enumerate(result.losses, start=1)}
    assert len(curves.Scalars("loss")) == 6
    assert {"grad_norm", "lr_connector", "tokens_per_second", "data_wait"} <= set(curves.Tags()["scalars"])


def test_a_tracker_that_is_not_installed_is_told_before_the_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_encoders.training.trackers.find_spec", lambda _: None)
    trainer = make(tracker="wandb")
    with pytest.raises(VlmError, match=r"tracker 'wandb' is not installed; pip install wandb, or set tracker"):
        trainer.fit()
    assert checkpoints(Path(trainer.config.output)) == []
    with pytest.raises(VlmError, match=r"pip install 'vlm-encoders\[track\]'"):
        make(tracker="tensorboard").fit()
    open_tracker("auto", Path(trainer.config.output), {}, step=0).log(1, {"loss": 1.0})


def _log(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
