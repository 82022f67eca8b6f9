"""The loop on real parts: right gradients, exact resume, nothing moved that was frozen."""

import copy
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from connectors import build_connector
from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.training import ConversationDataset, TrainConfig, Trainer, exact_match, mean_loss
from vlm_encoders.training.progress import write_log
from vlm_encoders.training.step import SummedLoss, take_step
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import VLMProcessor
from vlm_encoders.vlm.stages import STAGE_1, STAGE_2, STAGE_2_LORA, PartPolicy, StagePolicy, apply_stage

Make = Callable[..., Trainer]


class KilledError(Exception):
    """Stands for a killed process."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eleven samples: answers of one to four words, one sample in four without an image."""
    records = []
    for index in range(11):
        Image.new("RGB", (28, 28), (20 * index, 255 - 20 * index, 90)).save(tmp_path / f"{index}.png")
        answer = " ".join(f"w{(index + word) % 9}" for word in range(index % 4 + 1))
        record: dict[str, Any] = {"id": f"s{index}", "image": f"{index}.png"}
        asked = "<image> w40"
        if index % 4 == 3:
            del record["image"]
            asked = "w41 w42 w43"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        records.append(record | {"conversations": turns})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def parts(clip: Encoder, llama: Any, tokenizer: Any) -> tuple[VisionLanguageModel, VLMProcessor]:
    torch.manual_seed(5)
    connector = build_connector("mlp", clip.token_spec, 32)
    processor = VLMProcessor(clip, connector, tokenizer)
    for layer in llama.model.layers:
        # Dropout makes the loss depend on the random state that a resume must put back.
        layer.self_attn.attention_dropout = 0.2
    return VisionLanguageModel(clip, connector, llama, image_token_id=processor.image_token_id), processor


@pytest.fixture
def make(parts: tuple[VisionLanguageModel, VLMProcessor], data: Path, tmp_path: Path) -> Make:
    """Makes a trainer of a fresh copy of the model."""
    model, processor = parts

    def build(stage: StagePolicy = STAGE_1, on_log: Any = None, init: int = 0, **settings: Any) -> Trainer:
        settings = {"output": str(tmp_path / "out"), "steps": 6, "batch_size": 2, "log_every": 1} | settings
        config = TrainConfig(
            data=str(data),
            image_folder=str(data.parent),
            stage=stage.name,
            cpu=True,
            progress=False,
            tracker="none",
            **settings,
        )
        samples = ConversationDataset(data, data.parent, processor)
        torch.manual_seed(init)
        return Trainer(apply_stage(copy.deepcopy(model), stage), processor, samples, config, on_log=on_log)

    return build


