"""Lengths without decoding: equal to those of the samples themselves, counted once for a run."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from connectors import build_connector
from connectors.errors import VlmError
from vlm_encoders.preprocess import load_image
from vlm_encoders.preprocess.header import image_size
from vlm_encoders.registry import encoder_spec
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling import PRESETS, Tiler, build_tiler
from vlm_encoders.tiling.counts import marks_of
from vlm_encoders.tiny import llm_folder
from vlm_encoders.training.feeding import lengths as lengths_module
from vlm_encoders.training.feeding.data import ConversationDataset
from vlm_encoders.training.feeding.lengths import DataLengths, SampleLength, data_lengths, file_key, processor_key
from vlm_encoders.training.feeding.workers import map_chunks
from vlm_encoders.vlm.build import build_model
from vlm_encoders.vlm.build_processor import build_processor, load_tokenizer, saved_processor
from vlm_encoders.vlm.processor import VLMProcessor

EXIF_ORIENTATION = 274


def tiler_of(name: str) -> Tiler:
    """Make a tiler of small views, with the markers of the models that it is named after."""
    known = PRESETS[name].tiler.__dataclass_fields__
    sizes = {"max_pixels": 2352, "min_pixels": 196, "max_tiles": 6, "max_patches": 48, "slice_size": 28, "patch": 7}
    wanted = sizes | {"merge": 1} | ({"scales": (1, 2)} if name == "dynamic-s2" else {})
    return build_tiler(name, 28, **{key: value for key, value in wanted.items() if key in known})


def processor_of(tiler: Tiler, clip_spec: EncoderSpec, tokenizer: Any, **options: Any) -> VLMProcessor:
    """Make a processor of specs alone; its tokenizer knows the marks of the tiler."""
    native = dataclasses.replace(encoder_spec("siglip2-naflex-b-16"), image_size=(28, 28), stride=7, dim=32)
    spec = native if tiler.native else clip_spec
    for marker in dataclasses.astuple(tiler.layout.markers):
        places = [(row, column) for row in range(9) for column in range(9)] if "{" in marker else [(1, 1)]
        for row, column in places:
            text = marker.format(row=row, column=column, row0=row, column0=column, number=column)
            tokenizer.add_tokens(marks_of(text), special_tokens=True)
    chain = build_connector("mlp", tiler.layout.connector_spec(spec.token_spec()), 32)
    return VLMProcessor(spec, chain, tokenizer, tiler=tiler, **options)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_measured_sample_is_as_long_as_the_sample(name: str, clip_spec: EncoderSpec, tokenizer: Any) -> None:
    processor = processor_of(tiler_of(name), clip_spec, tokenizer)
    generator = random.Random(name)
    for count in (0, 1, 1, 1, 2, 3):
        sizes = [(generator.randint(7, 120), generator.randint(7, 120)) for _ in range(count)]
        images = [Image.new("RGB", (width, height)) for height, width in sizes]
        asked = turns(f"w1 {'<image> w2 ' * count}", "w3 w4", "w5", "w6 w7 w8")
        for budget in (None, 90):
            sample = processor.sample(asked, images, max_tokens=budget)
            length = processor.measure(asked, sizes, max_tokens=budget)
            assert length.tokens == len(sample.input_ids)
            assert length.supervised == sum(label != -100 for label in sample.labels)
            assert length.image_tokens == sample.input_ids.count(processor.image_token_id)


def test_what_no_sample_can_be_made_of_cannot_be_measured(clip_spec: EncoderSpec, tokenizer: Any) -> None:
    processor = processor_of(tiler_of("whole"), clip_spec, tokenizer, max_length=10)
    with pytest.raises(VlmError, match="1 image placeholder, 2 images came"):
        processor.measure(turns("<image>", "w1"), [(28, 28), (28, 28)])
    with pytest.raises(VlmError, match=r"needs at least 16 tokens .* 9 are allowed"):
        processor.measure(turns("<image>", "w1"), [(28, 28)], max_tokens=9)
    with pytest.raises(VlmError, match="2 images have 1 budgets"):
        processor.measure(turns("<image> <image>", "w1"), [(28, 28), (28, 28)], max_tokens=[4])
    # Too long for the context is a length as any other.
    assert processor.measure(turns("<image>", "w1"), [(28, 28)]).tokens > 10


def late_exif(data: bytes) -> bytes:
    """Move the eXIf chunk of a PNG file behind its pixels, where the format allows it too."""
    chunks, place = [], 8
    while place < len(data):
        size = struct.unpack(">I", data[place : place + 4])[0] + 12
        chunks.append(data[place : place + size])
        place += size
    exif = [chunk for chunk in chunks if chunk[4:8] == b"eXIf"]
    others = [chunk for chunk in chunks if chunk[4:8] != b"eXIf"]
    assert len(exif) == 1
    return data[:8] + b"".join([*others[:-1], *exif, others[-1]])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "late PNG", "TIFF", "WEBP", "BMP", "GIF", "deep", "LA", "CMYK"])
def test_the_header_says_the_size_that_the_image_has(kind: str, tmp_path: Path) -> None:
    mode = {"deep": "I;16", "LA": "LA", "CMYK": "CMYK"}.get(kind, "RGB")
    form = {"late PNG": "PNG", "deep": "TIFF", "LA": "PNG", "CMYK": "JPEG"}.get(kind, kind)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        target = io.BytesIO()
        Image.new(mode, (31, 17)).save(target, format=form, **({} if form in {"BMP", "GIF"} else {"exif": exif}))
        data = late_exif(target.getvalue()) if kind == "late PNG" else target.getvalue()
        path = tmp_path / f"{orientation}.{form.lower()}"
        path.write_bytes(data)
        shown = load_image(path)
        turned = form not in {"BMP", "GIF"} and orientation > 4
        assert (shown.height, shown.width) == ((31, 17) if turned else (17, 31))
        for image in (path, str(path), data, io.BytesIO(data), Image.open(path)):
            assert image_size(image) == (shown.height, shown.width), orientation


def test_the_header_alone_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.effect_noise((200, 100), 50).save(path)
    path.write_bytes(path.read_bytes()[:900])
    assert image_size(path) == (100, 200)
    with pytest.raises(VlmError, match="truncated"):
        load_image(path)
    assert image_size(np.zeros((5, 7, 3), np.uint8)) == (5, 7)
    for wrong, sentence in (
        (b"", "empty"),
        (b"none", "no image"),
        (b"\x89PNG\r\n\x1a\n" + b"0" * 30, "truncated or broken"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(VlmError, match=f"cut.jpg.*{sentence}"):
            image_size(path)
    with pytest.raises(VlmError, match=r"none\.png' is missing"):
        image_size(tmp_path / "none.png")


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
def test_a_bomb_is_refused_by_its_header(limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Some set Pillow's own limit aside.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(14_000))
    with pytest.raises(VlmError, match="over the limit"):
        image_size(path)


def bomb(side: int) -> bytes:
    """Write a PNG file whose header promises more pixels than any has."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Nine samples: text alone, images of many sizes, one that is missing and one that is broken."""
    records = []
    for index in range(9):
        question = {"from": "human", "value": "<image> w1" if index % 4 else "w1 w2"}
        record = {"conversations": [question, {"from": "gpt", "value": "w3 " * index}]}
        if index % 4:
            Image.new("RGB", (20 + 13 * index, 40)).save(tmp_path / f"{index}.png")
            record["image"] = f"{index}.png"
        records.append(record)
    (tmp_path / "6.png").write_bytes(b"broken")
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_all_samples_are_counted_once(
    workers: int, data: Path, tmp_path: Path, clip_spec: EncoderSpec, tokenizer: Any
) -> None:
    processor = processor_of(tiler_of("llava-next"), clip_spec, tokenizer)
    dataset = ConversationDataset(data, None, processor)
    counted: list[int] = []
    options = {"key": file_key(data), "cache": tmp_path / "out", "workers": workers, "on_progress": counted.append}
    lengths = data_lengths(dataset, **options)
    assert sum(counted) == len(lengths) == 9
    for index in range(9):
        if index == 6:
            assert lengths.tokens[index] is None
            assert "6.png' is no image" in lengths.problems[index]
            continue
        sample = dataset[index]
        assert lengths.tokens[index] == len(sample.input_ids)
        assert lengths.supervised[index] == sum(label != -100 for label in sample.labels)
        assert lengths.text_only[index] == (index % 4 == 0)
    # A resumed run reads them.
    assert data_lengths(dataset, **options) == lengths
    assert sum(counted) == 9


