"""The picture of tiles: what the command counts, draws and refuses, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from typer.testing import CliRunner

from connectors.errors import UnknownNameError, VlmError
from vlm_encoders.budget import image_counts, token_budget
from vlm_encoders.cli.main import app
from vlm_encoders.report.tile_figure import draw_tiles
from vlm_encoders.report.tile_words import TilePanel, caption, headline, short_prompt
from vlm_encoders.tiling import PRESETS, build_tiler

GREEN = (0, 255, 0)
SIZES = [(1, 1), (100, 3000), (3000, 100), (480, 640)]
HEADERS = ["tiler", "image", "views", "grid", "per view", "image tokens", "marks", "total"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A green picture of 640x480 px."""
    path = tmp_path / "photo.png"
    Image.new("RGB", (640, 480), GREEN).save(path)
    return path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["tiles", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def told(*arguments: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(run(*arguments, "--no-picture", "--json"))
    return rows


def panel(name: str, image_size: tuple[int, int]) -> TilePanel:
    preset = PRESETS[name.partition(":")[0]]
    spec = preset.spec()
    counts = image_counts(spec, preset.connector, build_tiler(name, spec))
    return TilePanel(name, preset.connector, counts, counts.plan(image_size))


def pixels(path: Path) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


def test_the_table_counts_what_the_budget_counts(photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    header, _, *rows = run(str(photo), "--out", str(out)).splitlines()
    assert [" ".join(cell.split()) for cell in header.split("  ") if cell] == HEADERS
    assert [row.split() for row in rows] == [
        ["llava-next", "480x640", "5", "2x2", "576", "2340", "0", "2340"],  # LLaVA-NeXT's own count
        ["internvl", "480x640", "13", "3x4", "256", "3328", "2", "3330"],  # 13 views, <img> and </img>
    ]
    assert out.stat().st_size > 10_000


@pytest.mark.parametrize("name", PRESETS)
def test_every_tiler_is_told_with_its_released_pair(name: str) -> None:
    for height, width in SIZES:
        (row,) = told("--size", f"{height}x{width}", "--tiler", name, "--prompt")
        preset = PRESETS[name]
        budget = token_budget(preset.spec(), preset.connector, tiler=name, image_size=(height, width))
        assert (row["encoder"], row["connector"]) == (preset.encoder, preset.connector)
        assert (row["views"], row["image_tokens"], row["marks"]) == (budget.views, budget.total, budget.markers)
        assert row["total"] == row["image_tokens"] + row["marks"]
        assert sum(piece for piece in row["prompt"] if isinstance(piece, int)) == row["image_tokens"]
        assert sum(page["grid"][0] * page["grid"][1] for page in row["pages"]) == row["views"]


def test_encoder_connector_options_and_a_limit_are_taken() -> None:
    (row,) = told("--size", "900x900", "--tiler", "llava-next", "--max-tokens", "2000")
    assert row["image_tokens"] <= 2000
    assert row["image_tokens"] > 576
    (row,) = told("--size", "900x900", "--tiler", "internvl:max_tiles=2,markers=false")
    assert (row["views"], row["marks"]) == (1, 0)
    pair = ("--encoder", "siglip-so400m-14-384", "--connector", "avg_pool:factor=3+mlp")
    (row,) = told("--size", "900x900", "--tiler", "internvl", *pair)
    assert (row["encoder"], row["image_tokens"]) == ("siglip-so400m-14-384", row["views"] * 81)
    printed = run("--size", "30x30", "--tiler", "qwen2-vl", "--no-picture", "--prompt")
    assert printed.splitlines()[-1].split() == ["qwen2-vl", "<|vision_start|>(4)<|vision_end|>"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "there is nothing to cut; give a picture file, or --size HEIGHTxWIDTH"),
        (["PHOTO", "--size", "3x3"], "both a picture .* and a size .* were given; give one"),
        (["PHOTO", "--out", "PHOTO"], "would be written over the picture"),
        (["PHOTO", "--out", "map.txt"], "does not end like a picture"),
        (["PHOTO", "--out", "nowhere/map.png"], "the folder of 'nowhere/map.png' does not exist"),
        (["--size", "3by3"], "'3by3' is no size"),
        (["--size", "0x3"], "at least 1 px"),
        (["--size", "9x9", "--tiler", "internvl", "--max-tokens", "9"], "needs at least 258 tokens"),
        (["--size", "9x9", "--tiler", "internvl", "--encoder", "clip-vit-l-14-336:"], "no encoder"),
    ],
)
def test_mistakes_are_one_sentence(photo: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(VlmError, match=sentence):
        run(*[str(photo) if each == "PHOTO" else each for each in arguments])


def test_an_unknown_tiler_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="no tiler 'intern-vl'; did you mean internvl"):
        run("--size", "9x9", "--tiler", "intern-vl", "--no-picture")


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    tilers = ["tiles", "--size", "480x640", "--tiler", "qwen2-vl", "--tiler", "idefics3", "--tiler", "timm-naflex"]
    heavy = {"accelerate", "open_clip", "peft", "timm", "torchvision", "transformers"}
    script = (
        "import sys\n"
        "from vlm_encoders.cli.main import app\n"
        f"app([*{tilers!r}, '--no-picture'], standalone_mode=False)\n"
        f"print('HEAVY', sorted(set(sys.modules) & {heavy | {'matplotlib', 'PIL'}!r}))\n"
        f"app([*{tilers!r}, '--out', {str(tmp_path / 'map.png')!r}], standalone_mode=False)\n"
        f"print('HEAVY', sorted(set(sys.modules) & {heavy!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("HEAVY")] == ["HEAVY []"] * 2


def test_the_picture_shows_the_image_on_its_canvas_and_padding_as_padding(photo: Path, tmp_path: Path) -> None:
    picture = Image.open(photo)
    shares = {}
    for name in ("squash", "pad"):
        out = tmp_path / f"{name}.png"
        draw_tiles(picture, [panel(name, (480, 640))], out)
        drawn = pixels(out)
        inside = (drawn < 250).any(-1)
        rows, columns = np.nonzero((drawn == GREEN).all(-1))
        box = (np.ptp(rows) + 1, np.ptp(columns) + 1)
        shares[name] = box[0] / box[1]
        assert inside.any()
    # The view is a square: squashed, the image fills it; padded, it keeps its own shape.
    assert shares["squash"] == pytest.approx(1, abs=0.02)
    assert shares["pad"] == pytest.approx(480 / 640, abs=0.02)


def test_tiles_have_borders_and_the_thumbnail_stands_beside(photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    draw_tiles(Image.open(photo), [panel("llava-next", (480, 640))], out)
    drawn = pixels(out)
    orange = (np.abs(drawn.astype(int) - (0xE8, 0x71, 0x0A)) < 40).all(-1)
    # Three lines run along each side of a 2x2 grid, and two along the thumbnail's.
    down = _runs(orange.sum(0) > 0.5 * orange.sum(0).max())
    across = _runs(orange.sum(1) > 0.5 * orange.sum(1).max())
    assert (down, across) == (3, 3)
    assert _runs(orange.any(0)) == 2


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf", ".jpg"])
def test_every_format_is_drawn(ending: str, tmp_path: Path) -> None:
    out = tmp_path / f"map{ending}"
    draw_tiles(Image.new("RGB", (8, 8), GREEN), [panel("smolvlm", (480, 640))], out)
    assert out.stat().st_size > 5_000


def test_no_text_of_any_tiler_overlaps_or_leaves_the_sheet(tmp_path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sheets: list[Figure] = []
    saved = Figure.savefig
    names = [*PRESETS, "internvl:min_tiles=36,max_tiles=36", "tiles:overlap=112"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *_, **__: sheets.append(figure))
        for size in ((100, 3000), (4000, 3000)):
            draw_tiles(Image.new("RGB", (8, 8)), [panel(name, size) for name in names], tmp_path / "map.png")
    assert Figure.savefig is saved
    for sheet in sheets:
        renderer = FigureCanvasAgg(sheet).get_renderer()
        loose = [text.get_window_extent(renderer) for text in sheet.texts]
        width, height = sheet.bbox.width, sheet.bbox.height
        assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in loose)
        for axes in sheet.axes:
            written = [text.get_window_extent(renderer).shrunk(0.9, 0.7) for text in axes.texts]
            boxes = [*loose, *written]
            assert not any(one.overlaps(other) for at, one in enumerate(boxes) for other in boxes[at + 1 :])
            assert all(text.get_fontsize() >= 5 for text in axes.texts)


def test_words_above_a_panel_add_up() -> None:
    assert headline(panel("internvl", (480, 640))) == "internvl: 3,328 tokens + 2 marks"
    options = "internvl:max_tiles=12,thumbnail=true"
    assert headline(panel(options, (480, 640))) == "internvl:max_til...: 3,328 tokens + 2 marks"
    lines = caption(panel("llava-next", (480, 640)))
    assert lines == [
        "clip-vit-l-14-336 + mlp",
        "480x640 px in 5 views: a thumbnail and 2x2 of 336x336 px",
        "resized to 504x672 on a canvas of 672x672 px",
        "1 x 576 + 4 x 576 = 2,880, padding dropped, row ends added: 2,340",
    ]
    assert caption(panel("s2", (480, 640)))[-1] == "3 scales joined: 1 x 576 = 576"
    assert caption(panel("whole", (480, 640)))[1:] == ["480x640 px in 1 view of 336x336 px, by crop", "24x24 tokens"]
    assert "brought down" in caption(panel("llava-onevision", (4000, 4000)))[-1]
    assert "brought down" not in caption(panel("llava-onevision", (480, 640)))[-1]


def test_a_crop_is_drawn_beyond_the_view() -> None:
    crop, pad = panel("crop", (100, 300)), panel("pad", (100, 300))
    assert crop.content(0) == (0, -336, 336, 1008)
    assert pad.content(0) == pytest.approx((112, 0, 112, 336))


def test_a_long_prompt_is_shortened_in_its_middle() -> None:
    assert short_prompt(["<img>", 7, "\n"]) == "<img>(7)\\n"
    long = short_prompt([piece for number in range(99) for piece in (f"<row_{number}>", 64)])
    assert len(long) < 200
    assert long.startswith("<row_0>(64)")
    assert long.endswith("<row_98>(64)")
    assert " ...1" in long


def test_a_picture_is_written_over_as_by_other_commands(photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.jpg"
    out.write_bytes(b"old")
    run(str(photo), "--tiler", "whole", "--out", str(out))
    assert Image.open(out).format == "JPEG"
    with pytest.raises(VlmError, match="there is no plan to draw"):
        draw_tiles(Image.new("RGB", (8, 8)), [], out)


def test_the_default_pair_of_a_preset_is_in_its_size() -> None:
    (row,) = told("--size", "364x364", "--tiler", "idefics3:longest_edge=364")
    assert row["pages"][0]["view"] == [364, 364]


def _runs(line: npt.NDArray[np.bool_]) -> int:
    """Count the stretches of true values."""
    return int((np.diff(np.concatenate([[False], line]).astype(int)) == 1).sum())


def test_tilers_are_listed_with_what_they_do() -> None:
    result = CliRunner().invoke(app, ["list", "--tilers"], catch_exceptions=False)
    header, _, *rows = result.stdout.splitlines()
    assert header.split() == ["tiler", "encoder", "connector", "what", "it", "does", "source"]
    assert [row.split()[0] for row in rows] == list(PRESETS)
    for row, preset in zip(rows, PRESETS.values(), strict=True):
        assert all(words in row for words in (preset.encoder, preset.connector, preset.source))
    assert "(resize=expand)" in rows[list(PRESETS).index("pad")]
    result = CliRunner().invoke(app, ["list", "--tilers", "qwen*"], catch_exceptions=False)
    assert [row.split()[0] for row in result.stdout.splitlines()[2:]] == ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tilers", "nothing*"], r"no tiler matches 'nothing\*'; known are whole, "),
        (["--tilers", "--family", "clip"], "tilers are not chosen by --family; leave that out, or --tilers"),
        (["--tilers", "--connectors"], "--connectors and --tilers are two lists; ask for one"),
    ],
)
def test_a_wrong_list_is_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(VlmError, match=sentence):
        CliRunner().invoke(app, ["list", *arguments], catch_exceptions=False)


def test_the_budget_command_takes_tilers_with_their_released_pair() -> None:
    arguments = ["budget", "--size", "480x640", "--json", "--tiler", "idefics3", "--tiler", "internvl:max_tiles=6"]
    rows = json.loads(CliRunner().invoke(app, [*arguments, "--max-tokens", "1000"], catch_exceptions=False).stdout)
    assert [(row["tiler"], row["encoder"]) for row in rows] == [
        ("idefics3", PRESETS["idefics3"].encoder),
        ("internvl:max_tiles=6", PRESETS["internvl"].encoder),
    ]
    assert all(row["total"] <= 1000 and row["markers"] for row in rows)
    table = CliRunner().invoke(app, arguments[:3] + arguments[4:], catch_exceptions=False).stdout.splitlines()
    assert table[0].split()[6:8] == ["tokens", "marks"]
    plain = CliRunner().invoke(app, ["budget", "--connector", "mlp"], catch_exceptions=False).stdout
    assert "marks" not in plain