def gradients(
    model: VisionLanguageModel, batches: list[dict[str, Any]], limit: float | None = None
) -> dict[str, torch.Tensor]:
    from accelerate import Accelerator

    model = copy.deepcopy(model).eval()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    still = torch.optim.SGD(parameters.values(), lr=0.0)
    accelerator = Accelerator(cpu=True)
    take_step(accelerator, SummedLoss(model), still, iter(batches), accumulation=len(batches), max_grad_norm=limit)
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1, 1], [4, 2], [1, 5], [2, 3, 1]])
def test_accumulated_gradients_are_those_of_one_batch(make: Make, sizes: list[int]) -> None:
    trainer = make(STAGE_2)
    samples = [trainer.dataset[index] for index in range(sum(sizes))]
    collate = trainer.processor.collate
    firsts = [sum(sizes[:turn]) for turn in range(len(sizes))]
    batches = [collate(samples[first : first + size]) for first, size in zip(firsts, sizes, strict=True)]
    one, several = gradients(trainer.model, [collate(samples)]), gradients(trainer.model, batches)
    assert one.keys() == several.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(several[name], gradient, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_mean_over_supervised_tokens(make: Make) -> None:
    trainer = make(steps=1, batch_size=1, gradient_accumulation=11)
    expected = mean_loss(trainer.model, trainer.processor, trainer.dataset, batch_size=11)
    assert trainer.fit().losses == [pytest.approx(expected, abs=1e-5)]


def test_training_learns_and_says_what_moved(make: Make, tmp_path: Path) -> None:
    entries: list[dict[str, float]] = []
    result = make(steps=20, batch_size=11, learning_rate=1e-2, on_log=entries.append, log_every=4).fit()
    assert result.steps == len(result.losses) == 20
    assert result.losses[-1] < result.losses[0] - 0.05
    assert result.moved == {"encoder": False, "connector": True, "llm": False}
    assert result.tokens > 0
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert [entry["step"] for entry in entries] == [*range(4, 21, 4)]
    assert entries[-1]["lr_connector"] < 1e-3 < entries[0]["lr_connector"]
    assert entries == [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]


def test_epochs_are_counted_in_samples(make: Make) -> None:
    result = make(steps=None, epochs=2, batch_size=3, gradient_accumulation=2).fit()
    assert result.steps == math.ceil(2 * 11 / 6)


@pytest.mark.parametrize("stage", [STAGE_1, STAGE_2, STAGE_2_LORA])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(make: Make, tmp_path: Path, stage: StagePolicy) -> None:
    first = make(stage, output=str(tmp_path / "whole"), gradient_accumulation=2)
    whole = first.fit()

    def stop(entry: dict[str, float]) -> None:
        if entry["step"] == 5:
            raise KilledError

    settings = {"save_every": 2, "gradient_accumulation": 2}
    with pytest.raises(KilledError):
        make(stage, on_log=stop, **settings).fit()
    second = make(stage, init=99, num_workers=1, **settings)
    resumed = second.fit(resume=True)
    assert resumed.losses == whole.losses
    assert resumed.tokens == whole.tokens
    weights = second.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in first.model.state_dict().items())
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_resuming_a_finished_run_takes_no_step(make: Make) -> None:
    done = make().fit()
    again = make().fit(resume=done.checkpoint)
    assert again.losses == done.losses
    assert not any(again.moved.values())


def test_a_checkpoint_is_a_model_that_loads(make: Make) -> None:
    trainer = make(save_every=2, keep_checkpoints=2)
    result = trainer.fit()
    output = result.checkpoint.parent
    assert sorted(path.name for path in output.glob("step-*")) == ["step-000004", "step-000006"]
    assert (output / "latest").resolve() == result.checkpoint.resolve()
    loaded = VisionLanguageModel.from_pretrained(
        result.checkpoint, encoder=trainer.model.encoder, llm=trainer.model.llm
    )
    for name, tensor in trainer.model.connector.state_dict().items():
        assert torch.equal(loaded.connector.state_dict()[name], tensor)


