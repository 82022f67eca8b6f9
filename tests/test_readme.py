"""The README tells the truth: its tables are current and its Python runs."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vlm_encoders import PartPolicy, TrainConfig
from vlm_encoders.training.policy_file import stage_policy

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def generator() -> ModuleType:
    """The script that writes the generated parts."""
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "docs" / "update_readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_current(generator: ModuleType) -> None:
    assert generator.updated(README) == README, "run python docs/update_readme.py"
    page = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8")
    assert generator.all_encoders() == page, "run python docs/update_readme.py"
    training = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert generator.training_page(training) == training, "run python docs/update_readme.py"


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == 7


def test_the_policy_on_the_page_of_training_is_one(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(snippet.replace("StagePolicy(\n", "policy = StagePolicy(\n", 1), names)  # noqa: S102
    policies = names["policy"].policies("encoder")  # type: ignore[attr-defined]
    assert [policy.words() for policy in policies] == ["frozen", "last 50% of the blocks, layer decay 0.9"]
    (table,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    (tmp_path / "mine.toml").write_text(table)
    from_file = stage_policy(str(tmp_path / "mine.toml"))
    assert dataclasses.replace(from_file, name="mine") == names["policy"]


def test_settings_named_on_the_page_of_training_exist() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    named = set(re.findall(r"`(\w+) = ", text)) | set(re.findall(r"`(\w+)=[\w\"]", text))
    policy = {field.name for field in dataclasses.fields(PartPolicy)}
    assert named <= known | policy, named - known - policy
    assert {"pack_tokens", "token_cache", "mixed_precision", "on_bad_sample"} <= named


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet: str, tmp_path: Path) -> None:
    """Run a snippet, with random weights and the embedded LLM where the hub would be asked."""
    Image.new("RGB", (80, 60)).save(tmp_path / "photo.jpg")
    if "mm_projector" in snippet:
        shapes = {"0.weight": (4096, 8), "0.bias": (4096,), "2.weight": (4096, 4096), "2.bias": (4096,)}
        projector = {f"model.mm_projector.{key}": torch.zeros(shape) for key, shape in shapes.items()}
        save_file(projector, tmp_path / "mm_projector.safetensors")
    code = snippet.replace('encoder("clip-vit-l-14-336")', 'encoder("clip-vit-l-14-336", pretrained=False)')
    code = code.replace('"Qwen/Qwen2.5-0.5B-Instruct")', "llm_folder(), pretrained=False)")
    code = code.replace("siglip-so400m-14-384", "siglip-b-16-384")
    code = "from vlm_encoders.tiny import llm_folder\n" + code
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_every_command_of_the_readme_exists() -> None:
    known = {"demo", "list", "info", "encode", "budget", "compare", "tiles", "check-data", "train", "generate"}
    commands = set(re.findall(r"^vlm-encoders ([a-z-]+)", README, re.MULTILINE))
    assert commands <= known
    assert known - {"demo"} <= commands


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)h#][^)]*)\)", README))))
def test_local_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link.partition("#")[0]).exists()
