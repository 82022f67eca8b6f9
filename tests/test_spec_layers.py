"""Layers, stages, necks and sizes in the spec's arithmetic; one meaning of each option for every encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.errors import VlmError
from connectors.tokens import TokenSpec
from vlm_encoders.spec import EncoderSpec, Stage

PLAIN = EncoderSpec(
    name="plain",
    family="test",
    backend="timm",
    source="plain",
    weights=None,
    image_size=(32, 48),
    stride=8,
    dim=10,
    num_layers=6,
    num_prefix=2,
    prefix_kinds=("cls", "register"),
    final_norm=True,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
STAGED = replace(
    PLAIN,
    name="staged",
    image_size=(64, 96),
    stages=(Stage(4, 4), Stage(8, 8), Stage(16, 16), Stage(32, 32)),
    num_layers=4,
    dim=32,
    stride=32,
    num_prefix=0,
    prefix_kinds=(),
)
NECKED = replace(PLAIN, name="necked", block_dim=24, dim=6, neck=Stage(6, 8))


def test_several_layers_are_joined_in_width() -> None:
    several = PLAIN.at_layer((-2, -5))
    assert (several.layers, several.dim, several.width) == ((-2, -5), 20, 10)
    assert several.token_spec() == TokenSpec(24, 20, (4, 6), 2)
    assert several.kept_layers == 5
    assert not several.final_norm
    # One layer in a list is one layer, as JSON brings it back.
    assert PLAIN.at_layer([-2]) == PLAIN.at_layer(-2)
    assert several.at_layer(-1, final_norm=True) == replace(PLAIN, block_dim=10)


def test_stages_are_joined_at_the_grid_of_the_first_named() -> None:
    assert STAGED.token_spec() == TokenSpec(6, 32, (2, 3))
    assert STAGED.at_layer(-2).token_spec() == TokenSpec(24, 16, (4, 6))
    assert STAGED.at_layer((-2, -1)).token_spec() == TokenSpec(24, 48, (4, 6))
    assert STAGED.at_layer((-1, -2)).token_spec() == TokenSpec(6, 48, (2, 3))
    assert STAGED.at_layer((-2, -3)).kept_layers == 3


def test_a_stage_that_is_cut_sets_no_size() -> None:
    with pytest.raises(VlmError, match="image size 80x96 is not a multiple of 32; use 64x96 or 96"):
        STAGED.resized((80, 96))
    assert STAGED.at_layer(-2).resized((80, 96)).token_spec().grid == (5, 6)


def test_a_neck_stands_for_the_final_norm() -> None:
    assert NECKED.token_spec().dim == 6
    bare = NECKED.at_layer(-1, final_norm=False)
    assert (bare.dim, bare.at_layer(-3).dim, bare.at_layer((-1, -3)).dim) == (24, 24, 48)
    assert bare.at_layer(-1, final_norm=True).token_spec() == NECKED.token_spec()
    with pytest.raises(VlmError, match="its neck stands behind layer -1"):
        NECKED.at_layer((-1, -3), final_norm=True)


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 500))
def test_ceil_takes_every_size(height: int, width: int) -> None:
    rows, columns = replace(PLAIN, rounding="ceil").resized((height, width)).token_spec().grid or (0, 0)
    assert (rows - 1) * 8 < height <= rows * 8
    assert (columns - 1) * 8 < width <= columns * 8


def test_a_grid_of_the_network_s_own_holds_at_the_native_size_alone() -> None:
    odd = replace(STAGED, stages=(*STAGED.stages[:3], Stage(32, 32, (1, 2))), image_size=(64, 96), sizes="native")
    assert odd.token_spec().grid == (1, 2)
    with pytest.raises(VlmError, match="takes views of 64x96 px alone, got 128; leave image_size out"):
        odd.resized(128)
    with pytest.raises(VlmError, match="takes square views alone, got 32x64"):
        replace(PLAIN, image_size=(32, 32), sizes="square").resized((32, 64))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"feature_layer": (-1, -1)}, "name one twice"),
        ({"feature_layer": (-1, -7)}, "feature layer -7 is not one of its 6 blocks"),
        ({"feature_layer": ()}, r"a feature layer is a whole number below 0, or several, got \(\)"),
        ({"feature_layer": "-2"}, "a feature layer is a whole number below 0, or several, got '-2'"),
        ({"exact_pixels": "no"}, "exact_pixels is True or False, got 'no'"),
        ({"final_norm": "yes"}, "final_norm is True or False, got 'yes'"),
        ({"feature_layer": -2.0}, "is not one of its 6 blocks"),
        ({"prefix_kinds": ("cls",)}, "2 prefix tokens cannot be"),
        ({"stages": (Stage(10, 8),)}, "1 stages are no 6 layers"),
        ({"feature_layer": (-1, -2), "block_dim": 10}, "gives tokens of width 20 and stride 8, not 10 and 8"),
        ({"neck": Stage(10, 8)}, "behind a neck the blocks' own width is unknown; give block_dim"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(VlmError, match=sentence):
        replace(PLAIN, **changes)


def test_kinds_of_prefix_tokens_are_named() -> None:
    assert replace(PLAIN, num_prefix=1, prefix_kinds=()).prefix_kinds == ("cls",)
    assert replace(PLAIN, num_prefix=3, prefix_kinds=()).prefix_kinds == ("other",) * 3
