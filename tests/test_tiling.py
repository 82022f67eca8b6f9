"""Tilers: by name, as JSON, and without heavy imports."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
from PIL import Image

from connectors.errors import UnknownNameError, VlmError
from vlm_encoders.registry import encoder_spec
from vlm_encoders.tiling import (
    PRESETS,
    AnyResTiler,
    InternVLTiler,
    Markers,
    SlidingTiler,
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
    InternVLTiler(224, max_tiles=1, markers=False),
    SlidingTiler(336, max_tiles=9),
    SlidingTiler(224, overlap=16, max_tiles=1, thumbnail=False),
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


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_saved_and_read_again(name: str) -> None:
    tiler = build_tiler(name)
    saved = json.loads(json.dumps(tiler.config()))
    assert tiler_from_config(saved) == tiler
    assert {field.name for field in fields(tiler)} | {"name"} == saved.keys()
    assert build_tiler(name, tiler.tile_size) == tiler


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_the_encoder_that_it_names(name: str) -> None:
    tiler, spec = build_tiler(name), encoder_spec(PRESETS[name].encoder)
    # Some were released with an encoder at another size than it was trained with.
    tiler.check(spec if tiler.native else spec.resized(tiler.tile_size))
    assert PRESETS[name].source.startswith("https://")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_found_by_the_name_of_their_class(name: str) -> None:
    tiler = build_tiler(name)
    assert type(tiler_from_config({"name": tiler.name, "tile_size": tiler.tile_size})) is type(tiler)


def test_sizes_are_those_of_the_released_models() -> None:
    sizes = {"llava-next": 336, "anyres": 336, "llava-onevision": 384, "internvl": 448, "tiles": 448, "pad": 336}
    for name, side in sizes.items():
        assert build_tiler(name).tile_size == side
        assert encoder_spec(PRESETS[name].encoder).image_size == (side, side)
    assert build_tiler("anyres") == build_tiler("llava-next") == AnyResTiler()


@pytest.mark.parametrize(
    ("text", "tiler"),
    [
        ("internvl:max_tiles=6,thumbnail=false", InternVLTiler(max_tiles=6, thumbnail=False)),
        ("llava-next:grids=1x2/2x1", AnyResTiler(336, ((1, 2), (2, 1)))),
        ("llava-next:grids=2x3", AnyResTiler(336, ((2, 3),))),
        ("llava-onevision: cap = none , grids=1x2", AnyResTiler(384, ((1, 2),))),
        ("tiles:max_tiles=None,overlap=8,tile_size=224", SlidingTiler(224, overlap=8)),
        ("whole:resize=crop,", WholeImage(336, "crop")),
    ],
)
def test_options_can_stand_in_the_name(text: str, tiler: Tiler) -> None:
    assert build_tiler(text) == tiler


def test_the_nearer_option_goes_first() -> None:
    assert build_tiler("internvl", 224).tile_size == 224
    assert build_tiler("internvl:tile_size=112", 224).tile_size == 112
    assert build_tiler("internvl:max_tiles=6", max_tiles=4) == InternVLTiler(max_tiles=4)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "internvl:max_tile=6",
            "'internvl' has no option 'max_tile'; it takes tile_size, min.* did you mean max_tiles",
        ),
        ("internvl:zzz=6", "no option 'zzz'; it takes tile_size, min_tiles, max_tiles, thumbnail, markers$"),
        ("internvl:max_tiles=six", "'internvl' has max_tiles='six'; give a whole number$"),
        ("internvl:max_tiles=6.5", "max_tiles=6.5; give a whole number$"),
        ("internvl:max_tiles=none", "max_tiles=none; give a whole number$"),
        ("internvl:max_tiles", "'max_tiles' in tiler 'internvl:max_tiles' is not option=value"),
        ("internvl:max_tiles=6,max_tiles=7", "'max_tiles' stands twice"),
        ("internvl:thumbnail=1", "thumbnail=1; give true or false$"),
        ("llava-next:cap=9x9", "cap=9x9; give a whole number or none$"),
        ("llava-next:grids=1/2", "grids=1/2; give grids such as 1x2/2x1$"),
        ("llava-next:grids=1x2x3", "grids='1x2x3'; give grids such as 1x2/2x1$"),
        ("llava-next:grids=0x2", "at least one tile"),
        ("whole:resize=2", "resize=2; give crop or squash"),
    ],
)
def test_wrong_options_in_a_name_are_told(text: str, sentence: str) -> None:
    with pytest.raises(VlmError, match=sentence):
        build_tiler(text)


@pytest.mark.parametrize("options", [{"max_tiles": "6"}, {"max_tiles": True}, {"thumbnail": 1}, {"tile_size": 1.5}])
def test_wrong_values_are_told_by_type(options: dict[str, object]) -> None:
    ((key, _),) = options.items()
    with pytest.raises(VlmError, match=f"tiler 'internvl' has {key}=.*; give "):
        build_tiler("internvl", **options)  # type: ignore[arg-type]
    with pytest.raises(VlmError, match=f"tiler 'internvl' has {key}=.*; give "):
        tiler_from_config({"name": "internvl", "tile_size": 448} | options)


def test_tilers_of_older_checkpoints_are_read() -> None:
    old = {"name": "anyres", "tile_size": 336, "grids": [[1, 2], [2, 1]], "thumbnail": True}
    assert tiler_from_config(old) == AnyResTiler(336, ((1, 2), (2, 1)))
    assert tiler_from_config({"name": "whole", "tile_size": 224}) == WholeImage(224)


def test_cut_gives_the_views_of_the_plan() -> None:
    image = Image.new("RGB", (64, 48))
    for name, views in (("whole", 1), ("anyres", 5), ("internvl", 13)):
        tiler = build_tiler(name, 32)
        plan = tiler.plan((image.height, image.width))
        assert len(tiler.cut(image, plan)) == plan.num_views == views


def test_layouts_are_those_of_the_released_models() -> None:
    assert AnyResTiler().layout == TileLayout(unpad=True, newline=True)
    assert WholeImage(336).layout == SlidingTiler().layout == TileLayout(unpad=False, newline=False)
    marks = Markers(start="<img>", end="</img>")
    assert InternVLTiler().layout == TileLayout(unpad=False, newline=False, markers=marks)


def test_lists_of_grids_are_the_same_tiler() -> None:
    assert build_tiler("anyres", 336, grids=[[1, 2], [2, 1]]) == AnyResTiler(336, ((1, 2), (2, 1)))


def test_unknown_names_and_options_are_answered() -> None:
    with pytest.raises(UnknownNameError, match="no tiler 'any_res'; did you mean anyres"):
        build_tiler("any_res", 336)
    with pytest.raises(UnknownNameError, match="no tiler 'internvl2'; did you mean internvl"):
        build_tiler("internvl2:max_tiles=6")
    with pytest.raises(UnknownNameError, match="no tiler 'any_res'"):
        tiler_from_config({"name": "any_res", "tile_size": 336})
    with pytest.raises(VlmError, match="by its name, got int"):
        build_tiler(336)  # type: ignore[arg-type]
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
        "from vlm_encoders.tiling import build_tiler\n"
        "tiler = build_tiler('llava-next:cap=9')\n"
        "spec = TokenSpec(576, 8, (24, 24))\n"
        "tiler.plan_within((480, 640), 2000, lambda plan: tiler.layout.num_tokens(plan, spec))\n"
        "print(tiler.layout.num_tokens(tiler.plan((480, 640)), spec))\n"
        "print([name for name in ('torch', 'PIL', 'numpy', 'transformers') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["2340", "[]"]


@pytest.mark.parametrize("size", [(1080, 1920, 3), (3,), (1080.0, 1920.0), None, "abc", 7, (5, "x")], ids=str)
@pytest.mark.parametrize("name", list(PRESETS))
def test_what_is_no_size_is_refused(name: str, size: Any) -> None:
    with pytest.raises(VlmError, match=r"an image size is \(height, width\) in px, two whole numbers, got"):
        build_tiler(name).plan(size)


def test_scales_in_px_are_refused() -> None:
    for name in ("s2", "dynamic-s2"):
        with pytest.raises(VlmError, match="scales are views along a side and no px, such as 1/2/3"):
            build_tiler(f"{name}:scales=336/672")
