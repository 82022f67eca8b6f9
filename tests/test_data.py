"""LLaVA conversation files: every problem is found before training, and named."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from connectors import MLP
from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.training.feeding.check import check_data
from vlm_encoders.training.feeding.data import ConversationDataset
from vlm_encoders.training.feeding.order import SeededBatches, epoch_order
from vlm_encoders.training.feeding.records import read_records
from vlm_encoders.vlm.processor import VLMProcessor

ASK = {"from": "human", "value": "<image>\nw1 w2"}
SAY = {"from": "gpt", "value": "w3"}


def record(*turns: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"id": "a", "image": "one.png", "conversations": list(turns or (ASK, SAY)), **fields}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("one.png", "two.png"):
        Image.new("RGB", (28, 28), "red").save(tmp_path / name)
    return tmp_path


def written(folder: Path, records: Any) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def processor(clip: Encoder, tokenizer: Any) -> VLMProcessor:
    return VLMProcessor(clip, MLP(32, 32), tokenizer)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ("text", "is a str, not an object"),
        ({"id": "a", "image": "one.png"}, "lacks 'conversations', a list of turns; its keys are id, image"),
        (record() | {"conversations": []}, "has no turn in 'conversations'; give a question and an answer"),
        (record({"from": "human"}, SAY), "turn 1 lacks 'from' or 'value'"),
        (record(ASK, {"from": "gpt", "value": 3}), "turn 2 lacks 'from' or 'value'"),
        (record({"from": "user", "value": "<image>"}, SAY), "turn 1 has unknown role 'user'; use system, human, gpt"),
        (record(ASK, ASK, SAY), "turn 2 is from 'human', expected 'gpt'"),
        (record(SAY), "turn 1 is from 'gpt', expected 'human'"),
        (record(ASK, SAY, {"from": "system", "value": ""}), "turn 3 is from 'system', expected 'human'"),
        (record(ASK), "ends with a turn from 'human'"),
        (record(image=None), "has 1 <image> placeholders and 0 images"),
        (record(image=["one.png", "two.png"]), "has 1 <image> placeholders and 2 images"),
        (record({"from": "human", "value": "w1"}, SAY), "has 0 <image> placeholders and 1 images"),
        (record({"from": "human", "value": "<image> <image>"}, SAY), "has 2 <image> placeholders and 1 images"),
        (record({"from": "human", "value": "w1"}, {"from": "gpt", "value": "<image>"}), "in a turn from 'gpt'"),
        (record(image=3), "'image' must be a path or a list of paths, got 3"),
        (record(image="three.png"), "three.png is missing; check image_folder"),
    ],
)
def test_each_problem_is_named(folder: Path, bad: Any, sentence: str) -> None:
    report = check_data(written(folder, [record(), bad]), folder)
    assert report.problems
    assert {problem.index for problem in report.problems} == {1}
    assert any(sentence in problem.text for problem in report.problems)
    with pytest.raises(VlmError, match=r"data\.json, sample 1"):
        report.raise_on_problems()


def test_the_whole_file_is_checked_before_training(folder: Path, processor: VLMProcessor) -> None:
    good, bad = record(), record(image="gone.png", id="bad")
    path = written(folder, [good, bad, good, record(ASK), bad])
    with pytest.raises(VlmError) as caught:
        ConversationDataset(path, folder, processor)
    message = str(caught.value)
    assert message.startswith(f"{path}, sample 1 (id 'bad'): image file {folder / 'gone.png'} is missing")
    assert "2 more of 5 samples have problems" in message


def test_a_good_file_is_counted(folder: Path) -> None:
    system = {"from": "system", "value": "w9"}
    text = record({"from": "human", "value": "w1"}, SAY, {"from": "human", "value": "w2"}, SAY)
    del text["image"]
    many = record(system, {"from": "human", "value": "<image> <image>"}, SAY, image=["one.png", "two.png"])
    report = check_data(written(folder, [record(), text, many]), folder)
    assert report.problems == ()
    assert (report.samples, report.images, report.distinct_images, report.text_only, report.answers) == (3, 3, 2, 1, 4)


def test_json_lines_are_read_as_a_list_is(folder: Path) -> None:
    records = [record(), record(id=7)]
    lines = folder / "data.jsonl"
    lines.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    assert read_records(lines) == read_records(written(folder, records)) == records


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[{"id": 1},\n {"id" 2}]', "line 2, column 8 is not JSON"),
        ('{"id": 1}\n{"id" 2}\n', "line 2 is not JSON"),
        ("[]", "holds no samples"),
        ("", "holds no samples"),
    ],
)
def test_a_broken_file_is_told(folder: Path, text: str, sentence: str) -> None:
    path = folder / "broken.json"
    path.write_text(text)
    with pytest.raises(VlmError, match=sentence):
        read_records(path)


def test_a_missing_file_is_told(folder: Path) -> None:
    with pytest.raises(VlmError, match=r"none\.json: cannot be read"):
        read_records(folder / "none.json")


def test_samples_hold_the_image_and_supervise_answers(folder: Path, processor: VLMProcessor) -> None:
    dataset = ConversationDataset(written(folder, [record(), record(image="two.png", id="b")]), folder, processor)
    sample = dataset[1]
    assert len(dataset) == 2
    assert dataset.name(1) == "sample 1 (id 'b')"
    assert sample.input_ids.count(processor.image_token_id) == 16
    assert sample.pixel_values is not None
    assert sample.pixel_values.shape == (1, 3, 28, 28)
    learned = [label for label in sample.labels if label != -100]
    assert processor.tokenizer.decode(learned) == "w3 </s>"


def test_llava_placeholders_become_the_image_token_of_the_processor(
    folder: Path, processor: VLMProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ConversationDataset(written(folder, [record()]), folder, processor)
    monkeypatch.setattr(processor, "image_token", "<|picture|>")
    assert dataset.messages(0)[0] == {"role": "user", "content": "<|picture|>\nw1 w2"}


def test_a_sample_that_is_too_long_is_named(folder: Path, clip: Encoder, tokenizer: Any) -> None:
    short = VLMProcessor(clip, MLP(32, 32), tokenizer, max_length=10)
    dataset = ConversationDataset(written(folder, [record()]), folder, short)
    with pytest.raises(VlmError, match=r"data\.json, sample 0 \(id 'a'\): .*tokens long"):
        dataset[0]


def test_a_broken_picture_is_named(folder: Path, processor: VLMProcessor) -> None:
    (folder / "broken.png").write_bytes((folder / "one.png").read_bytes()[:40])
    dataset = ConversationDataset(written(folder, [record(image="broken.png")]), folder, processor)
    with pytest.raises(VlmError, match=r"sample 0 \(id 'a'\): .*broken\.png"):
        dataset[0]


def test_checking_opens_no_picture_and_imports_no_torch(folder: Path) -> None:
    (folder / "one.png").write_bytes(b"no picture")
    path = written(folder, [record()])
    code = (
        "import sys; from vlm_encoders.training import check_data, TrainConfig; "
        f"report = check_data({str(path)!r}, {str(folder)!r}); "
        "assert not report.problems; print([m for m in ('torch', 'PIL', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@given(
    length=st.integers(1, 40),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    steps=st.integers(1, 12),
    start=st.integers(0, 12),
    seed=st.integers(0, 3),
    world=st.integers(1, 3),
)
def test_the_order_is_one_stream_however_it_is_split(
    length: int, batch_size: int, accumulation: int, steps: int, start: int, seed: int, world: int
) -> None:
    def batches(rank: int, first: int) -> list[list[int]]:
        order = SeededBatches(
            length,
            batch_size=batch_size,
            accumulation=accumulation,
            steps=steps,
            seed=seed,
            start=first,
            rank=rank,
            world=world,
        )
        assert len(order) == len(list(order))
        return list(order)

    ranks = [batches(rank, 0) for rank in range(world)]
    stream = [index for turn in zip(*ranks, strict=True) for batch in turn for index in batch]
    epochs = len(stream) // length + 1
    expected = [index for epoch in range(epochs) for index in epoch_order(length, seed, epoch)]
    assert stream == expected[: len(stream)]
    assert batches(0, start) == ranks[0][start * accumulation :]


def test_epochs_and_seeds_give_other_orders() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(VlmError, match="the dataset is empty"):
        SeededBatches(0, batch_size=1, accumulation=1, steps=1, seed=0)
