"""Tilers: by name, as JSON, and without heavy imports."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from connectors.errors import UnknownNameError, VlmError
from vlm_encoders.tiling import (
    AnyResTiler,
    InternVLTiler,
    TileLayout,
    Tiler,
    WholeImage,
    build_tiler,
    tiler_from_config,
)

TILERS = [
    WholeImage(336),
    AnyResTiler(),
    AnyResTiler(384, ((1, 1), (2, 3)), thumbnail=False),
    InternVLTiler(),
    InternVLTiler(224, min_tiles=2, max_tiles=5, thumbnail=False),
    InternVLTiler(224, max_tiles=1),
]


@pytest.mark.parametrize("tiler", TILERS, ids=repr)
def test_config_is_json_and_gives_the_tiler_back(tiler: Tiler) -> None:
    again = tiler_from_config(json.loads(json.dumps(tiler.config())))
    assert again == tiler
    assert again.plan((480, 640)) == tiler.plan((480, 640))


@pytest.mark.parametrize("tiler", TILERS, ids=repr)
def test_no_image_has_more_views_than_stated_and_one_has_as_many(tiler: Tiler) -> None:
    sizes = [(height, width) for height in range(20, 2500, 97) for width in range(20, 2500, 97)]
    assert max(tiler.plan(size).num_views for size in sizes) == tiler.max_views


def test_cut_gives_the_views_of_the_plan() -> None:
    image = Image.new("RGB", (64, 48))
    for name, views in (("whole", 1), ("anyres", 5), ("internvl", 13)):
        tiler = build_tiler(name, 32)
        plan = tiler.plan((image.height, image.width))
        assert len(tiler.cut(image, plan)) == plan.num_views == views


def test_layouts_are_those_of_the_released_models() -> None:
    assert AnyResTiler().layout == TileLayout(unpad=True, newline=True)
    assert WholeImage(336).layout == InternVLTiler().layout == TileLayout(unpad=False, newline=False)


def test_lists_of_grids_are_the_same_tiler() -> None:
    assert build_tiler("anyres", 336, grids=[[1, 2], [2, 1]]) == AnyResTiler(336, ((1, 2), (2, 1)))


def test_unknown_names_and_options_are_answered() -> None:
    with pytest.raises(UnknownNameError, match="no tiler 'any_res'; did you mean anyres"):
        build_tiler("any_res", 336)
    with pytest.raises(VlmError, match="'whole' has no option 'grids'; it takes tile_size"):
        build_tiler("whole", 336, grids=[])
    with pytest.raises(VlmError, match="needs name and tile_size"):
        tiler_from_config({"name": "anyres"})


def test_wrong_options_are_refused_when_built() -> None:
    with pytest.raises(VlmError, match="at least one tile"):
        AnyResTiler(336, ())
    with pytest.raises(VlmError, match="at least 1 px"):
        AnyResTiler(0)
    with pytest.raises(VlmError, match="min_tiles <= max_tiles"):
        InternVLTiler(max_tiles=0)


def test_planning_and_counting_import_neither_torch_nor_pillow() -> None:
    code = (
        "import sys\n"
        "from connectors.tokens import TokenSpec\n"
        "from vlm_encoders.tiling import AnyResTiler\n"
        "tiler = AnyResTiler()\n"
        "print(tiler.layout.num_tokens(tiler.plan((480, 640)), TokenSpec(576, 8, (24, 24))))\n"
        "print([name for name in ('torch', 'PIL', 'numpy', 'transformers') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["2340", "[]"]