@pytest.mark.parametrize("broken", ["weights", "state"])
def test_a_full_disk_leaves_the_last_good_checkpoint(make: Make, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    import safetensors.torch

    place, name = (safetensors.torch, "save_file") if broken == "weights" else (Path, "write_bytes")
    write = getattr(place, name)

    def fill_the_disk(first: Any, second: Any, *rest: Any) -> None:
        if "step-000004" in str(second if broken == "weights" else first):
            raise OSError(28, "No space left on device")
        write(first, second, *rest)

    monkeypatch.setattr(place, name, fill_the_disk)
    whole = make(save_every=2)
    with pytest.raises(VlmError, match=r"step 4 is not saved.*No space left on device.*step-000002', resume"):
        whole.fit()
    monkeypatch.undo()
    output = Path(whole.config.output)
    assert sorted(path.name for path in output.iterdir()) == ["build.txt", "latest", "log.jsonl", "step-000002"]
    assert make(save_every=2).fit(resume=True).steps == 6


@pytest.mark.parametrize(("number", "advice"), [(28, "free some space"), (13, "give another folder")])
def test_an_output_folder_that_cannot_be_written_is_told_before_the_first_step(
    make: Make, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    trainer = make()
    with pytest.raises(VlmError, match=rf"output folder '.*' cannot be written \({os.strerror(number)}\); {advice}"):
        trainer.fit()
    monkeypatch.undo()
    Path(trainer.config.output).rmdir()
    Path(trainer.config.output).write_text("")
    with pytest.raises(VlmError, match=r"cannot be written \(File exists\); give another folder"):
        trainer.fit()


def test_only_a_full_disk_is_told_to_be_freed(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(VlmError, match=r"cannot be written \(Is a directory\); make it writable and resume"):
        write_log(tmp_path / "log.jsonl", {"step": 1})


def test_a_new_run_does_not_write_over_an_old_one(make: Make) -> None:
    make(steps=1).fit()
    with pytest.raises(VlmError, match="holds checkpoints up to 'step-000001' already"):
        make(steps=1).fit()


def test_resume_wants_a_checkpoint_of_this_run(make: Make, tmp_path: Path) -> None:
    with pytest.raises(VlmError, match="holds no checkpoint to resume from"):
        make().fit(resume=True)
    with pytest.raises(VlmError, match="holds no readable training state"):
        make().fit(resume=tmp_path)
    done = make(steps=2).fit().checkpoint
    with pytest.raises(VlmError, match="was made with seed=0, now it is 1"):
        make(steps=2, seed=1).fit(resume=done)
    trainer = make(steps=2)
    trainer.dataset = [trainer.dataset[0]] * 3
    with pytest.raises(VlmError, match="with 11 samples, the dataset has 3"):
        trainer.fit(resume=done)
    trainer = make(steps=2)
    with torch.no_grad():
        next(trainer.model.llm.parameters()).add_(1.0)
    with pytest.raises(VlmError, match="frozen weights of the llm are not those of the checkpoint"):
        trainer.fit(resume=done)


def test_a_frozen_part_that_something_moves_is_caught(make: Make) -> None:
    trainer = make()

    def unfreeze(entry: dict[str, float]) -> None:
        weight = next(trainer.model.encoder.parameters())
        weight.requires_grad_(True)
        weight.data.mul_(1.0001)

    trainer.on_log = unfreeze
    with pytest.raises(
        VlmError, match=r"at step 2 'encoder\..*' of the encoder requires a gradient, but the stage froze it"
    ):
        trainer.fit()


def test_frozen_blocks_of_a_trained_encoder_are_held_too(make: Make) -> None:
    stage = StagePolicy("tail", encoder=PartPolicy("train", lr=1e-3, last_blocks=1))
    assert make(stage).fit().moved == {"encoder": True, "connector": False, "llm": False}
    trainer = make(stage, output=str(Path(make().config.output) / "again"))

    def move(entry: dict[str, float]) -> None:
        next(trainer.model.encoder.blocks()[0].parameters()).data.add_(0.1)

    trainer.on_log = move
    with pytest.raises(
        VlmError, match=r"frozen weights of the encoder had moved, 'encoder\..*': the optimizer does not hold"
    ):
        trainer.fit()


def test_a_trained_part_that_does_not_move_is_caught(make: Make) -> None:
    trainer = make()
    for parameter in trainer.model.connector.parameters():
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(
        VlmError, match="after step 1 the connector, which is to be trained, has a gradient of exactly 0"
    ):
        trainer.fit()


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(make: Make) -> None:
    trainer = make(batch_size=3)
    with torch.no_grad():
        trainer.model.connector.get_parameter(next(name for name, _ in trainer.model.connector.named_parameters()))[
            0
        ] = math.nan
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(VlmError, match=r"step 1, sample \d+ \(id 's\d+'\), .*: the loss is nan; lower learning_rate"):
        trainer.fit()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0))


def test_a_gradient_that_is_not_finite_stops_too(make: Make) -> None:
    trainer = make()
    for parameter in trainer.model.connector.parameters():
        parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        VlmError, match=r"at step 1 the gradient of 'connector\..*' of the connector is not finite.*lower learning_rate"
    ):
        trainer.fit()


