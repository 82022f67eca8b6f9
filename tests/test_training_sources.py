"""Where conversations come from: every kind of source gives the same samples, and what fits none is told."""

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from connectors import MLP
from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.training.feeding.data import ConversationDataset, checked_record
from vlm_encoders.training.feeding.records import images_of
from vlm_encoders.training.feeding.sources.jsonl import JsonLines
from vlm_encoders.training.feeding.sources.opening import open_records
from vlm_encoders.training.feeding.sources.rows import as_record
from vlm_encoders.training.feeding.sources.spec import DataName
from vlm_encoders.training.feeding.sources.tars import TarPart, TarShards, expand_pattern
from vlm_encoders.training.feeding.stream import ConversationStream, open_dataset
from vlm_encoders.vlm.processor import VLMProcessor

datasets = pytest.importorskip("datasets")

TURNS = [{"from": "human", "value": "<image>\nw1 w2"}, {"from": "gpt", "value": "w3"}]


def picture(number: int) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (28, 28), (20 * number, 250 - 20 * number, 90)).save(target, "PNG")
    return target.getvalue()


def records(count: int = 6) -> list[dict[str, Any]]:
    """LLaVA records, every third one text alone."""
    found = []
    for number in range(count):
        asked = "w1 w2" if number % 3 == 2 else f"<image>\nw{number}"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"w{number + 10}"}]
        image = None if number % 3 == 2 else f"{number}.png"
        found.append({"id": f"s{number}", "image": image, "conversations": turns})
    return found


def embedded(count: int = 6) -> list[dict[str, Any]]:
    """The same with the pictures inside, as rows of a dataset hold them."""
    rows = records(count)
    for number, row in enumerate(rows):
        row["image"] = None if row["image"] is None else {"bytes": picture(number), "path": row["image"]}
    return rows


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_shards(folder: Path, count: int = 6, shards: int = 2) -> str:
    rows = records(count)
    for shard in range(shards):
        with tarfile.open(folder / f"part-{shard:03}.tar", "w") as archive:
            for number in range(shard * count // shards, (shard + 1) * count // shards):
                row = {key: value for key, value in rows[number].items() if value is not None}
                if "image" in row:
                    add(archive, f"inner/{number:05}.png", picture(number))
                add(archive, f"inner/{number:05}.json", json.dumps(row).encode())
    return str(folder / "part-*.tar")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "list.json").write_text(json.dumps(records()))
    (tmp_path / "lines.jsonl").write_text("\n\n".join(map(json.dumps, records())) + "\n")
    return tmp_path


@pytest.fixture
def processor(clip: Encoder, tokenizer: Any) -> VLMProcessor:
    return VLMProcessor(clip, MLP(32, 32), tokenizer)


def hub_dataset() -> Any:
    text = datasets.Value("string")
    turns = datasets.List({"from": text, "value": text})
    features = datasets.Features({"id": text, "image": datasets.Image(), "conversations": turns})
    return datasets.Dataset.from_list(embedded(), features=features)


def write_source(kind: str, folder: Path) -> str:
    if kind == "saved":
        hub_dataset().save_to_disk(folder / "saved")
        return f"hf:{folder}/saved"
    if kind == "splits":
        datasets.DatasetDict({"train": hub_dataset().select([0]), "val": hub_dataset()}).save_to_disk(folder / "both")
        return f"hf:{folder}/both[split=val]"
    if kind == "parquet":
        (folder / "parquet").mkdir()
        hub_dataset().to_parquet(folder / "parquet/train-00000.parquet")
        return f"hf:{folder}/parquet"
    return str(folder / kind)


@pytest.mark.parametrize("kind", ["lines.jsonl", "saved", "splits", "parquet"])
def test_every_source_by_index_gives_the_samples_of_the_list(folder: Path, processor: VLMProcessor, kind: str) -> None:
    wanted = ConversationDataset(folder / "list.json", folder, processor)
    # What is embedded needs no file beside it.
    images = folder if kind == "lines.jsonl" else folder / "nowhere"
    data = ConversationDataset.open(write_source(kind, folder), images, processor)
    assert len(data) == len(wanted) == 6
    for index in range(6):
        assert data.sample_id(index) == wanted.sample_id(index) == f"s{index}"
        assert data.name(index) == f"sample {index} (id 's{index}')"
        assert data.messages(index) == wanted.messages(index)
        assert data[index].input_ids == wanted[index].input_ids
        assert data[index].labels == wanted[index].labels
        ours, theirs = data[index].pixel_values, wanted[index].pixel_values
        assert (ours is None) == (theirs is None) == (index % 3 == 2)
        if ours is not None:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", ["", "[streaming=true]"])
