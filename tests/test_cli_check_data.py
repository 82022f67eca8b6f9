"""check-data on real broken files: what it finds, what it counts, and its exit status."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from connectors.errors import VlmError
from vlm_encoders.cli.main import app
from vlm_encoders.preprocess import load_image
from vlm_encoders.training.feeding import image_check
from vlm_encoders.training.feeding.data_check import check_conversations
from vlm_encoders.training.feeding.findings import summarise
from vlm_encoders.training.feeding.image_check import check_image
from vlm_encoders.training.feeding.lengths import DataLengths, SampleLength
from vlm_encoders.training.feeding.sources.opening import open_records

LLM = ("--encoder", "tiny-digits", "--connector", "mlp", "--llm", "tiny")


def run(*arguments: str | Path) -> tuple[int, str]:
    """Run check-data in this process and give its exit status and what it prints; a VlmError is raised on."""
    result = CliRunner().invoke(app, ["check-data", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def record(image: Any = None, answer: str = "6 2", question: str = "What is it?") -> dict[str, Any]:
    places = [image] if isinstance(image, str) else image or []
    asked = "<image>\n" * len(places) + question
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return ({} if image is None else {"image": image}) | {"conversations": turns}


def written(folder: Path, *records: Any) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def photo(width: int = 60, height: int = 40) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def huge(side: int) -> bytes:
    """Write the beginning of a PNG file whose header promises side x side pixels."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """One file of each kind."""
    picture, frames = photo(), [photo(), photo(61)]
    picture.save(tmp_path / "good.jpg")
    picture.save(tmp_path / "good.png")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    exif = Image.Exif()
    exif[274] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    picture.save(tmp_path / "gif.jpg", format="GIF")
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=[photo(60).rotate(180)])
    frames[0].save(tmp_path / "moves.webp", save_all=True, append_images=[photo(60).rotate(180)])
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    picture.save(tmp_path / "progressive.jpg", progressive=True)
    whole = (tmp_path / "progressive.jpg").read_bytes()
    (tmp_path / "progressive.jpg").write_bytes(whole[: len(whole) // 2])
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "bomb.png").write_bytes(huge(20_000))
    Image.new("1", (3000, 2000)).save(tmp_path / "large.png")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


EXPECTED = {
    "good.jpg": None,
    "good.png": None,
    "cmyk.jpg": None,
    "turned.jpg": None,
    "gif.jpg": ("wrong extension", "is GIF, not what '.jpg' says"),
    "moves.gif": ("animated image", "has 2 frames; only the first is used"),
    "moves.webp": ("animated image", "has 2 frames; only the first is used"),
    "cut.jpg": ("broken image", "truncated"),
    "progressive.jpg": ("broken image", "truncated"),
    "cut.png": ("broken image", "truncated"),
    "empty.png": ("broken image", "empty (0 bytes)"),
    "page.jpg": ("broken image", "no image that Pillow can read"),
    "bomb.png": ("image over the limit", "over the limit"),
    "large.png": ("large image", "2000x3000 px, 6 MP"),
    "folder.png": ("broken image", "is a folder"),
    "none.png": ("missing image", "is missing; check image_folder"),
}


def test_each_kind_of_image_is_told(zoo: Path) -> None:
    for name, expected in EXPECTED.items():
        facts = check_image(zoo / name, large=5_000_000)
        if expected is None:
            assert facts.problems == (), name
            continue
        ((kind, text),) = facts.problems
        assert kind == expected[0], name
        assert expected[1] in text, name
        assert name in text
    assert check_image(zoo / "cmyk.jpg", large=9000).notes == ("CMYK",)
    turned = check_image(zoo / "turned.jpg", large=9000)
    assert (turned.size, turned.notes) == ((60, 40), ("turned by EXIF",))
    for name in ("good.jpg", "cut.jpg"):
        by_bytes = check_image((zoo / name).read_bytes(), large=9000)
        assert by_bytes.size == check_image(zoo / name, large=9000).size
    # A header says nothing of what is cut off behind it.
    assert check_image(zoo / "cut.jpg", large=9000, decode=False).problems == ()


def test_what_it_passes_can_be_loaded_and_nothing_else(zoo: Path) -> None:
    whole = (zoo / "good.jpg").read_bytes()
    for form in ("JPEG", "progressive", "PNG", "WEBP", "TIFF"):
        target = io.BytesIO()
        progressive = {"progressive": True} if form == "progressive" else {}
        photo(90, 70).save(target, format="JPEG" if progressive else form, **progressive)
        whole = target.getvalue()
        for part in range(1, 40):
            cut = whole[: len(whole) * part // 39]
            try:
                load_image(cut)
                loads = True
            except VlmError:
                loads = False
            assert (check_image(cut, large=10**9).size is not None) == loads, (form, part)


def test_the_report_tells_all_and_the_status_fails(zoo: Path) -> None:
    records = [record(name) for name in EXPECTED]
    records += [record("cut.jpg"), record("gif.jpg"), record(), record(["good.jpg", "none.png"]), {"id": "x"}]
    path = written(zoo, *records)
    out = zoo / "out" / "report.json"
    status, text = run("--data", path, "--json", out, "--max-megapixels", "5", "--workers", "0")
    assert status == 1
    (told,) = json.loads(out.read_text())
    assert told["kinds"] == {
        "record": 1,
        "missing image": 2,
        "broken image": 7,
        "image over the limit": 1,
        "wrong extension": 1,
        "animated image": 2,
        "large image": 1,
    }
    assert (told["samples"], told["bad_samples"], told["errors"], told["warnings"]) == (21, 11, 11, 4)
    assert (told["images"], told["different_images"], told["text_only"], told["answers"]) == (20, 16, 1, 20)
    assert told["formats"] == {"JPEG": 3, "PNG": 2, "GIF": 2, "WEBP": 1}
    assert told["notes"] == {"CMYK": 1, "turned by EXIF": 1, "palette": 2, "grey": 1}
    assert told["largest"] == {"size": [2000, 3000], "image": str(zoo / "large.png")}
    assert [each["index"] for each in told["findings"] if each["kind"] == "broken image"] == [7, 8, 9, 10, 11, 14, 16]
    assert {each["severity"] for each in told["findings"] if each["kind"] == "large image"} == {"warning"}
    assert "broken image: 7" in text
    assert "and 4 more" in text
    assert "11 of 21 samples have errors" in text


def test_warnings_fail_where_asked_to(zoo: Path) -> None:
    path = written(zoo, record("good.jpg"), record("gif.jpg"))
    status, text = run("--data", path, "--workers", "0")
    assert (status, "no errors; 1 warnings" in text) == (0, True)
    assert run("--data", path, "--workers", "0", "--strict")[0] == 1
    status, text = run("--data", written(zoo, record("good.jpg")), "--workers", "0", "--strict")
    assert (status, "nothing is wrong" in text) == (0, True)


def test_an_image_is_decoded_once_however_often_it_comes(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    whole = image_check.check_image
    monkeypatch.setattr(
        image_check, "check_image", lambda image, **options: looked.append(image.name) or whole(image, **options)
    )
    records = [record(["good.jpg", "good.jpg", "good.png"]), record("good.jpg"), record("cut.jpg"), record("cut.jpg")]
    check = check_conversations(open_records(written(zoo, *records)))
    assert looked == ["good.jpg", "good.png", "cut.jpg"]
    assert (check.images, check.files, check.kinds) == (6, 3, {"broken image": 2})


def test_processes_find_what_one_finds(zoo: Path) -> None:
    path = written(zoo, *[record(name) for name in EXPECTED] * 9)
    done: list[int] = []
    one = check_conversations(open_records(path))
    many = check_conversations(open_records(path), workers=2, on_progress=done.append)
    assert many == one
    assert sum(done) == many.samples == 9 * len(EXPECTED)


def test_lengths_are_counted_against_the_context(zoo: Path) -> None:
    answers = ["6", "6 2 3", "1 2 3 4 5 6 7 8 9 " * 4]
    path = written(zoo, *[record("good.png", answer) for answer in answers], record(None, "7"), record("cut.png"))
    out = zoo / "out.json"
    status, text = run("--data", path, *LLM, "--max-length", "80", "--json", out, "--workers", "0")
    (told,) = json.loads(out.read_text())
    tokens = told["by_sample"]["tokens"]
    assert told["by_sample"]["index"] == [0, 1, 2, 3, 4]
    assert tokens[4] is None
    assert tokens[2] > 80 > tokens[1] > tokens[0] > tokens[3]
    assert told["by_sample"]["image_tokens"][0] == told["by_sample"]["image_tokens"][2] > 0
    assert told["lengths"]["over"] == 1
    assert told["lengths"]["counted"] == 4
    assert told["kinds"] == {"broken image": 1, "longer than the context": 1}
    assert f"is {tokens[2]} tokens long" in text
    assert f"longest {tokens[2]} (sample 2), 1 over the context of 80" in text
    assert "context 80\n" in text
    assert sum(bar["samples"] for bar in told["lengths"]["bars"]) == 4
    assert status == 1


def test_the_numbers_are_those_of_a_count_by_hand() -> None:
    tokens = [3, 90, 17, 16, 128, 33, 64, 65, 20, 20]
    lengths = DataLengths.of([SampleLength(each, 2, each // 2) for each in tokens] + [None])
    told = summarise(lengths, range(100, 111), 128)
    assert told is not None
    # In order: 3 16 17 20 20 33 64 65 90 128.
    assert (told.counted, told.mean, told.median, told.p95, told.longest) == (10, 45.6, 20, 128, 128)
    assert (told.longest_index, told.over) == (104, 0)
    assert told.supervised_share == pytest.approx(20 / 456)
    assert told.image_share == pytest.approx((1 + 45 + 8 + 8 + 64 + 16 + 32 + 32 + 10 + 10) / 456)
    assert [tuple(bar) for bar in told.bars] == [
        (1, 16, 2),
        (17, 32, 3),
        (33, 48, 1),
        (49, 64, 1),
        (65, 80, 1),
        (81, 96, 1),
        (97, 112, 0),
        (113, 128, 1),
    ]
    over = summarise(lengths, range(11), 64)
    assert over is not None
    assert over.over == 3
    assert [bar.last for bar in over.bars][7::8] == [64, 128]
    # Far from the context, the bars are of the lengths that there are.
    far = summarise(lengths, range(11), 131_072)
    assert far is not None
    assert far.bars[0][:2] == (1, 16)
    twenty = summarise(DataLengths.of([SampleLength(each, 1, 0) for each in range(1, 21)]), range(20), None)
    assert twenty is not None
    assert (twenty.median, twenty.p95, twenty.over) == (10, 19, 0)
    assert summarise(DataLengths.of([None]), [0], None) is None


def test_shards_and_lines_are_read_as_files_are(zoo: Path) -> None:
    lines = zoo / "data.jsonl"
    lines.write_text("\n".join([json.dumps(record("good.jpg")), '{"id": ', json.dumps(record("cut.jpg"))]))
    check = check_conversations(open_records(lines))
    assert [(finding.kind, finding.index) for finding in check.findings] == [("record", 1), ("broken image", 2)]
    shard = zoo / "shard-0.tar"
    with tarfile.open(shard, "w") as target:
        for index, name in enumerate(["good.jpg", "cut.jpg"]):
            for suffix, body in (("jpg", (zoo / name).read_bytes()), ("json", json.dumps(record("x")).encode())):
                entry = tarfile.TarInfo(f"{index:04}.{suffix}")
                entry.size = len(body)
                target.addfile(entry, io.BytesIO(body))
    status, text = run("--data", shard, "--workers", "2")
    assert status == 1
    assert "broken image: 1" in text
    assert "0001.jpg" in text
    assert run("--data", shard, "--limit", "1", "--workers", "0")[0] == 0
    with pytest.raises(VlmError, match="--sample 1 draws samples by their number"):
        run("--data", shard, "--sample", "1")


def test_a_quick_look_takes_some_of_the_samples(zoo: Path) -> None:
    path = written(zoo, *[record("good.jpg")] * 50, record("cut.jpg"))
    assert run("--data", path, "--limit", "50", "--workers", "0")[0] == 0
    assert "samples:       5, " in run("--data", path, "--sample", "5", "--workers", "0")[1]
    assert run("--data", path, "--sample", "500", "--workers", "0")[0] == 1
    assert run("--data", path, "--headers", "--workers", "0")[0] == 0
    with pytest.raises(VlmError, match="give one of them"):
        run("--data", path, "--limit", "5", "--sample", "5")


def test_settings_come_from_a_file_too(zoo: Path) -> None:
    good = written(zoo, record("good.jpg"))
    bad = zoo / "bad.json"
    bad.write_text(json.dumps([record("none.png")]))
    settings = zoo / "train.toml"
    settings.write_text(f'data = "{good}"\neval_data = "{bad}"\noutput = "{zoo}/run"\nimage_folder = "{zoo}"\n')
    status, text = run(settings, "--workers", "0")
    assert status == 1
    assert text.count("data: ") == 2
    assert not (zoo / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "there is nothing to check; give --data"),
        (["--data", "none.json"], r"none\.json: cannot be read"),
        (["--data", "data.json", "--image-folder", "none"], "the image folder 'none' is no folder"),
        (["--data", "data.json", "--llm", "tiny"], "give all three"),
        (["--data", "data.json", "--llm", "/none", "--encoder", "tiny-digits", "--connector", "mlp"], "does not exist"),
        (["--data", "data.json", "--model", "none"], "is no model checkpoint"),
        (["--data", "data.json", "--json", "good.jpg/x.json", "--workers", "0"], "cannot be written"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    written(zoo, record("good.jpg"))
    monkeypatch.chdir(zoo)
    with pytest.raises(VlmError, match=sentence):
        run(*arguments)


def test_the_command_itself_ends_with_its_status_and_without_a_traceback(zoo: Path) -> None:
    path = written(zoo, record("cut.jpg"))
    for arguments, status in (["--data", str(path)], 1), (["--data", "none.json"], 1):
        done = subprocess.run(
            [sys.executable, "-m", "vlm_encoders", "check-data", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status
        assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: none.json: cannot be read")


def test_without_an_llm_neither_torch_nor_transformers_is_imported(zoo: Path) -> None:
    path = written(zoo, record("good.jpg"))
    script = (
        "import sys\n"
        f"sys.argv = ['vlm-encoders', 'check-data', '--data', {str(path)!r}]\n"
        "from vlm_encoders.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert not {'torch', 'transformers', 'torchvision'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


class Counter:
    """Stands for a processor: as many tokens as the words of the answer, none of them learned after a "no"."""

    image_token = "<image>"
    max_length = 4

    def measure(self, messages: list[dict[str, str]], sizes: list[tuple[int, int]]) -> SampleLength:
        words = messages[-1]["content"].split()
        if "bad" in words:
            raise VlmError("the template is bad")
        return SampleLength(len(words) + len(sizes), 0 if "no" in words else len(words), len(sizes))


def test_samples_that_cannot_be_learned_are_told(zoo: Path) -> None:
    answers = ["a b", "no b", "a bad one", "a b c d"]
    path = written(zoo, *[record("good.jpg", answer) for answer in answers])
    check = check_conversations(open_records(path), processor=Counter())  # type: ignore[arg-type]
    assert [(finding.kind, finding.index) for finding in check.findings] == [
        ("nothing supervised", 1),
        ("cannot be counted", 2),
        ("longer than the context", 3),
    ]
    assert check.lengths is not None
    assert list(check.lengths.tokens) == [3, 3, None, 5]
    assert (check.errors, check.bad_samples, check.max_length) == (3, 3, 4)