def test_gradients_are_clipped_to_their_norm(make: Make) -> None:
    trainer = make()
    samples = [trainer.dataset[index] for index in range(3)]
    batch = trainer.processor.collate(samples)
    whole, clipped = (gradients(trainer.model, [batch], limit) for limit in (None, 0.01))
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in whole.values()))
    assert norm > 0.02
    for name, gradient in whole.items():
        torch.testing.assert_close(clipped[name], gradient * 0.01 / norm, rtol=1e-4, atol=1e-8)


def test_a_batch_without_supervised_tokens_is_named(make: Make) -> None:
    trainer = make()
    messages = [{"role": "user", "content": "w1"}]
    trainer.dataset = [trainer.processor.prompt(messages)] * 4
    with pytest.raises(VlmError, match=r"step 1, sample \d, sample \d: no token of the batch is supervised"):
        trainer.fit()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_sample_that_cannot_be_made_is_told_in_one_line(make: Make, data: Path, num_workers: int) -> None:
    trainer = make(num_workers=num_workers)
    (data.parent / "4.png").write_bytes(b"")
    with pytest.raises(VlmError, match=r"sample 4 \(id 's4'\): .*is empty") as caught:
        trainer.fit()
    assert "\n" not in str(caught.value)


def test_batches_of_text_alone_train_beside_the_others(make: Make, data: Path) -> None:
    trainer = make(steps=11, batch_size=1)
    assert trainer.fit().moved["connector"]


WORKER = """
import json, os, sys
from pathlib import Path
import torch
from connectors.errors import VlmError
from vlm_encoders.training import ConversationDataset, TrainConfig, Trainer
from vlm_encoders.training import run
from vlm_encoders.vlm.stages import STAGE_1, apply_stage

torch.set_num_threads(1)
folder = Path(sys.argv[1])
model, processor = torch.load(folder / "parts.pt", weights_only=False)
config = TrainConfig(**json.loads((folder / "settings.json").read_text()))
dataset = ConversationDataset(config.data, config.image_folder, processor)
trainer = Trainer(apply_stage(model, STAGE_1), processor, dataset, config, eval_dataset=dataset)
whole = trainer.fit()
weights = [parameter.tolist() for parameter in model.connector.parameters()]
resumed = trainer.fit(resume=Path(config.output) / "step-000002")

def full(*args, **options):
    raise VlmError("disk is full")

run.save_checkpoint = full
try:
    trainer.fit(resume=Path(config.output) / "step-000002")
    error = None
except VlmError as caught:
    error = str(caught)
seen = {"losses": whole.losses, "resumed": resumed.losses, "tokens": whole.tokens, "weights": weights, "error": error}
seen |= {"moved": whole.moved, "eval_losses": list(whole.eval_losses.values())}
(folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
"""