@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_pictures_of_a_dataset_come_encoded(folder: Path, kind: str, options: str) -> None:
    source = open_records(write_source(kind, folder) + options).rows
    rows = [row for _, row in source.rows()] if options else [source[index] for index in range(6)]
    assert [row["image"] and row["image"]["bytes"] for row in rows] == [
        picture(number) if number % 3 != 2 else None for number in range(6)
    ]
    several = datasets.Dataset.from_list(
        [{"images": [{"bytes": picture(number), "path": None} for number in (0, 1)]}],
        features=datasets.Features({"images": datasets.List(datasets.Image())}),
    )
    several.save_to_disk(folder / "several")
    assert next(iter(open_records(f"hf:{folder}/several").rows))["images"][1]["bytes"] == picture(1)


@pytest.mark.parametrize("kind", ["tar", "parquet", "saved"])
def test_every_stream_gives_the_samples_of_the_list(folder: Path, processor: VLMProcessor, kind: str) -> None:
    wanted = ConversationDataset(folder / "list.json", folder, processor)
    name = write_shards(folder) if kind == "tar" else write_source(kind, folder) + "[streaming=true]"
    stream = open_dataset(name, folder / "nowhere", processor)
    assert isinstance(stream, ConversationStream)
    names = [name for name, _ in stream.source.rows()]
    samples = [stream.make(draw) for draw, _ in zip(stream.draws(seed=0, buffer=1), range(12), strict=False)]
    order = [next(i for i in range(6) if wanted[i].input_ids == sample.input_ids) for sample in samples]
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6))
    assert len(set(names)) == 6
    for index, sample in zip(order, samples, strict=True):
        assert sample.labels == wanted[index].labels
        if sample.pixel_values is not None:
            assert torch.equal(sample.pixel_values, wanted[index].pixel_values)


