"""The page of connectors: current, measured, and true by hand where a hand can follow; and the keys of checkpoints."""

import importlib.util
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest
import torch

from connectors import TokenSpec, build_connector, list_connectors
from connectors.base import CONNECTORS
from connectors.recipe import connector_options
from vlm_encoders import encoder_spec
from vlm_encoders.report.connector_card import connector_card
from vlm_encoders.report.connector_examples import ENCODER, EXAMPLES, LLM_DIM, VIEW, Example, connector_example
from vlm_encoders.report.connector_figure import LEVELS, draw_connector, measure_dependence

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "connectors.md").read_text(encoding="utf-8")
KEYS = json.loads((ROOT / "tests" / "data" / "connector_keys.json").read_text(encoding="utf-8"))
ALL = len(LEVELS)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """The script that writes the page."""
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "docs" / "update_readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(generator: ModuleType) -> None:
    assert generator.connector_page() == PAGE, "run python docs/update_readme.py"


def test_the_figures_are_current(generator: ModuleType) -> None:
    drawn = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "connectors").glob("*")}
    made = generator.connector_figures()
    assert made.keys() == drawn.keys(), "run python docs/update_readme.py, and remove what is left over"
    for name, svg in made.items():
        assert svg == drawn[name], f"{name}: run python docs/update_readme.py"


@pytest.mark.parametrize("name", list_connectors())
def test_each_connector_is_told_in_full(name: str) -> None:
    section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    cls = CONNECTORS.get(name)
    assert re.search(r"https://\S+", cls.source), "a connector names its paper with its address"
    for words in (cls.source, cls.used_by, cls.choose):
        assert words
        assert words in section
    assert cls.choose[0].islower() or cls.choose[0] == "`"
    assert not cls.choose.endswith(".")
    for option in connector_card(name).options:
        assert option.meaning, f"{name} says nothing of its option {option.name}"
        assert f"| `{option.name}` |" in section
    assert [option.name for option in connector_card(name).options] == list(connector_options(cls))


@pytest.mark.parametrize("name", list_connectors())
def test_the_line_of_code_runs_as_it_stands(name: str) -> None:
    (line,) = re.findall(r"```python\n(.*)\n```", PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0])
    with torch.device("meta"):
        chain = eval(line, {"build_connector": build_connector, "TokenSpec": TokenSpec})  # noqa: S307
    assert name in {link.name for link in chain.connectors}
    assert chain.out_spec(connector_example(name).tokens).dim == LLM_DIM


@pytest.mark.parametrize("name", list_connectors())
def test_a_figure_is_small_and_well_formed(name: str) -> None:
    svg = (ROOT / "docs" / "connectors" / f"{name}.svg").read_text(encoding="utf-8")
    root = ET.fromstring(svg)  # noqa: S314 - our own file
    assert len(svg) < 12_000
    shapes = list(root.iter("{http://www.w3.org/2000/svg}rect"))
    example = connector_example(name)
    out = measure_dependence(example).went
    came = example.small_tokens
    drawn = sum("from" not in shape.get("class", "").split() for shape in shapes)
    assert drawn == came.num_tokens + came.num_prefix + out.num_tokens + out.num_prefix
    assert sum("marked" in shape.get("class", "") for shape in shapes) == 1


def test_the_views_are_those_of_the_encoders() -> None:
    assert encoder_spec(ENCODER).token_spec() == VIEW
    assert encoder_spec(EXAMPLES["sva"].encoder).token_spec() == EXAMPLES["sva"].tokens
    assert encoder_spec(ENCODER).at_layer((-13, -9, -3, -2)).token_spec() == EXAMPLES["token_packer"].tokens


