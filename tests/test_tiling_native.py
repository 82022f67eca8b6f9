"""Native resolution: each size rule against the library that has it, over tens of thousands of image sizes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from timm.data.naflex_transforms import get_image_size_for_seq
from transformers.models.pixtral.image_processing_pixtral import get_resize_output_image_size
from transformers.models.pixtral.processing_pixtral import PixtralProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as their_smart_resize
from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

from connectors.errors import VlmError
from connectors.tokens import TokenSpec
from vlm_encoders.tiling import (
    PRESETS,
    AnySizeTiler,
    NaFlexTiler,
    NativeTiler,
    PixtralTiler,
    Qwen2VLTiler,
    TilePlan,
    build_tiler,
    tiler_from_config,
)

SPECIAL = [1, 2, 6, 7, 8, 13, 14, 15, 16, 17, 27, 28, 29, 32, 33, 42, 55, 56, 70, 98, 126, 200, 201, 224, 336, 640]
SPECIAL += [1002, 1008, 1023, 1024, 1025, 1540, 2048, 4096, 4097, 19_999, 20_000]


def image_sizes(seed: int, count: int = 10_000) -> Iterator[tuple[int, int]]:
    """Give all pairs of sizes that tie or touch a bound, then random ones, even in their logarithm, of all shapes."""
    rng = random.Random(seed)
    yield from ((height, width) for height in SPECIAL for width in SPECIAL)
    for _ in range(count):
        yield round(20_000 ** rng.random()), round(20_000 ** rng.random())


# Here the area's scale times 28 px divides otherwise than one after the other.
ODD = [(5022, 1240), (5200, 4160), (5725, 1145)]


def tokens_of(tiler: NativeTiler, plan: TilePlan) -> int:
    """Count the tokens of the view behind a connector that joins `merge` of each side."""
    rows, columns = (side // tiler.multiple for side in plan.main.view)
    return tiler.layout.num_tokens(plan, TokenSpec(rows * columns, 8, (rows, columns)))


@pytest.mark.parametrize(
    ("preset", "processor"),
    [
        ("qwen2-vl", Qwen2VLImageProcessor()),
        ("qwen2.5-vl", Qwen2VLImageProcessor()),
        # The released config; transformers reads it into Qwen2-VL's class.
        ("qwen3-vl", Qwen2VLImageProcessor(size={"shortest_edge": 65536, "longest_edge": 16777216}, patch_size=16)),
    ],
)
def test_qwen_views_and_tokens_are_those_of_transformers(preset: str, processor: Any) -> None:
    tiler: Any = build_tiler(preset)
    least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
    refused = 0
    for height, width in [*ODD, *image_sizes(1)]:
        if max(height, width) / min(height, width) > 200:
            refused += 1
            with pytest.raises(VlmError, match="200 times as long"):
                tiler.plan((height, width))
            continue
        plan = tiler.plan((height, width))
        assert plan.main.view == their_smart_resize(height, width, tiler.multiple, least, most), (height, width)
        patches = processor.get_number_of_image_patches(height, width)
        assert tokens_of(tiler, plan) == patches // 4, (height, width)
    assert refused > 1000


def test_a_side_below_half_a_token_is_rescued_as_in_transformers() -> None:
    tiler = Qwen2VLTiler()
    assert round(13 / 28) == 0
    for size in [(13, 13), (13, 1400), (1400, 13), (1, 1), (1, 200)]:
        assert tiler.view_size(size) == their_smart_resize(*size)


@pytest.mark.parametrize(("patch", "merge", "edge"), [(16, 1, 1024), (14, 2, 1540), (16, 1, 336)])
def test_pixtral_views_and_prompts_are_those_of_transformers(patch: int, merge: int, edge: int) -> None:
    tiler = PixtralTiler(patch=patch, merge=merge, longest_edge=edge)
    step, emptied = patch * merge, 0
    for size in image_sizes(2):
        image = np.broadcast_to(np.uint8(0), (3, *size))
        theirs = get_resize_output_image_size(image, (edge, edge), (step, step), "channels_first")
        emptied += 0 in theirs
        # The one deviation: where theirs has no pixel left, which their resize then refuses, ours has one token.
        assert tiler.plan(size).main.view == tuple(max(side, step) for side in theirs), size
    assert emptied


@pytest.mark.parametrize("merge", [1, 2])
def test_pixtral_pieces_are_the_expansion_of_its_processor(merge: int) -> None:
    tiler = PixtralTiler(merge=merge)
    processor: Any = SimpleNamespace(
        patch_size=16,
        spatial_merge_size=merge,
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    )
    for size in [(480, 640), (1, 1), (20, 3000), (3000, 20), (1024, 1024), (17, 16), (33, 65)]:
        plan = tiler.plan(size)
        rows, columns = (side // tiler.multiple for side in plan.main.view)
        pieces = tiler.layout.pieces(plan, TokenSpec(rows * columns, 8, (rows, columns)))
        text = "".join(piece if isinstance(piece, str) else "[IMG]" * piece for piece in pieces)
        assert text == PixtralProcessor.replace_image_token(processor, {"image_sizes": [plan.main.view]}, 0)


@pytest.mark.parametrize(("patch", "patches"), [(16, 256), (16, 1024), (14, 100)])
def test_naflex_views_are_those_of_transformers(patch: int, patches: int) -> None:
    tiler = NaFlexTiler(patch=patch, max_patches=patches)
    for size in image_sizes(3, 10_000 if patches == 256 else 1000):
        view = tiler.plan(size).main.view
        assert view == get_image_size_for_max_num_patches(*size, patch, patches), size
        assert view[0] * view[1] <= patches * patch**2


def test_timm_naflex_views_are_those_of_timm() -> None:
    tiler: Any = build_tiler("timm-naflex")
    assert tiler.interpolation == "bicubic"
    for size in image_sizes(4):
        assert tiler.plan(size).main.view == get_image_size_for_seq(size, 16, 576)[1], size


@pytest.mark.parametrize(
    "tiler",
    [AnySizeTiler(), AnySizeTiler(patch=14, merge=2), AnySizeTiler(patch=14, min_pixels=25_088, max_pixels=802_816)],
    ids=str,
)
def test_any_size_keeps_the_shape_and_the_bounds(tiler: AnySizeTiler) -> None:
    step = tiler.multiple
    for size in image_sizes(5):
        view = tiler.plan(size).main.view
        assert not view[0] % step
        assert not view[1] % step
        (short, long), (across, along) = sorted(size), (min(view), max(view))
        assert (view[0] - view[1]) * (size[0] - size[1]) >= 0
        # The shorter side is as near to the shape as multiples are, or the least there is.
        assert abs(2 * (across * long - short * along)) <= step * long or across == step
        nearest = max(1, (2 * long + step) // (2 * step)) * step

        def area(side: int, short: int = short, long: int = long) -> int:
            return max(1, (2 * short * side + long * step) // (2 * long * step)) * step * side

        assert view[0] * view[1] == area(along) <= tiler.max_pixels
        # Enlarged no more than the least area asks for, and scaled down no more than the most does.
        if along > nearest:
            assert area(along - step) < tiler.min_pixels
        if along < nearest:
            assert area(along + step) > tiler.max_pixels
        assert area(along) >= tiler.min_pixels or area(along + step) > tiler.max_pixels


def test_an_image_of_whole_multiples_stays_as_it_is() -> None:
    tiler = AnySizeTiler(patch=14, merge=2)
    rng = random.Random(6)
    for _ in range(2000):
        rows, columns = rng.randint(2, 36), rng.randint(2, 36)
        assert tiler.view_size((rows * 28, columns * 28)) == (rows * 28, columns * 28)


SMALL = [
    Qwen2VLTiler(patch=2, merge=2, min_pixels=48, max_pixels=1600),
    Qwen2VLTiler(patch=3, merge=1, min_pixels=1, max_pixels=900),
    PixtralTiler(patch=4, longest_edge=70),
    NaFlexTiler(patch=4, max_patches=90),
    NaFlexTiler(patch=2, merge=2, max_patches=300),
    AnySizeTiler(patch=4, min_pixels=40, max_pixels=1500),
    AnySizeTiler(patch=2, merge=3, min_pixels=1, max_pixels=10_000),
]
SHAPES = [(1, 1), (3, 3), (40, 40), (7, 90), (90, 7), (2, 200), (55, 31), (100, 101), (1, 60), (500, 340)]


def views_below(tiler: NativeTiler, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Give the views under all limits there are, the largest first, that are no longer on any side than its own."""
    height, width = tiler.view_size(size)
    # Under an area that the view keeps to, Qwen's processors would give the view itself.
    most = height * width - 1 if isinstance(tiler, Qwen2VLTiler) else 1600
    views = [tiler.smaller(size, limit) for limit in range(most, 0, -1)]
    return [view for view in views if view[0] <= height and view[1] <= width]


