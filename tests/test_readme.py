"""The README tells the truth: its tables are current and its Python runs."""

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


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == 7


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
    known = {"demo", "list", "info", "encode", "budget", "compare", "tiles", "train", "generate"}
    commands = set(re.findall(r"^vlm-encoders ([a-z]+)", README, re.MULTILINE))
    assert commands <= known
    assert known - {"demo"} <= commands


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)h#][^)]*)\)", README))))
def test_local_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link.partition("#")[0]).exists()