def test_tar_samples_are_those_of_the_reader_of_datasets(folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for number in range(7):
            add(archive, f"{number}.json", json.dumps({"conversations": TURNS, "id": f"x{number}"}).encode())
            add(archive, f"{number}.png", picture(number))
    theirs = datasets.load_dataset("webdataset", data_files=str(folder / "a.tar"), streaming=True, split="train")
    theirs = theirs.cast_column("png", datasets.Image(decode=False))
    ours = [row for _, row in TarShards(str(folder / "a.tar")).rows()]
    for mine, row in zip(ours, theirs, strict=True):
        assert mine["__key__"] == row["__key__"]
        assert mine["png"].read() == row["png"]["bytes"]
        assert as_record(mine)["conversations"] == as_record(row)["conversations"] == TURNS
        assert as_record(mine)["id"] == as_record(row)["id"]


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ranks_share_the_rows_of_a_stream(folder: Path, shards: int, world: int) -> None:
    source = TarShards(write_shards(folder, 6, shards))
    for seed in (None, 3):
        shares = [[name for name, _ in source.rows(seed=seed, rank=rank, world=world)] for rank in range(world)]
        assert sorted(name for share in shares for name in share) == sorted(name for name, _ in source.rows())
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ranks_share_the_rows_of_a_dataset(folder: Path, world: int) -> None:
    source = open_records(write_source("saved", folder) + "[streaming=true]").rows
    shares = [[row["id"] for _, row in source.rows(seed=3, rank=rank, world=world)] for rank in range(world)]
    assert [len(share) for share in shares] == [6 // world] * world
    assert sorted(name for share in shares for name in share) == [f"s{number}" for number in range(6)]


def test_shards_are_shuffled_for_each_epoch(folder: Path) -> None:
    source = TarShards(write_shards(folder, 6, 6))
    orders = {tuple(name for name, _ in source.rows(seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6
    assert [name for name, _ in source.rows(seed=1, epoch=2)] == [name for name, _ in source.rows(seed=1, epoch=2)]


def test_what_is_passed_over_in_a_tar_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TarShards(write_shards(folder))

    def refuse(part: TarPart) -> bytes:
        raise AssertionError(part.name)

    monkeypatch.setattr(TarPart, "read", refuse)
    assert len(list(source.rows())) == 6


def test_a_line_of_a_large_file_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"id": "\xc3\xa9"}\n\n  \n{"id": 1}\r\n{"id" 2}\n{"id": "\xff"}\n{"id": 4}')
    lines = JsonLines(path)
    assert len(lines) == 5
    assert lines[0] == {"id": "é"}
    assert lines[1] == {"id": 1}
    assert lines[4] == lines[-1] == {"id": 4}
    assert lines[:2] == [{"id": "é"}, {"id": 1}]
    with pytest.raises(VlmError, match=r"data\.jsonl: line 5 is not JSON"):
        lines[2]
    with pytest.raises(VlmError, match=r"is not UTF-8 text at byte 45"):
        lines[3]
    path.write_bytes(b"[1]")
    assert open_records(path).rows == [1]


@pytest.mark.parametrize("kind", ["index", "stream"])
def test_a_sample_without_a_supervised_token_is_told(
    folder: Path, processor: VLMProcessor, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    blank = processor.prompt([{"role": "user", "content": "w1"}])
    monkeypatch.setattr(processor, "sample", lambda *_: blank)
    listed = ConversationDataset(folder / "list.json", folder, processor)
    stream = ConversationStream(write_shards(folder), folder, processor)
    draw = next(stream.draws(seed=0, buffer=1))
    with pytest.raises(VlmError, match=r"(sample 1 \(id 's1'\)|part-00\d.tar/inner/\d+): has no supervised token"):
        listed[1] if kind == "index" else stream.make(draw)


def conversation(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in turns]


ASKED = conversation(("human", "<image>\nw1"), ("gpt", "w2"))
PARTS = [{"type": "image", "text": None}, {"type": "text", "text": "w1"}]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"conversations": ASKED, "image": b"i"}, ASKED),
        ({"conversations": {"from": ["human", "gpt"], "value": ["<image>\nw1", "w2"]}, "image": b"i"}, ASKED),
        (
            {
                "messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "w2"}],
                "images": [b"i"],
            },
            ASKED,
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": b"i"}, PARTS[1]]},
                    {"role": "assistant", "content": [{"type": "text", "text": "w2"}]},
                ]
            },
            ASKED,
        ),
        (
            {
                "conversations": [
                    {"role": "system", "content": "w9"},
                    {"role": "user", "content": "<image>\nw1"},
                    {"role": "assistant", "content": "w2"},
                ],
                "image": b"i",
            },
            conversation(("system", "w9")) + ASKED,
        ),
        ({"texts": [{"user": "w1", "assistant": "w2", "source": "x"}], "images": [b"i"]}, ASKED),
        (
            {"texts": [{"user": "w1", "assistant": "w2"}, {"user": "w3", "assistant": "w4"}], "images": []},
            conversation(("human", "w1"), ("gpt", "w2"), ("human", "w3"), ("gpt", "w4")),
        ),
        ({"texts": [{"user": "w1 <image>", "assistant": "w2"}], "images": [b"i"]}, None),
        ({"__key__": "k", "jpg": b"i", "json": json.dumps({"conversations": ASKED, "image": "i.jpg"}).encode()}, ASKED),
        ({"__key__": "k", "0.jpg": b"i", "1.png": b"j", "json": {"messages": [
            {"role": "user", "content": "<image> <image>"}, {"role": "assistant", "content": "w2"}]}},
         conversation(("human", "<image> <image>"), ("gpt", "w2"))),
    ],
)  # fmt: skip
def test_every_form_of_a_row_becomes_one(row: dict[str, Any], turns: Any) -> None:
    record = checked_record(row)
    assert turns is None or record["conversations"] == turns
    assert b"".join(images_of(record, "x")) == b"ij"[: len(images_of(record, "x"))]


