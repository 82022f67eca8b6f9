"""What the loop draws from: the right samples in order from any place on, and what cannot be made left out."""

import copy
import io
import itertools
import json
import multiprocessing
import os
import signal
import tarfile
import threading
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from connectors import MLP, build_connector
from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.training.config import TrainConfig
from vlm_encoders.training.feeding.ahead import read_ahead
from vlm_encoders.training.feeding.batches import iterate_batches
from vlm_encoders.training.feeding.data import ConversationDataset
from vlm_encoders.training.feeding.feed import Feed, make_feed
from vlm_encoders.training.feeding.order import SeededBatches
from vlm_encoders.training.feeding.skipped import BadSample, BadSamples, is_system_failure
from vlm_encoders.training.feeding.sources.tars import TarPart
from vlm_encoders.training.feeding.stream import ConversationStream
from vlm_encoders.training.trainer import Trainer
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import Sample, VLMProcessor
from vlm_encoders.vlm.stages import STAGE_1, apply_stage

CPU = torch.device("cpu")
COUNT = 21


def turns(number: int) -> list[dict[str, str]]:
    """Answers of one to four words; every fourth sample is text alone."""
    asked = f"w{number}" if number % 4 == 3 else f"<image> w{number}"
    answer = " ".join(f"w{(number + word) % 40}" for word in range(number % 4 + 1))
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]


def picture(number: int) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (28, 28), (12 * number, 255 - 12 * number, 90)).save(target, "PNG")
    return target.getvalue()