def test_parameters_and_flops_are_those_counted_by_hand() -> None:
    n, d, h = VIEW.num_tokens, VIEW.dim, LLM_DIM
    mlp = 2 * n * (d * h + h * h)
    assert connector_card("mlp").flops == mlp
    assert connector_card("mlp").parameters == d * h + h + h * h + h
    # A convolution of each channel alone: 9 products for each of 12x12 places, not 9 times all channels.
    assert connector_card("ldp_v2").flops == mlp + 2 * 144 * 9 * h
    assert connector_card("ldp_v2").parameters == connector_card("mlp").parameters + 10 * h
    assert connector_card("conv").flops == 2 * 144 * (9 * d * 2048 + 2048 * h)
    # Attention, 64 queries of 8 heads that read the image and themselves, counts its two products.
    queries, both, inner = 64, 64 + n, 8 * 64
    maps = queries * d * inner + 2 * both * d * inner + queries * inner * d
    layer = 2 * (maps + 2 * queries * both * inner + 2 * queries * d * 4 * d)
    assert connector_card("flamingo").flops == 6 * layer + 2 * queries * d * h
    grouped = 2 * (64 * h * 1536 * 2 + 2 * (n + 64) * h * 384 + 2 * 64 * (n + 64) * 1536 + 3 * 64 * h * 4 * h)
    assert connector_card("perceiver").flops == mlp + 3 * grouped


def shades(recipe: str, spec: TokenSpec | None = None) -> list[list[int]]:
    example = Example("", recipe) if spec is None else Example("", recipe, small_tokens=spec)
    found = measure_dependence(example)
    columns = found.came.grid[1] if found.came.grid else found.came.num_tokens
    return [list(found.shades[row : row + columns]) for row in range(0, len(found.shades), columns)]


def square(side: int, at: int, value: int = ALL) -> list[list[int]]:
    inside = range(at, at + side)
    return [[value if row in inside and column in inside else 0 for column in range(6)] for row in range(6)]


def test_a_figure_shows_on_what_a_token_depends() -> None:
    assert shades("linear") == shades("mlp") == shades("norm") == square(1, 2)
    assert shades("avg_pool:factor=2") == shades("pixel_shuffle:factor=2") == square(2, 2)
    assert shades("avg_pool:factor=3") == square(3, 0)
    assert shades("max_pool:factor=2") == square(2, 2)
    assert shades("conv") == square(3, 1)
    assert all(shade == ALL for row in shades("qformer:queries=4,dim=8,layers=2,heads=2,ffn=16") for shade in row)
    found = measure_dependence(Example("", "keep_prefix", marked=0))
    assert (found.prefix_shades, set(found.shades)) == ((ALL,), {0})
    # By 4 to 3 a token of bilinear resizing lies a sixth off the middle of its neighbours.
    assert shades("resize:grid=1x3", TokenSpec(4, 4, (1, 4))) == [[0, ALL, ALL, 0]]


def test_a_figure_is_the_same_each_time() -> None:
    torch.manual_seed(1)
    first = draw_connector(EXAMPLES["perceiver"])
    torch.manual_seed(2)
    assert draw_connector(EXAMPLES["perceiver"]) == first


def test_a_connector_of_a_plugin_is_shown_by_its_defaults() -> None:
    assert connector_example("mlp") is EXAMPLES["mlp"]
    assert set(list_connectors()) == set(EXAMPLES)
    known = EXAMPLES.pop("linear")
    try:
        assert connector_example("linear").recipe == "linear+linear"
    finally:
        EXAMPLES["linear"] = known
    known = EXAMPLES.pop("residual")
    try:
        assert connector_example("residual").small == "residual(mlp)"
    finally:
        EXAMPLES["residual"] = known


@pytest.mark.parametrize("name", list_connectors())
def test_the_keys_of_checkpoints_stay(name: str) -> None:
    assert name in KEYS, f"'{name}' is new: run python docs/update_readme.py --keys"
    kept = KEYS[name]
    rows, columns = kept["grid"]
    with torch.device("meta"):
        spec = TokenSpec(rows * columns, kept["dim"], (rows, columns), num_prefix=1)
        chain = build_connector(kept["recipe"], spec, 8)
    now = {key: list(tensor.shape) for key, tensor in chain.state_dict().items()}
    assert now == kept["keys"], f"released checkpoints that hold '{name}' would no longer load; keep keys and shapes"


def test_no_connector_of_a_checkpoint_is_lost() -> None:
    assert KEYS.keys() == set(list_connectors()), "a connector was removed, so checkpoints that hold it are lost"