@pytest.mark.parametrize("row", [{"image": b"i", "text": " w2\n"}, {"__key__": "k", "png": b"i", "text": "w2"}])
def test_captions_are_answers_to_the_image_alone_where_asked(row: dict[str, Any]) -> None:
    with pytest.raises(VlmError, match=r"lacks 'conversations', a list of turns; its keys are .*text.*caption=COL"):
        checked_record(row)
    wanted = conversation(("human", "<image>"), ("gpt", "w2"))
    row = row if "image" in row else {"__key__": "k", "png": b"i", "txt": b"w2"}
    assert checked_record(row, "txt" if "txt" in row else "text")["conversations"] == wanted
    with pytest.raises(VlmError, match="has no caption: 'other' is no text; its columns are"):
        checked_record(row, "other")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ([1], "is a list, not an object"),
        ({"question": "w1", "picture": b""}, "its keys are question, picture"),
        (
            {"messages": [{"role": "tool", "content": "w1"}]},
            "message 1 has unknown role 'tool'; use system, user",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "message 1 has content that is neither"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 has content that is neither"),
        ({"messages": [{"role": "user", "content": "w1"}, "w2"]}, "message 2 is a str"),
        ({"messages": [{"role": "user", "content": "w1"}]}, "ends with a turn from 'human'"),
        ({"messages": "w1"}, "lacks 'conversations'"),
        ({"texts": [{"user": "w1"}]}, "'texts' 1 lacks 'user' or 'assistant'"),
        ({"texts": "w1"}, "'texts' 1 lacks"),
        ({"conversations": ASKED, "images": [None]}, "'image' must be a path or a list of paths, got None"),
        ({"conversations": ASKED, "image": {"bytes": None, "path": None}}, "'image' must be a path"),
        ({"conversations": ASKED, "images": ["a", "b"]}, "has 1 <image> placeholders and 2 images"),
        ({"__key__": "k", "jpg": b"", "json": b"{"}, "its json is not JSON"),
        ({"__key__": "k", "jpg": b"", "json": b"[1]"}, "its json holds a list"),
        ({"__key__": "k", "jpg": b""}, "its keys are __key__, jpg"),
    ],
)
def test_a_row_of_no_known_form_is_told(row: Any, sentence: str) -> None:
    with pytest.raises(VlmError) as caught:
        checked_record(row)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_picture_in_a_tar_is_named(folder: Path, processor: VLMProcessor) -> None:
    with tarfile.open(folder / "bad.tar", "w") as archive:
        add(archive, "a/7.png", picture(7)[:40])
        add(archive, "a/7.json", json.dumps({"conversations": TURNS, "id": "seven"}).encode())
    stream = ConversationStream(folder / "bad.tar", None, processor)
    draw = next(stream.draws(seed=0, buffer=5))
    with pytest.raises(VlmError, match=r"bad\.tar, .*bad\.tar/a/7: image '.*bad\.tar/a/7\.png' is"):
        stream.make(draw)
    assert stream.tell(draw) == (f"{folder}/bad.tar/a/7", "a/7")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data: data[:700], "is no whole tar file"),
        (lambda _: b"no tar" * 300, "is no whole tar file"),
        (lambda data: data[:-1024], r"is no whole tar file \(it breaks off at byte \d+, without the mark of its end"),
        (lambda data: data[:-1024] + b"?" * 512 + data, r"is no whole tar file \(it breaks off"),
        (lambda data: data[:-1024] + data, r"holds 'inner/00000\.\w+' twice"),
    ],
)
def test_a_broken_shard_is_named(folder: Path, damage: Any, sentence: str) -> None:
    write_shards(folder, 1, 1)
    path = folder / "part-000.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        add(archive, "inner/00000.png", picture(0) * 9)
    archive_end = path.read_bytes().rstrip(b"\0")
    whole = archive_end + b"\0" * (-len(archive_end) % 512) + b"\0" * 1024
    path.write_bytes(damage(whole))
    with pytest.raises(VlmError, match=rf"part-000\.tar' {sentence}"):
        list(TarShards(str(path)).rows())


def test_patterns_name_shards(folder: Path) -> None:
    for number in range(12):
        (folder / f"x-{number:02}.tar").touch()
    assert expand_pattern(f"{folder}/x-{{08..11}}.tar") == [f"{folder}/x-{number:02}.tar" for number in range(8, 12)]
    assert expand_pattern(f"{folder}/x-0[12].tar") == [f"{folder}/x-01.tar", f"{folder}/x-02.tar"]
    assert expand_pattern(f"{folder}/x-{{01,0?}}.tar")[:2] == [f"{folder}/x-01.tar", f"{folder}/x-00.tar"]
    for missing in ("x-{11..12}.tar", "y-*.tar"):
        with pytest.raises(VlmError, match=r"no tar shard '.*' is there"):
            expand_pattern(f"{folder}/{missing}")


