"""A sample of `make conformance`, and what its page says."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
CONFIGURATIONS = ROOT / "tests" / "data" / "transformers_configurations.json"
ROWS = json.loads(CONFIGURATIONS.read_text(encoding="utf-8"))
# One configuration of each class, its smallest: the first of the table.
FIRST = [number for number, row in enumerate(ROWS) if row["source"] not in {other["source"] for other in ROWS[:number]}]


@pytest.fixture(scope="module")
def conformance() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conformance", ROOT / "docs" / "conformance.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(conformance: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    names: list[str] = conformance.names("transformers", tmp_path_factory.mktemp("configurations"))
    return names


@pytest.mark.parametrize("number", FIRST, ids=[ROWS[number]["source"] for number in FIRST])
def test_each_class_of_transformers_keeps_the_contract(
    conformance: ModuleType, folders: list[str], number: int
) -> None:
    assert conformance.check(folders[number]) == (folders[number], "")


def test_configurations_tell_their_prefix_and_parameters(folders: list[str]) -> None:
    from vlm_encoders import encoder_spec

    for name, row in zip(folders, ROWS, strict=True):
        assert encoder_spec(name).num_prefix == row["num_prefix"], row["hub"]


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_a_sample_of_names_keeps_the_contract(conformance: ModuleType, tmp_path: Path, library: str) -> None:
    names = conformance.names(library, tmp_path)
    sample = names[:: len(names) // 4]
    assert [conformance.check(name) for name in sample] == [(name, "") for name in sample]


def test_a_broken_name_is_counted_and_named(conformance: ModuleType) -> None:
    name, reason = conformance.check("timm:no_such_model")
    assert reason.startswith("UnknownNameError: timm has no model 'no_such_model'")
    text = conformance.report({"timm": {"timm:a": "", name: reason}})
    assert "| 2 | 1 |" in text
    assert f"- `{name}`: {reason}" in text


def test_the_page_counts_all_there_is(conformance: ModuleType, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    counts = dict(re.findall(r"^\| (\w+) \|[^|]*\| (\d+) \|", page, re.MULTILINE))
    expected = Counter({library: len(conformance.names(library, tmp_path / library)) for library in conformance.WHAT})
    assert counts == {library: str(count) for library, count in expected.items()}
