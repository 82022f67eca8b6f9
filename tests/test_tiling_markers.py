"""The text that tilers write around an image and between its views, mark by mark, and how it is switched off."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from connectors.tokens import TokenSpec
from vlm_encoders.tiling import PRESETS, Markers, Page, TileLayout, TilePlan, build_tiler
from vlm_encoders.vlm.image_prompts import check_markers

SPEC = TokenSpec(4, 8, (2, 2))
VIEW = (28, 28)

PROMPTS: list[tuple[str, tuple[int, int], list[str | int]]] = [
    (
        "idefics3:longest_edge=56",
        (28, 28),
        [
            *("<fake_token_around_image><row_1_col_1>", 4, "<fake_token_around_image><row_1_col_2>", 4),
            *("\n<fake_token_around_image><row_2_col_1>", 4, "<fake_token_around_image><row_2_col_2>", 4),
            *("\n\n<fake_token_around_image><global-img>", 4, "<fake_token_around_image>"),
        ],
    ),
    ("smolvlm:longest_edge=28", (28, 28), ["<fake_token_around_image><global-img>", 4, "<fake_token_around_image>"]),
    ("llava-uhd:slice_size=28,square=true", (28, 56), [4, ",", 4, "\n", 4]),
    ("llava-uhd:slice_size=28,square=true", (28, 28), [4]),
    ("minicpm-v:slice_size=28,square=true", (28, 56), [12]),
    ("ureader:grids=1x2", (28, 56), [12]),
    ("docowl:grids=2x1", (56, 28), ["<global_img>", 4, "<crop_img_row0_col0>", 4, "<crop_img_row1_col0>", 4]),
    ("monkey", (28, 28), ["<img>", 20, "</img>"]),
    ("s2", (28, 28), [4]),
    ("dynamic-s2", (28, 28), [36, "\n"]),
]


@pytest.mark.parametrize(("name", "size", "prompt"), PROMPTS)
def test_prompts_are_written_mark_by_mark(name: str, size: tuple[int, int], prompt: list[str | int]) -> None:
    tiler = build_tiler(name, 28)
    plan = tiler.plan(size)
    assert tiler.layout.pieces(plan, SPEC) == prompt
    assert tiler.layout.num_tokens(plan, SPEC) == sum(piece for piece in prompt if isinstance(piece, int))


@pytest.mark.parametrize(
    "name", [name for name, preset in PRESETS.items() if "markers" in preset.tiler.__dataclass_fields__]
)
def test_markers_are_switched_off(name: str) -> None:
    off = build_tiler(name, markers=False)
    assert not off.layout.markers
    assert build_tiler(name, markers=True).layout.markers
    assert dataclasses.replace(build_tiler(name, markers=True).layout, markers=Markers()) == off.layout


def test_a_mark_is_written_in_its_place() -> None:
    marks = Markers(
        start="A",
        end="Z",
        tile="<{row}.{column}.{row0}.{column0}.{number}>",
        tile_end=")",
        between=",",
        row_end=";",
        thumbnail="[{number}",
        thumbnail_end="]",
        single="S",
        single_end="s",
    )
    layout = TileLayout(unpad=False, newline=False, markers=marks)
    tiles, whole = Page.squashed((2, 2), VIEW), Page.squashed((1, 1), VIEW)
    first = layout.pieces(TilePlan((9, 9), (whole, tiles), "first"), SPEC)
    assert first == [
        *("A[0", 4, "]<1.1.0.0.1>", 4, "),<1.2.0.1.2>", 4, ");<2.1.1.0.3>", 4, "),<2.2.1.1.4>", 4, ");Z"),
    ]
    last = layout.pieces(TilePlan((9, 9), (tiles, whole), "last"), SPEC)
    assert last[-3:] == [");[4", 4, "]Z"]
    assert layout.pieces(TilePlan((9, 9), (whole,)), SPEC) == ["AS", 4, "sZ"]


def test_every_mark_can_be_read_before_an_image_is_there() -> None:
    class Knows:
        unk_token_id = 0

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            assert "{" not in text
            return {"input_ids": [1] * bool(text)}

    for name in PRESETS:
        tiler = build_tiler(name)
        check_markers(tiler, tiler.layout.markers, Knows(), "<image>")