def test_two_processes_are_one_with_twice_the_batch(
    make: Make, parts: tuple[VisionLanguageModel, VLMProcessor], tmp_path: Path
) -> None:
    model, processor = parts
    for layer in model.llm.model.layers:
        layer.self_attn.attention_dropout = 0.0
    two = make(batch_size=1, gradient_accumulation=2, save_every=2, keep_checkpoints=9, output=str(tmp_path / "two"))
    (tmp_path / "settings.json").write_text(json.dumps(two.config.to_dict()))
    torch.save((model, processor), tmp_path / "parts.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "ACCELERATE_USE_CPU": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)],
            env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["resumed"] == first["losses"]
    assert "disk is full" in first["error"]
    assert "step 1/6" in errors[0]
    assert "step 1/6" not in errors[1]

    trainer = make(batch_size=2, gradient_accumulation=2)
    trainer.eval_dataset = trainer.dataset
    one = trainer.fit()
    assert first["moved"] == one.moved
    assert first["tokens"] == one.tokens
    assert first["losses"] == pytest.approx(one.losses, abs=1e-5)
    assert first["eval_losses"] == pytest.approx(list(one.eval_losses.values()), abs=1e-5)
    for parameter, values in zip(trainer.model.connector.parameters(), first["weights"], strict=True):
        torch.testing.assert_close(parameter, torch.tensor(values), rtol=0, atol=1e-5)


def test_bfloat16_autocast_keeps_float32_weights(make: Make) -> None:
    trainer = make(mixed_precision="bf16")
    result = trainer.fit()
    assert result.losses != make(output=str(Path(trainer.config.output) / "full")).fit().losses
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_weights_that_train_in_float16_are_refused(make: Make) -> None:
    trainer = make(STAGE_2)
    trainer.model.llm.half()
    with pytest.raises(VlmError, match=r"21 parameters would train in float16, 'llm\..*mixed_precision"):
        trainer.fit()
    frozen = make(STAGE_1)
    frozen.model.llm.half()
    assert frozen.fit().moved["connector"]


def test_settings_that_contradict_the_parts_are_refused(make: Make) -> None:
    trainer = make()
    arguments = (trainer.model, trainer.processor, trainer.dataset)
    settings = trainer.config.to_dict()
    with pytest.raises(VlmError, match="settings say stage 'stage-2', the model has 'stage-1'"):
        Trainer(*arguments, TrainConfig(**settings | {"stage": "stage-2"}))
    with pytest.raises(VlmError, match="max_length=99, the processor has None"):
        Trainer(*arguments, TrainConfig(**settings | {"max_length": 99}))
    with pytest.raises(VlmError, match="the training dataset is empty"):
        Trainer(trainer.model, trainer.processor, [], trainer.config)


def test_the_evaluation_loss_is_measured_and_changes_nothing(make: Make, tmp_path: Path) -> None:
    plain = make(output=str(tmp_path / "plain")).fit()
    trainer = make(eval_every=3, log_every=100)
    trainer.eval_dataset = trainer.dataset
    result = trainer.fit()
    assert list(result.eval_losses) == [3, 6]
    assert result.losses == plain.losses
    assert result.eval_losses[6] == pytest.approx(
        mean_loss(trainer.model, trainer.processor, trainer.dataset), abs=1e-6
    )
    assert trainer.model.training


def test_exact_match_is_right_once_the_model_has_learned(make: Make, data: Path) -> None:
    stage = StagePolicy("all", connector=PartPolicy("train", lr=1e-2), llm=PartPolicy("train", lr=1e-2))
    trainer = make(stage, steps=60, batch_size=11)
    dataset = ConversationDataset(data, data.parent, trainer.processor)
    before = exact_match(trainer.model, trainer.processor, dataset, batch_size=4, max_new_tokens=8)
    trainer.fit()
    after = exact_match(trainer.model, trainer.processor, dataset, batch_size=4, max_new_tokens=8)
    alone = exact_match(trainer.model, trainer.processor, dataset, batch_size=1, max_new_tokens=8)
    assert before.accuracy < 0.3
    assert after.accuracy > 0.7
    assert after == alone
    assert after.predictions[2][:3] == ("s2", "w40", "w2 w3 w4")
    right = sum(prediction.answer == prediction.expected for prediction in after.predictions)
    assert after.accuracy == right / 11


def test_lines_and_bar_show_loss_speed_and_time_left(
    make: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make(steps=2).fit()
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0].startswith("step 1/2  loss ")
    assert "tokens/s" in lines[0]
    assert any(line.startswith("step 2/2") and line.endswith("0:00:00 left") for line in lines)
    trainer = make(steps=2, output=str(tmp_path / "bar"))
    object.__setattr__(trainer.config, "progress", True)
    trainer.fit()
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "loss" in shown
    assert "tokens/s" in shown