@pytest.mark.parametrize("tiler", SMALL, ids=str)
def test_the_budget_is_met_by_the_largest_view_there_is(tiler: NativeTiler) -> None:
    for size in SHAPES:
        natural = tiler.plan(size)
        whole = tokens_of(tiler, natural)
        views = views_below(tiler, size)
        for budget in {1, 2, 3, 5, 8, 13, 30, whole - 1, whole, whole + 1} - {0}:
            fitting = [natural.main.view, *views]
            wanted = next((view for view in fitting if view[0] * view[1] <= budget * tiler.multiple**2), None)
            if wanted is None:
                with pytest.raises(VlmError, match="needs at least"):
                    tiler.plan_within(size, budget, lambda plan: tokens_of(tiler, plan))
                continue
            found = tiler.plan_within(size, budget, lambda plan: tokens_of(tiler, plan))
            assert found.main.view == wanted, (size, budget)


@pytest.mark.parametrize("tiler", SMALL, ids=str)
def test_ranked_gives_every_view_once_and_ever_smaller(tiler: NativeTiler) -> None:
    for size in SHAPES:
        ranked = [plan.main.view for plan in tiler.ranked(size)]
        assert ranked == list(dict.fromkeys([tiler.view_size(size), *views_below(tiler, size)]))
        for larger, smaller in pairwise(ranked):
            assert smaller[0] <= larger[0]
            assert smaller[1] <= larger[1]


