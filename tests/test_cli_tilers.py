"""The cards of tilers: what `info` says of them, what it does not import, and the page that says it too."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from connectors import list_connectors
from connectors.errors import UnknownNameError, VlmError
from vlm_encoders import list_encoders
from vlm_encoders.budget import image_counts
from vlm_encoders.cli.main import app
from vlm_encoders.report.docstring import class_meanings
from vlm_encoders.report.tile_words import short_prompt
from vlm_encoders.report.tiler_card import IMAGE_SIZE, tiler_card
from vlm_encoders.tiling import PRESETS, build_tiler

ROOT = Path(__file__).parent.parent
HEAVY = {"PIL", "accelerate", "matplotlib", "numpy", "open_clip", "timm", "torch", "torchvision", "transformers"}


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["info", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """The script that writes the page."""
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "docs" / "update_readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PRESETS)
def test_a_card_names_every_option(name: str) -> None:
    preset = PRESETS[name]
    card, _, table = run(name).partition("\n\n")
    for words in (preset.encoder, preset.connector, preset.source, (preset.tiler.__doc__ or "").splitlines()[0][:-1]):
        assert words in card
    rows = {line.split()[0]: line for line in table.splitlines()[2:]}
    assert list(rows) == [field.name for field in fields(preset.tiler) if field.init]
    assert all(option.meaning and rows[option.name].endswith(option.meaning) for option in tiler_card(name).options)


@pytest.mark.parametrize("name", PRESETS)
def test_defaults_are_written_as_options_are_read(name: str) -> None:
    spec = PRESETS[name].spec()
    options = ",".join(f"{option.name}={option.default}" for option in tiler_card(name).options)
    assert build_tiler(f"{name}:{options}") == build_tiler(name, spec)


@pytest.mark.parametrize("name", [*PRESETS, "ureader:markers=true", "llava-uhd:square=true", "idefics3:split=false"])
def test_marks_are_those_of_the_prompt(name: str) -> None:
    preset = PRESETS[name.partition(":")[0]]
    spec = preset.spec()
    if "square" in name:
        spec = spec.resized(224)
    counts = image_counts(spec, preset.connector, build_tiler(name, spec))
    pieces = counts.pieces(counts.plan(IMAGE_SIZE))
    shown = short_prompt(["(n)" if isinstance(piece, int) else piece for piece in pieces])
    assert tiler_card(name).prompt == (shown if len(pieces) > 1 else "")


def test_options_asked_for_stand_beside_the_defaults() -> None:
    (row,) = [line for line in run("internvl:max_tiles=6").splitlines() if line.startswith("max_tiles ")]
    assert row.split()[:3] == ["max_tiles", "6", "12"]
    assert "at most 7" in run("internvl:max_tiles=6")
    assert re.search(r"marks: +none", run("internvl:markers=false"))
    assert re.search(r"marks: +<img>\(n\)</img> ", run("internvl"))
    assert "1x1/1x2/1x3/.../6x6 (36)" in run("llava-onevision")


def test_meanings_of_parents_hold_where_a_class_has_none() -> None:
    class Parent:
        """A parent.

        Attributes:
            one: of the parent.
            two: of the
                parent too.
        """

    class Child(Parent):
        """A child.

        Args:
            one: of the child.
        """

    assert class_meanings(Child) == {"one": "of the child", "two": "of the parent too"}


def test_names_of_tilers_are_of_nothing_else() -> None:
    assert not set(PRESETS) & {*list_encoders(), *list_connectors()}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["intern-vl"], "no encoder, connector, tiler or stage 'intern-vl'; did you mean internvl"),
        (["intern-vl:max_tiles=6"], "no tiler 'intern-vl'; did you mean internvl"),
        (["zzzz"], "of tilers known are "),
        (["internvl:max_tile=6"], "tiler 'internvl' has no option 'max_tile'; it takes .*; did you mean max_tiles"),
        (["internvl", "--image-size", "448"], "'internvl' is a tiler; --image-size and --feature-layer are of encod"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(VlmError, match=sentence):
        run(*arguments)


def test_a_card_of_no_tiler_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="no tiler 'zzz'"):
        tiler_card("zzz")


def test_nothing_heavy_is_imported() -> None:
    script = (
        "import sys\n"
        "from vlm_encoders.cli.main import app\n"
        f"for name in {list(PRESETS)!r}:\n"
        "    app(['info', name], standalone_mode=False)\n"
        f"print('HEAVY', sorted(set(sys.modules) & {HEAVY!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_the_page_is_current(generator: ModuleType) -> None:
    page = (ROOT / "docs" / "tilers.md").read_text(encoding="utf-8")
    assert generator.tiler_page() == page, "run python docs/update_readme.py"
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == list(PRESETS)


def test_the_tilers_that_the_page_writes_are_read() -> None:
    head = (ROOT / "docs" / "tilers.md").read_text(encoding="utf-8").split("\n## ")[0]
    written = [each for each in re.findall(r"`([\w.-]+:[^`]+=[^`]+)`", head) if each.partition(":")[0] in PRESETS]
    assert len(written) >= 5
    for each in written:
        build_tiler(each)
