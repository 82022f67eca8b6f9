"""The command: what it prints, what it does not import, and how it tells a mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from connectors import MLP, list_connectors
from connectors.base import CONNECTORS
from connectors.errors import VlmError
from vlm_encoders.cli.main import app

HEAVY = (
    "PIL",
    "accelerate",
    "matplotlib",
    "numpy",
    "open_clip",
    "peft",
    "timm",
    "torch",
    "torchvision",
    "transformers",
)


def run(*arguments: str) -> str:
    """Run a sub-command in this process and give what it prints; a VlmError is raised on."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the real command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "vlm_encoders", *arguments], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of 640x480 px, wider than high."""
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((640, 480)).convert("RGB").save(path)
    return path


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["info", "clip-vit-l-14-336"], ["train", "--help"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        f"sys.argv = ['vlm-encoders', *{arguments!r}]\n"
        "from vlm_encoders.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print('HEAVY', sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_list_filters_by_pattern_and_family() -> None:
    output = run("list", "*-l-14*", "--family", "clip")
    names = [line.split()[0] for line in output.splitlines()[2:]]
    assert {"clip-vit-l-14", "clip-vit-l-14-336"} <= set(names)
    assert all("-l-14" in name for name in names)
    assert "576" in output


def test_list_connectors() -> None:
    done = command("list", "--connectors")
    assert done.returncode == 0, done.stderr
    header, _, *rows = done.stdout.splitlines()
    assert header.split() == ["connector", "recipe", "tokens", "grid", "params", "FLOPs", "choose", "it"]
    assert [row.split()[0] for row in rows] == list_connectors()
    (shuffle,) = [row for row in rows if row.startswith("pixel_shuffle")]
    assert shuffle.split()[1:6] == ["pixel_shuffle:factor=2+mlp", "144", "12x12", "33.6M", "9.7G"]
    # Columns are found by the header, as in any table that is piped.
    start = header.index("choose it")
    assert all(CONNECTORS.get(row.split()[0]).choose == row[start:] for row in rows)
    assert "24x24 tokens of width 1024" in done.stderr


def test_list_connectors_filters_by_pattern() -> None:
    listed = run("list", "--connectors", "*qformer")
    assert [row.split()[0] for row in listed.splitlines()[2:4]] == ["instruct_qformer", "qformer"]
    with pytest.raises(VlmError, match=r"no connector matches 'nothing\*'; known are avg_pool, "):
        run("list", "--connectors", "nothing*")


def test_info_prints_the_card_of_a_connector() -> None:
    card = run("info", "mlp")
    assert "class:         connectors.mlp.MLP" in card
    assert "options:       depth=2; activation=gelu; hidden (int); norm=none; bias=true; dim (int)" in card
    assert "tokens:        576 of width 4096, a grid of 24 rows by 24 columns" in card
    assert "parameters:    21.0M in all, 21.0M of them in mlp" in card
    for words in (MLP.source, MLP.used_by, MLP.choose):
        assert words in card
    assert "no grid" in run("info", "qformer")
    with pytest.raises(VlmError, match="'mlp' is a connector; --image-size and --feature-layer are of encoders"):
        run("info", "mlp", "--image-size", "224")


def test_list_without_a_match_names_the_families() -> None:
    with pytest.raises(VlmError, match=r"families are .*clip, "):
        run("list", "nothing*")


def test_info_prints_the_card_at_another_size() -> None:
    card = run("info", "dinov2-vit-s-14", "--image-size", "518")
    assert "1369 of width 384, a grid of 37 rows by 37 columns" in card
    assert "1 tokens, kept apart" in card


def test_budget_of_a_picture(photo: Path) -> None:
    output = run("budget", "--connector", "mlp", "--tiler", "anyres", "--image", str(photo), "--released")
    assert "2340" in output  # LLaVA-NeXT's own count for 480x640
    assert "BLIP-2" in output


def test_budget_as_json_is_whole() -> None:
    (row,) = json.loads(run("budget", "--connector", "pixel_shuffle:factor=2+mlp", "--size", "336x336", "--json"))
    assert (row["total"], row["grid"], row["encoder"]) == (144, [12, 12], "clip-vit-l-14-336")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["budget", "--size", "big"], "'big' is no size; write HEIGHTxWIDTH"),
        (["budget", "--connector", "pixelshuffle"], "no connector 'pixelshuffle'; did you mean pixel_shuffle?"),
        (["budget", "--connector", "pixel_shuffle:factor=2"], "ends at width 4096|end it with mlp"),
        (
            ["info", "clip-vit-l-41"],
            "no encoder, connector, tiler or stage 'clip-vit-l-41'; did you mean clip-vit-l-14",
        ),
        (["info", "pixel_shufle"], "no encoder, connector, tiler or stage 'pixel_shufle'; did you mean pixel_shuffle"),
        (
            ["info", "pixel-shuffle"],
            "no encoder, connector, tiler or stage 'pixel-shuffle'; did you mean pixel_shuffle",
        ),
        (["info", "MLP"], "no encoder, connector, tiler or stage 'MLP'; did you mean mlp"),
        (
            ["info", "zzzz"],
            "tiler or stage 'zzzz'; of connectors known are .*; of encoders known are .*; of tilers known are ",
        ),
        (["info", "pixel_shuffle:factor=2+mlp"], "is a connector's recipe; info pixel_shuffle shows its first link, "),
        (["info", "residual(norm+mlp)"], r"budget --connector 'residual\(norm\+mlp\)' costs it"),
        (["info", "mpl+linear"], r"'mpl\+linear' is a connector's recipe; budget --connector 'mpl\+linear' costs it"),
        (["info", "timmy:vit"], "no encoder 'timmy:vit'; a name with a colon begins with one of"),
        (["info", "fused:clip-vit-l-14+nope"], "no encoder 'nope'"),
        (
            ["list", "--connectors", "--family", "clip"],
            "connectors are not chosen by --family; leave that out, or --connectors",
        ),
        (
            ["list", "--connectors", "--tokens", "9", "--dim", "8", "--licence", "mit"],
            "--tokens and --dim and --licence",
        ),
        (["info", "dinov2-vit-s-14", "--image-size", "330"], "330 is not a multiple of 14; use 322 or 336"),
        (["train", "--data", "x.json"], "training needs --output"),
        (["generate", "nowhere", "--prompt", "hi"], "'nowhere' is no model checkpoint"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str) -> None:
    if arguments[-1].endswith("factor=2"):
        arguments = [*arguments, "--llm-dim", "512"]
    with pytest.raises(VlmError, match=sentence):
        run(*arguments)


def test_a_mistake_is_told_without_traceback_and_with_a_status() -> None:
    done = command("info", "clip-vit-l-41")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: no encoder, connector, tiler or stage 'clip-vit-l-41'")
    assert len(done.stderr.splitlines()) == 1


def test_encode_writes_tokens(photo: Path, tmp_path: Path) -> None:
    output = tmp_path / "tokens.safetensors"
    printed = run("encode", str(photo), str(photo), "--encoder", "tiny-digits", "--output", str(output))
    assert "8x8" in printed
    assert load_file(output)["tokens"].shape == (2, 64, 128)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing.png", None, "missing.png"),
        ("empty.png", b"", "empty.png"),
        ("text.png", b"no picture at all", "text.png"),
    ],
)
def test_encode_names_a_picture_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes | None, sentence: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VlmError, match=sentence):
        run("encode", str(path))