def test_qwen_within_a_budget_is_what_some_max_pixels_gives_in_transformers() -> None:
    tiler = Qwen2VLTiler(patch=4, merge=1, min_pixels=1, max_pixels=1600)
    rng = random.Random(7)
    for _ in range(60):
        size = rng.randint(1, 90), rng.randint(1, 90)
        budget = rng.randint(1, 60)
        by_area = (their_smart_resize(*size, 4, 1, most) for most in range(1600, 0, -1))
        wanted = next((view for view in by_area if view[0] * view[1] <= budget * 16), None)
        assert tiler.plan_within(size, budget, lambda plan: tokens_of(tiler, plan)).main.view == wanted, (size, budget)


def test_a_budget_below_one_token_is_refused() -> None:
    for name in ("qwen2-vl", "pixtral", "naflex", "native"):
        tiler: Any = build_tiler(name)
        with pytest.raises(VlmError, match="needs at least 1 tokens for an image of 480x640 px, 0 are allowed"):
            tiler.plan_within((480, 640), 0, lambda plan, tiler=tiler: tokens_of(tiler, plan))


def test_a_budget_is_met_in_few_steps() -> None:
    asked = 0

    def count(plan: TilePlan) -> int:
        nonlocal asked
        asked += 1
        return tokens_of(tiler, plan)

    tiler: Any = build_tiler("qwen3-vl")
    plan = tiler.plan_within((9000, 7000), 1000, count)
    assert 900 < tokens_of(tiler, plan) <= 1000
    assert asked < 30


NATIVE = [name for name, preset in PRESETS.items() if issubclass(preset.tiler, NativeTiler)]


def test_all_native_tilers_are_here() -> None:
    released = {"aimv2-native", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "pixtral", "naflex", "timm-naflex"}
    assert set(NATIVE) == {"native", *released}


@pytest.mark.parametrize("name", NATIVE)
def test_config_is_json_and_gives_the_tiler_back(name: str) -> None:
    tiler = build_tiler(name, 224, patch=8, merge=2)
    again = tiler_from_config(json.loads(json.dumps(tiler.config())))
    assert again == tiler
    assert again.plan((480, 640)) == tiler.plan((480, 640))
    assert tiler.max_views == tiler.plan((480, 640)).num_views == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("native", {"patch": 0}, "patch=0 and merge=1; use 1 or more"),
        ("naflex", {"merge": 0}, "merge=0; use 1 or more"),
        ("naflex", {"merge": 2, "max_patches": 3}, "max_patches=3; use 4 or more"),
        ("pixtral", {"longest_edge": 0}, "longest_edge=0; use 1 px or more"),
        ("qwen2-vl", {"min_pixels": 0}, "use 1 <= min_pixels <= max_pixels"),
        ("native", {"min_pixels": 9, "max_pixels": 8}, "use 1 <= min_pixels <= max_pixels"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(VlmError, match=message):
        build_tiler(name, **options)


@pytest.mark.parametrize("name", NATIVE)
def test_sizes_without_pixels_are_refused(name: str) -> None:
    with pytest.raises(VlmError, match="at least 1 px"):
        build_tiler(name).plan((0, 10))