@pytest.fixture
def processor(clip: Encoder, tokenizer: Any) -> VLMProcessor:
    return VLMProcessor(clip, MLP(32, 32), tokenizer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The samples as a list, and as three tar shards."""
    records = []
    for number in range(COUNT):
        record: dict[str, Any] = {"id": f"s{number}", "conversations": turns(number)}
        if number % 4 != 3:
            record["image"] = f"{number}.png"
            (tmp_path / f"{number}.png").write_bytes(picture(number))
        records.append(record)
    (tmp_path / "data.json").write_text(json.dumps(records))
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for number in range(shard * COUNT // 3, (shard + 1) * COUNT // 3):
                add(archive, f"{number:03}.json", json.dumps({"conversations": turns(number)}).encode())
                if number % 4 != 3:
                    add(archive, f"{number:03}.png", picture(number))
    return tmp_path


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def settings(folder: Path, **given: Any) -> TrainConfig:
    values = {"steps": 20, "batch_size": 2, "shuffle_buffer": 4, "seed": 3, "data": "x"}
    return TrainConfig(output=str(folder / "out"), **values | given)


def feed_of(
    data: Any, config: TrainConfig, *, start: int = 0, state: Any = None, rank: int = 0, world: int = 1
) -> Feed:
    order = None
    if not isinstance(data, ConversationStream):
        order = SeededBatches(
            len(data),
            batch_size=config.batch_size,
            accumulation=config.gradient_accumulation,
            steps=config.steps or 0,
            seed=config.seed,
            start=start,
            rank=rank,
            world=world,
        )
    processor = data.processor
    return make_feed(
        data, processor, config, rank=rank, world=world, device=CPU, start_step=start, state=state, order=order
    )


def stream_of(folder: Path, processor: VLMProcessor, name: str = "*.tar") -> ConversationStream:
    return ConversationStream(folder / name, None, processor)


def assert_same(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert (mine is None) == (theirs is None)
        for key in mine or ():
            if isinstance(mine[key], torch.Tensor):
                assert torch.equal(mine[key], theirs[key]), key
            else:
                assert mine[key] == theirs[key], key


def spoil(folder: Path, *numbers: int) -> None:
    for number in numbers:
        (folder / f"{number}.png").write_bytes(picture(number)[:40])


@pytest.mark.parametrize("workers", [0, 2])
def test_data_by_index_gives_the_batches_of_the_order(folder: Path, processor: VLMProcessor, workers: int) -> None:
    data = ConversationDataset(folder / "data.json", None, processor)
    config = settings(folder, gradient_accumulation=2, num_workers=workers, steps=4)
    with feed_of(data, config, start=1) as feed:
        batches = [next(feed) for _ in range(2)]
        order = SeededBatches(COUNT, batch_size=2, accumulation=2, steps=4, seed=3)
        wanted = [order.step_batches(step) for step in range(4)]
        named = ", ".join(data.name(index) for indices in wanted[1] for index in indices)
        assert feed.last_names() == feed.names(1) == named
        batches.append(next(feed))
        assert feed.last_names() == ", ".join(data.name(index) for index in wanted[2][0])
        batches += list(feed)
        assert len(batches) == 6
        assert_same(
            batches, [processor.collate([data[index] for index in each]) for step in wanted[1:] for each in step]
        )
        assert feed.waited > 0
        assert feed.skipped == 0
        assert feed.state() == {"skipped": [], "place": None}
    assert list(feed) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_packs_by_index_are_one_row(folder: Path, processor: VLMProcessor, workers: int) -> None:
    data = ConversationDataset(folder / "data.json", None, processor)
    with feed_of(data, settings(folder, pack_tokens=99, num_workers=workers, steps=1)) as feed:
        (batch,) = list(feed)
        indices = SeededBatches(COUNT, **ORDER).step_batches(0)[0]
        assert_same([batch], [processor.collate([data[index] for index in indices], packed=True)])
        assert batch is not None
        assert len(batch["lengths"]) == 2


def test_many_names_are_cut_short(folder: Path, processor: VLMProcessor) -> None:
    feed = feed_of(ConversationDataset(folder / "data.json", None, processor), settings(folder, batch_size=10))
    next(feed)
    assert feed.last_names().count("sample") == 8
    assert feed.last_names().endswith(" and 2 more")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_pass_over_a_stream_gives_each_sample_once(folder: Path, processor: VLMProcessor, world: int) -> None:
    stream = stream_of(folder, processor)
    epochs: list[list[str]] = [[], [], []]
    for rank in range(world):
        for draw in stream.draws(seed=0, buffer=5, rank=rank, world=world):
            if draw.after.epoch == 3:
                break
            epochs[draw.after.epoch].append(draw.name)
    assert all(sorted(each) == sorted(name for name, _ in stream.source.rows()) for each in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[2])


def test_a_buffer_of_one_keeps_the_order_and_a_larger_one_mixes(folder: Path, processor: VLMProcessor) -> None:
    stream = stream_of(folder, processor, "0.tar")
    orders = {
        buffer: [draw.name[-3:] for draw in islice(stream.draws(seed=1, buffer=buffer), 7)] for buffer in (1, 3, 99)
    }
    assert orders[1] == [f"{number:03}" for number in range(7)] == sorted(orders[3]) == sorted(orders[99])
    assert len({tuple(order) for order in orders.values()}) == 3
    # With room for three, the first to come is any of the first three.
    firsts = {next(stream.draws(seed=seed, buffer=3)).name[-3:] for seed in range(20)}
    assert firsts == {"000", "001", "002"}


@pytest.mark.parametrize("pack", [None, 60])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_from_any_step_to_the_bit(
    folder: Path, processor: VLMProcessor, workers: int, world: int, pack: int | None
) -> None:
    stream = stream_of(folder, processor)
    config = settings(folder, gradient_accumulation=2, num_workers=workers, pack_tokens=pack, steps=12)
    for rank in range(world):
        batches, states, names = [], [], []
        with feed_of(stream, config, rank=rank, world=world) as whole:
            for _ in range(12):
                states.append(json.loads(json.dumps(whole.state())))
                batches += [next(whole), next(whole)]
                names.append(whole.last_names())
        ends = [(state["place"]["epoch"], state["place"]["drawn"]) for state in states]
        assert ends == sorted(set(ends))
        assert ends[-1][0] >= 1
        # A resume on another number of workers too.
        for step, other in ((1, 2 - workers), (5, workers), (11, workers)):
            resumed = settings(folder, gradient_accumulation=2, num_workers=other, pack_tokens=pack, steps=12)
            with feed_of(stream, resumed, start=step, state=states[step], rank=rank, world=world) as feed:
                assert feed.state() == states[step]
                assert_same([next(feed) for _ in range(4)][:2], batches[2 * step : 2 * step + 2])
                if step + 2 < len(states):
                    assert feed.state() == states[step + 2]
                    assert feed.last_names() == names[step + 1]


def test_what_workers_made_ahead_is_not_counted_as_drawn(folder: Path, processor: VLMProcessor) -> None:
    stream = stream_of(folder, processor)
    drawn = 0
    real = stream.draws

    def counted(**options: Any) -> Any:
        nonlocal drawn
        for draw in real(**options):
            drawn += 1
            yield draw

    stream.draws = counted  # type: ignore[method-assign]
    with feed_of(stream, settings(folder, num_workers=2)) as feed:
        assert drawn == 0
        next(feed)
        assert drawn >= 8
        assert feed.state()["place"] == {"epoch": 0, "drawn": 2, "world": 1}
        assert multiprocessing.active_children()
    assert not multiprocessing.active_children()
    assert not any(thread.name == "read-ahead" for thread in threading.enumerate())
    assert list(feed) == []


def test_what_a_resume_passes_over_is_not_decoded(
    folder: Path, processor: VLMProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = stream_of(folder, processor)
    made: list[Any] = []
    real = processor.sample
    monkeypatch.setattr(processor, "sample", lambda *given: made.append(given) or real(*given))
    feed = feed_of(stream, settings(folder), start=7, state={"place": {"epoch": 0, "drawn": 14, "world": 1}})
    next(feed)
    assert len(made) == 2


def test_a_source_is_read_ahead_in_order_and_no_further_than_asked() -> None:
    read: list[int] = []

    def source() -> Iterator[int]:
        for number in range(100):
            if number == 50:
                raise VlmError("the line went dead")
            read.append(number)
            yield number

    ahead = read_ahead(source(), 3)
    assert not read
    assert list(islice(ahead, 40)) == list(range(40))
    # Three wait, and one more waits to be taken.
    assert 40 <= len(read) <= 44
    rest = []
    with pytest.raises(VlmError, match="went dead"):
        rest.extend(ahead)
    assert list(read_ahead(iter(range(5)), 2)) == list(range(5))


def test_the_thread_of_a_source_ends_with_its_reader() -> None:
    ahead = read_ahead(itertools.count(), 2)
    assert next(ahead) == 0
    assert any(thread.name == "read-ahead" for thread in threading.enumerate())
    ahead.close()
    assert not any(thread.name == "read-ahead" for thread in threading.enumerate())


def test_packs_of_a_stream_are_filled_in_its_order(folder: Path, processor: VLMProcessor) -> None:
    stream = stream_of(folder, processor)
    lengths = {draw.name: len(stream.make(draw).input_ids) for draw in islice(stream.draws(seed=3, buffer=4), COUNT)}
    order = list(lengths.values()) * 2
    assert max(order) < 60 < sum(order[:3])
    feed = feed_of(stream, settings(folder, pack_tokens=60))
    seen: list[int] = []
    for _ in range(4):
        batch = next(feed)
        assert batch is not None
        mine = [int(length) for length in batch["lengths"]]
        assert batch["input_ids"].shape == (1, sum(mine))
        packs, left = 0, 0
        for length in mine:
            packs, left = (packs, left) if length <= left else (packs + 1, 60)
            left -= length
        assert packs == 2
        seen += mine
        # The next one would not have fitted.
        assert len(seen) >= COUNT or order[len(seen)] > left
    assert seen[:COUNT] == order[: len(seen)][:COUNT]


def test_a_sample_longer_than_a_pack_has_one_of_its_own(folder: Path, processor: VLMProcessor) -> None:
    feed = feed_of(stream_of(folder, processor), settings(folder, pack_tokens=5, batch_size=1))
    assert [len(batch["lengths"]) for batch in islice(feed, 8) if batch is not None] == [1] * 8


@pytest.mark.parametrize(
    ("given", "arguments", "sentence"),
    [
        ({"steps": None}, {}, "a stream has no length from which epochs are counted; set steps"),
        ({"group_by_length": True}, {}, "group_by_length sorts samples by index, and a stream has none"),
        ({}, {"start": 2}, "the checkpoint of step 2 has no place in a stream"),
        (
            {},
            {"start": 2, "state": {"place": {"epoch": 0, "drawn": 4, "world": 2}}},
            "shared by 2 processes, now there are 1",
        ),
    ],
)
def test_what_does_not_go_with_a_stream_is_refused(
    folder: Path, processor: VLMProcessor, given: dict[str, Any], arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(VlmError, match=sentence):
        feed_of(stream_of(folder, processor), settings(folder, **given), **arguments)


def test_more_processes_than_samples_are_told(folder: Path, processor: VLMProcessor) -> None:
    feed = feed_of(stream_of(folder, processor, "0.tar"), settings(folder), rank=8, world=9)
    with pytest.raises(VlmError, match="has no sample for process 8 of 9"):
        next(feed)


def test_data_by_index_needs_an_order(folder: Path, processor: VLMProcessor) -> None:
    data = ConversationDataset(folder / "data.json", None, processor)
    with pytest.raises(VlmError, match="need an order, none came"):
        make_feed(data, processor, settings(folder), rank=0, world=1, device=CPU, start_step=0)


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out/bad_samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["index", "stream"])
def test_the_first_bad_sample_stops_a_run_in_one_line(
    folder: Path, processor: VLMProcessor, workers: int, kind: str
) -> None:
    data: Any = ConversationDataset(folder / "data.json", None, processor)
    if kind == "stream":
        with tarfile.open(folder / "0.tar", "w") as archive:
            add(archive, "000.json", json.dumps({"conversations": turns(0)}).encode())
            add(archive, "000.png", b"no picture")
        data = stream_of(folder, processor)
    spoil(folder, 0)
    with feed_of(data, settings(folder, num_workers=workers)) as feed:
        named = r"data\.json, sample 0 \(id 's0'\): .*0\.png|0\.tar/000: .*000\.png"
        with pytest.raises(VlmError, match=named) as caught:
            list(islice(feed, 11))
        assert "\n" not in str(caught.value)
        assert "Traceback" not in str(caught.value)
    assert not (folder / "out/bad_samples.jsonl").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_counted_and_logged(folder: Path, processor: VLMProcessor, workers: int) -> None:
    records = json.loads((folder / "data.json").read_text())
    records[4]["conversations"][0]["value"] = "<image> <image>"
    records[7]["conversations"][1]["value"] = " ".join(["w1"] * 90)
    records[8] = {"question": "w1"}
    (folder / "data.json").write_text(json.dumps(records))
    spoil(folder, 0)
    (folder / "12.png").unlink()
    processor.max_length = 80
    data = ConversationDataset(folder / "data.json", None, processor, check=False)
    config = settings(folder, on_bad_sample="skip", num_workers=workers, steps=21)
    bad = {0, 4, 7, 8, 12}
    with feed_of(data, config) as feed:
        batches = list(feed)
        order = [batch for step in range(21) for batch in SeededBatches(21, **ORDER).step_batches(step)]
        kept = [[index for index in batch if index not in bad] for batch in order]
        assert_same(batches, [processor.collate([data[index] for index in each]) if each else None for each in kept])
        # Two passes, in which each was met twice.
        assert feed.skipped == 5
        assert sorted(map(int, feed.state()["skipped"])) == sorted(bad)
    lines = logged(folder)
    assert sorted((int(line["key"]), line["id"]) for line in lines) == sorted(
        (index, "8" if index == 8 else f"s{index}") for index in bad
    )
    for line in lines:
        index = int(line["key"])
        assert index in order[line["step"] - 1]
        assert line["rank"] == 0
        assert line["sentence"].startswith(f"{folder / 'data.json'}, {data.name(index)}: ")
    told = {int(line["key"]): line["sentence"] for line in lines}
    assert "0.png" in told[0]
    assert "2 <image> placeholders and 1 images" in told[4]
    assert "tokens long" in told[7]
    assert "its keys are question" in told[8]
    assert "12.png' is missing" in told[12]


ORDER = {"batch_size": 2, "accumulation": 1, "steps": 21, "seed": 3}


def test_a_batch_of_bad_samples_alone_is_none(folder: Path, processor: VLMProcessor) -> None:
    data = ConversationDataset(folder / "data.json", None, processor)
    first = SeededBatches(COUNT, **ORDER).step_batches(0)[0]
    records = json.loads((folder / "data.json").read_text())
    for index in first:
        records[index]["conversations"] = []
    (folder / "data.json").write_text(json.dumps(records))
    data = ConversationDataset(folder / "data.json", None, processor, check=False)
    feed = feed_of(data, settings(folder, on_bad_sample="skip"))
    assert next(feed) is None
    assert next(feed) is not None
    assert feed.skipped == len(first) == 2


def test_a_resumed_run_counts_no_bad_sample_twice(folder: Path, processor: VLMProcessor) -> None:
    bad = [0, 1, 5, 8, 10]
    spoil(folder, *bad)
    data = ConversationDataset(folder / "data.json", None, processor)
    config = settings(folder, on_bad_sample="skip", num_workers=2, steps=21)
    with feed_of(data, config) as feed:
        for _ in range(4):
            next(feed)
        state = json.loads(json.dumps(feed.state()))
        for _ in range(5):
            next(feed)
        further = feed.skipped
    assert 0 < len(state["skipped"]) < further
    for _ in range(2):
        # Killed after step 9, resumed from step 4: what it logged meanwhile is met, and logged, again.
        with feed_of(data, config, start=4, state=state) as again:
            assert again.skipped == len(logged(folder)) == len(state["skipped"])
            rest = list(again)
            assert again.skipped == 5
        assert sorted(int(line["key"]) for line in logged(folder)) == bad
    with feed_of(data, settings(folder, on_bad_sample="skip", steps=21)) as whole:
        assert not (folder / "out/bad_samples.jsonl").read_text()
        assert_same(list(whole)[4:], rest)


def test_too_many_bad_samples_stop_the_run(folder: Path, processor: VLMProcessor) -> None:
    spoil(folder, 0, 1, 2)
    data = ConversationDataset(folder / "data.json", None, processor)
    feed = feed_of(data, settings(folder, on_bad_sample="skip", max_bad_samples=2))
    sentence = (
        r"3 samples cannot be made, max_bad_samples=2 may be left out; the last: .*sample \d .*bad_samples\.jsonl"
    )
    with pytest.raises(VlmError, match=sentence):
        list(feed)
    assert len(logged(folder)) == 3
    other = feed_of(data, settings(folder, on_bad_sample="skip", max_bad_samples=3))
    list(other)
    assert other.skipped == 3


def test_the_cap_is_on_the_samples_of_all_processes(folder: Path) -> None:
    ranks = [BadSamples(folder, policy="skip", limit=3, rank=rank) for rank in range(2)]
    samples = [BadSample(str(number), f"s{number}", f"sample {number} is bad") for number in range(4)]
    ranks[0].take(samples[:2], 1)
    # Met by both in different passes, it is one.
    ranks[1].take([samples[0], samples[2]], 4)
    assert [len(rank.known) for rank in ranks] == [2, 2]
    with pytest.raises(VlmError, match="4 samples cannot be made"):
        ranks[1].take([samples[3]], 5)


def test_bad_samples_of_a_stream_are_left_out_and_its_place_goes_on(folder: Path, processor: VLMProcessor) -> None:
    with tarfile.open(folder / "1.tar", "w") as archive:
        for number in range(7):
            add(archive, f"{number}.json", b'{"conversations": 3}')
    stream = stream_of(folder, processor)
    for pack in (None, 60):
        config = settings(folder, on_bad_sample="skip", pack_tokens=pack, num_workers=1)
        with feed_of(stream, config) as feed:
            for _ in range(11):
                next(feed)
            assert feed.skipped == 7
            assert sorted(line["id"] for line in logged(folder)) == [str(number) for number in range(7)]
            place = feed.state()["place"]
            assert (place["epoch"], place["drawn"]) == (1, 1) if pack is None else place["epoch"] >= 1


def test_a_stream_of_bad_samples_alone_reaches_the_cap(folder: Path, processor: VLMProcessor) -> None:
    with tarfile.open(folder / "bad.tar", "w") as archive:
        for number in range(9):
            add(archive, f"{number}.txt", b"w1")
    stream = stream_of(folder, processor, "bad.tar")
    for given, sentence in (
        ({"on_bad_sample": "error"}, "its keys are __key__, txt"),
        ({"max_bad_samples": 4}, "5 sampl"),
    ):
        config = settings(folder, **{"on_bad_sample": "skip", "pack_tokens": 60, **given})
        with pytest.raises(VlmError, match=sentence):
            list(islice(feed_of(stream, config), 9))


class Failing:
    """Samples of which one fails in a way of its own."""

    def __init__(
        self, processor: VLMProcessor, error: BaseException | None, cause: BaseException | None = None
    ) -> None:
        self.processor = processor
        self.error = error
        self.cause = cause

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        if index == 2:
            if self.error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise self.error from self.cause
        return self.processor.sample([{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (MemoryError(), None),
        (OSError(28, "No space left on device"), None),
        (OSError(5, "Input/output error"), None),
        (VlmError("image 'x' cannot be read: Input/output error"), OSError(5, "Input/output error")),
        (VlmError("image 'x' is broken"), MemoryError()),
    ],
)
def test_a_failure_of_the_machine_is_no_bad_sample(
    folder: Path, processor: VLMProcessor, workers: int, error: Exception, cause: Exception | None
) -> None:
    config = settings(folder, on_bad_sample="skip", num_workers=workers)
    with feed_of(Failing(processor, error, cause), config) as feed:
        with pytest.raises(VlmError, match=r"sample '2' cannot be made for want of the machine.*\w") as caught:
            list(feed)
        assert "\n" not in str(caught.value)
        assert feed.skipped == 0


@pytest.mark.parametrize("pack", [None, 60])
def test_a_disk_that_fails_under_a_stream_is_no_bad_sample(
    folder: Path, processor: VLMProcessor, monkeypatch: pytest.MonkeyPatch, pack: int | None
) -> None:
    def fail(part: TarPart) -> bytes:
        raise OSError(5, "Input/output error", part.shard)

    monkeypatch.setattr(TarPart, "read", fail)
    feed = feed_of(stream_of(folder, processor), settings(folder, on_bad_sample="skip", pack_tokens=pack))
    with pytest.raises(
        VlmError, match=r"sample '.*tar/\d+' cannot be made for want of the machine.*Input/output error"
    ):
        next(feed)


def test_what_is_wrong_with_a_picture_is_no_failure_of_the_machine() -> None:
    for cause in (OSError("image file is truncated"), FileNotFoundError(2, "No such file"), PermissionError(13, "x")):
        error = VlmError("image 'x' is broken")
        error.__cause__ = cause
        assert not is_system_failure(error)


def test_a_mistake_of_the_program_keeps_its_traceback(folder: Path, processor: VLMProcessor) -> None:
    with pytest.raises(KeyError):
        list(feed_of(Failing(processor, KeyError("x")), settings(folder, on_bad_sample="skip")))


def test_a_worker_that_is_killed_is_told_in_one_line(folder: Path, processor: VLMProcessor) -> None:
    with feed_of(Failing(processor, None), settings(folder, num_workers=1)) as feed:
        with pytest.raises(
            VlmError, match=r"a process that makes samples died \(DataLoader worker.*lower num_worke"
        ) as caught:
            list(feed)
        assert "\n" not in str(caught.value)


def test_evaluation_can_leave_bad_samples_out(folder: Path, processor: VLMProcessor) -> None:
    spoil(folder, 0, 1)
    data = ConversationDataset(folder / "data.json", None, processor)
    order = [[0, 1], [1, 2], [3]]
    left_out: list[Any] = []
    batches = list(iterate_batches(data, processor, order, device=CPU, on_bad=left_out.extend))
    assert_same(batches, [processor.collate([data[2]]), processor.collate([data[3]])])
    assert [each.key for each in left_out] == ["0", "1", "1"]
    with pytest.raises(VlmError, match="sample 0"):
        list(iterate_batches(data, processor, order, device=CPU))


def test_samples_of_text_alone_and_with_images_share_batches(folder: Path, processor: VLMProcessor) -> None:
    batches = list(feed_of(ConversationDataset(folder / "data.json", None, processor), settings(folder, batch_size=3)))
    views = [0 if batch["pixel_values"] is None else len(batch["pixel_values"]) for batch in batches if batch]
    assert {3, 2} <= set(views)
    assert all(a != b for a, b in pairwise(batch["input_ids"].tolist() for batch in batches if batch))


@pytest.mark.parametrize("pack", [None, 60])
def test_a_run_on_a_stream_with_bad_samples_resumes_to_the_bit(
    folder: Path, processor: VLMProcessor, clip: Encoder, llama: Any, tokenizer: Any, pack: int | None
) -> None:
    with tarfile.open(folder / "1.tar", "w") as archive:
        for number in range(5):
            add(archive, f"{number}.json", json.dumps({"conversations": turns(number)}).encode())
            add(archive, f"{number}.png", picture(number)[: 60 if number % 2 else None])
    torch.manual_seed(5)
    connector = build_connector("mlp", clip.token_spec, 32)
    made = VisionLanguageModel(clip, connector, llama, image_token_id=processor.image_token_id)

    def trainer(name: str, **given: Any) -> Trainer:
        model = apply_stage(copy.deepcopy(made), STAGE_1)
        values = {"stage": "stage-1", "on_bad_sample": "skip", "pack_tokens": pack, "progress": False, "cpu": True}
        config = settings(folder / name, steps=16, save_every=3, tracker="none", **values, **given)
        return Trainer(model, processor, stream_of(folder, processor), config)

    whole = trainer("whole").fit()
    assert whole.skipped == 2
    for killed in (7, 14):
        first = trainer(f"killed-{killed}", num_workers=1, log_every=1)

        def kill(entry: dict[str, float], step: int = killed) -> None:
            if entry["step"] == step:
                raise KeyboardInterrupt

        first.on_log = kill
        with pytest.raises(KeyboardInterrupt):
            first.fit()
        resumed = trainer(f"killed-{killed}").fit(resume=True)
        assert resumed.losses == whole.losses
        assert resumed.skipped == 2
        logs = [folder / name / "out/bad_samples.jsonl" for name in ("whole", f"killed-{killed}")]
        assert logs[0].read_text() == logs[1].read_text()