def test_the_cache_is_of_one_file_and_one_processor(
    data: Path, tmp_path: Path, clip_spec: EncoderSpec, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = processor_of(tiler_of("llava-next"), clip_spec, tokenizer)
    counted: list[int] = []

    def count(processor: VLMProcessor) -> int:
        counted.clear()
        dataset = ConversationDataset(data, None, processor)
        data_lengths(dataset, key=file_key(data), cache=tmp_path / "out", on_progress=counted.append)
        return sum(counted)

    assert [count(processor), count(processor)] == [9, 0]
    assert count(processor_of(tiler_of("whole"), clip_spec, tokenizer)) == 9
    assert count(processor) == 9
    processor.max_image_tokens = 40
    assert count(processor) == 9
    processor.tokenizer.chat_template = processor.tokenizer.chat_template.replace(" : ", " w9 : ")
    assert [count(processor), count(processor)] == [9, 0]
    data.write_text(data.read_text() + "\n")
    assert [count(processor), count(processor)] == [9, 0]
    held = tmp_path / "out" / lengths_module.CACHE
    held.write_bytes(held.read_bytes()[:200])
    assert [count(processor), count(processor)] == [9, 0]
    monkeypatch.setattr(np, "savez_compressed", no_space)
    held.unlink()
    with pytest.raises(VlmError, match="cannot be written"):
        count(processor)
    assert list((tmp_path / "out").iterdir()) == []


def no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_work_is_spread_over_processes_and_bounded() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            read.append(item)
            yield item

    results = map_chunks(lambda item: (item * item, os.getpid()), items(), workers=2, chunk=3)
    first = next(results)
    assert len(read) == 4 * 2 * 3
    others = list(results)
    assert [value for value, _ in [first, *others]] == [item * item for item in range(100)]
    assert os.getpid() not in {process for _, process in others}
    with pytest.raises(VlmError, match="one of 1 processes died"):
        list(map_chunks(lambda _: os._exit(1), range(3), workers=1))


def test_lengths_are_collected_with_what_cannot_be_counted() -> None:
    lengths = DataLengths.of([SampleLength(9, 2, 4), None, "is broken"])
    assert list(lengths.tokens) == [9, None, None]
    assert lengths.text_only == [False, True, True]
    assert lengths.problems == {2: "is broken"}


def test_a_processor_without_a_model_counts_as_that_of_the_model(tmp_path: Path) -> None:
    parts = ("tiny-digits", "pixel_shuffle:factor=2+mlp", llm_folder())
    model, own = build_model(*parts)
    light = build_processor(*parts)
    assert (light.max_length, light.token_spec.num_tokens) == (own.max_length, own.token_spec.num_tokens)
    asked, size = turns("<image>\nWhich digits?", "1 2"), (50, 70)
    sample = own.sample(asked, [Image.new("RGB", size[::-1])])
    assert light.measure(asked, [size]).tokens == own.measure(asked, [size]).tokens == len(sample.input_ids)
    own.max_length = 77
    model.save_pretrained(tmp_path / "saved")
    own.save_pretrained(tmp_path / "saved")
    saved = saved_processor(tmp_path / "saved")
    assert saved.max_length == 77
    assert saved.measure(asked, [size]) == own.measure(asked, [size])
    assert processor_key(saved) == processor_key(own)


def test_a_processor_without_a_model_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(VlmError, match="does not exist"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VlmError, match=r"the tokenizer of the LLM '.*empty' cannot be loaded"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(VlmError, match="is no model checkpoint"):
        saved_processor(tmp_path / "empty")
