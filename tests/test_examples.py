"""Every example runs as it stands, and the plugin is found once it is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("[0-9]*.py"))


def run(*command: str, path: str = "") -> str:
    """Run a command with one more folder to import from, and give what it prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_nine_short_examples() -> None:
    assert [script.name[:2] for script in SCRIPTS] == ["01", "02", "03", "04", "05", "06", "07", "08", "09"]
    for script in SCRIPTS:
        assert len(script.read_text().splitlines()) < 60, script.name


@pytest.mark.parametrize(
    ("number", "arguments", "shown"),
    [
        ("01", [], "grid (8, 8)"),
        ("02", [], "pixel_shuffle:factor=2+mlp"),
        ("03", [], "connector"),
        ("04", ["--steps", "3"], "trained connector"),
        ("05", [], "TokenSpec(num_tokens=24, dim=48, grid=(4, 6), num_prefix=0)"),
        ("06", [], "encoded: tokens (1, 256, 256), grid (16, 16); 8 blocks in all"),
        ("07", [], "written back under the same names, with the same values: True"),
        ("08", [], "9 pictures of 448x448 px"),
        ("09", ["--steps", "2"], "last 1 block"),
    ],
)
def test_example_runs(number: str, arguments: list[str], shown: str, tmp_path: Path) -> None:
    (script,) = EXAMPLES.glob(f"{number}_*.py")
    if number in {"04", "09"}:
        arguments = [*arguments, "--output", str(tmp_path / "run")]
    assert shown in run(sys.executable, str(script), *arguments)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder that the example plugin is installed to."""
    target = tmp_path_factory.mktemp("plugin")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    run(*install, "--target", str(target), str(EXAMPLES / "plugin"))
    return str(target)


def test_the_plugin_is_found_by_the_command(plugin: str) -> None:
    assert "example-vit-tiny" in run(sys.executable, "-m", "vlm_encoders", "list", path=plugin)
    assert "strided_rows" in run(sys.executable, "-m", "vlm_encoders", "list", "--connectors", path=plugin)


def test_the_plugin_works_through_the_contracts(plugin: str) -> None:
    script = (
        "from connectors import TokenSpec, build_connector\n"
        "from connectors.testing import check_connector\n"
        "from vlm_encoders.testing import check_encoder\n"
        "spec = TokenSpec(12, 8, (3, 4), 1)\n"
        "check_connector(build_connector('strided_rows:step=2+mlp', spec, 16), spec)\n"
        "check_encoder('example-vit-tiny')\n"
        "print('both hold')"
    )
    assert "both hold" in run(sys.executable, "-c", script, path=plugin)