@pytest.mark.parametrize(
    ("data", "folder", "wanted"),
    [
        ("a/b.json", "a", ("file", "a/b.json", {}, False)),
        ("a[1]/b.json", "a[1]", ("file", "a[1]/b.json", {}, False)),
        ("hf:org/name", ".", ("hf", "org/name", {}, False)),
        ("hf:o/n[split=train[:5%], name=x]", ".", ("hf", "o/n", {"split": "train[:5%]", "name": "x"}, False)),
        ("hf:d[split=val, streaming=true]", ".", ("hf", "d", {"split": "val", "streaming": "true"}, True)),
        ("a/b/x-[0-9].tar[caption=txt]", "a/b", ("tar", "a/b/x-[0-9].tar", {"caption": "txt"}, True)),
        ("a/*/x-[0-9].tar", "a", ("tar", "a/*/x-[0-9].tar", {}, True)),
        ("a/x.tar", "a", ("tar", "a/x.tar", {}, True)),
    ],
)
def test_the_name_of_data_is_taken_apart(data: str, folder: str, wanted: tuple[Any, ...]) -> None:
    name = DataName.parse(data)
    assert (name.kind, name.place, name.options, name.streaming) == wanted
    assert name.folder == Path(folder)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("hf:a[spilt=x]", "no option 'spilt'; did you mean split"),
        ("hf:a[split=x,split=y]", "'split' is there twice"),
        ("hf:a[split=]", "option 'split=' has no value"),
        ("hf:a[streaming=yes]", "streaming is true or false, got 'yes'"),
        ("a.json[split=x]", "takes no options"),
        ("a.tar.gz", "is compressed"),
    ],
)
def test_a_wrong_name_of_data_is_told(data: str, sentence: str) -> None:
    with pytest.raises(VlmError) as caught:
        open_records(data)
    assert sentence in str(caught.value)


def test_datasets_that_cannot_be_opened_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = write_source("splits", folder).partition("[")[0]
    with pytest.raises(VlmError, match=r"has no split 'test'; it has train, val"):
        open_records(f"{saved}[split=test]")
    write_source("parquet", folder)
    assert len(open_records(f"hf:{folder}/parquet[split=train[:50%]]").rows) == 3
    with pytest.raises(VlmError, match=r"cannot be opened: .*nope.*train"):
        open_records(f"hf:{folder}/parquet[split=nope]")
    with pytest.raises(VlmError, match=r"the dataset 'hf:nobody/nothing' cannot be opened: \w+") as caught:
        open_records("hf:nobody/nothing")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(VlmError, match=r"needs the library datasets, .*pip install 'vlm-encoders\[data\]'"):
        open_records(saved)


def test_a_stream_that_breaks_says_where(folder: Path, processor: VLMProcessor) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"id": "first", "conversations": ASKED, "image": "0.png"}
        raise ConnectionError("the line\nwent dead")

    stream = open_dataset(write_source("saved", folder) + "[streaming=true]", folder, processor)
    assert isinstance(stream, ConversationStream)
    stream.source.dataset = datasets.IterableDataset.from_generator(rows)
    draws = stream.source.rows()
    assert next(draws)[0] == "row 0 of pass 0 (id 'first')"
    with pytest.raises(VlmError, match="cannot be read on after row 1 of pass 0 on process 0: the line went dead; res"):
        next(draws)


def test_indexed_and_streamed_data_are_not_taken_for_each_other(folder: Path, processor: VLMProcessor) -> None:
    with pytest.raises(VlmError, match=r"is a stream, .* ConversationStream"):
        ConversationDataset.open(write_shards(folder), None, processor)
    with pytest.raises(VlmError, match="is no stream; open it as a ConversationDataset"):
        ConversationStream(folder / "list.json", folder, processor)


def test_a_file_with_problems_opens_where_bad_samples_are_skipped(folder: Path, processor: VLMProcessor) -> None:
    path = folder / "some.jsonl"
    good = records()
    path.write_text("\n".join([json.dumps(good[0]), "{broken", json.dumps(good[1] | {"image": "gone.png"}), '"text"']))
    with pytest.raises(VlmError, match="line 2 is not JSON"):
        open_dataset(path, None, processor)
    data = open_dataset(path, None, processor, check=False)
    assert isinstance(data, ConversationDataset)
    assert data[0].input_ids
    sentences = {1: "sample 1: .*line 2 is not JSON", 2: r"\(id 's1'\): .*gone.png.* is missing", 3: "is a str"}
    for index, sentence in sentences.items():
        with pytest.raises(VlmError, match=sentence):
            data[index]
