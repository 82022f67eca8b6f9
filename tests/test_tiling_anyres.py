"""LLaVA-OneVision's tiles against transformers: pixels, counts, order and values; and where AnyRes differs, told."""

from __future__ import annotations

import random
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from connectors.tokens import TokenSpec, VisualTokens
from vlm_encoders.tiling import ONEVISION_GRIDS, AnyResTiler, TilePlan, build_tiler, cut

SO400M = TokenSpec(729, 64, (27, 27))


def image_sizes(count: int) -> list[tuple[int, int]]:
    """Give sizes from 1x1 to 20,000 px: half of them photos, half of any aspect ratio."""
    rng = random.Random(3)
    ends = [(1, 1), (1, 20_000), (20_000, 1), (20_000, 20_000), (1394, 1144), (13, 4000), (384, 384)]
    photos = [(rng.randint(1, 4000), rng.randint(1, 4000)) for _ in range(count // 2)]
    others = [(int(20_000 ** rng.random()), int(20_000 ** rng.random())) for _ in range(count - count // 2)]
    return [*ends, *photos, *others]


def theirs(cap: int, tile_size: int, image_token: int) -> Any:
    """Make a processor without tokenizer: counting takes none."""
    processor: Any = object.__new__(LlavaOnevisionProcessor)
    pinpoints = [[rows * tile_size, columns * tile_size] for rows, columns in ONEVISION_GRIDS]
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=pinpoints)
    processor.num_image_tokens, processor.vision_aspect_ratio = image_token, f"anyres_max_{cap}"
    return processor


def packed(tiler: AnyResTiler, plans: list[TilePlan], features: list[torch.Tensor], newline: Any) -> list[torch.Tensor]:
    side = int(features[0].shape[1] ** 0.5)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=tiler.tile_size, patch_size=tiler.tile_size // side),
        image_grid_pinpoints=[[rows * tiler.tile_size, columns * tiler.tile_size] for rows, columns in tiler.grids],
    )
    model: Any = SimpleNamespace(config=config)
    sizes = [plan.image_size for plan in plans]
    ratio = f"anyres_max_{tiler.cap}"
    arranged, _ = LlavaOnevisionModel.pack_image_features(model, features, sizes, newline, ratio)
    return list(arranged)


def test_grids_are_those_of_the_transformers_processor() -> None:
    pinpoints = [[rows * 384, columns * 384] for rows, columns in ONEVISION_GRIDS]
    assert pinpoints == LlavaOnevisionImageProcessor.image_grid_pinpoints
    assert build_tiler("llava-onevision") == AnyResTiler(384, ONEVISION_GRIDS, cap=9)


@pytest.mark.parametrize("cap", [9, 4, 1])
def test_counts_are_those_of_the_transformers_processor(cap: int) -> None:
    tiler = AnyResTiler(384, ONEVISION_GRIDS, cap=cap)
    layout, processor = tiler.layout, theirs(cap, 384, 729)
    for size in image_sizes(10_000):
        ours = layout.num_tokens(tiler.plan(size), SO400M)
        assert ours == processor._get_number_of_features(*size, 384, 384), size


@pytest.mark.parametrize(("cap", "side", "count"), [(9, 3, 10_000), (4, 3, 400), (9, 4, 400), (3, 2, 400), (1, 6, 200)])
def test_order_and_values_are_those_of_transformers(cap: int, side: int, count: int) -> None:
    """Bit for bit, where the map is brought down as well."""
    tiler = AnyResTiler(side * 4, ONEVISION_GRIDS, cap=cap)
    generator = torch.Generator().manual_seed(cap)
    newline = torch.randn(5, generator=generator)
    plans = [tiler.plan(size) for size in image_sizes(count)]
    features = [torch.randn(plan.num_views, side * side, 5, generator=generator) for plan in plans]
    visual = VisualTokens(torch.cat(features), (side, side))
    layout = tiler.layout
    arranged = layout.arrange(visual, plans, newline)
    brought_down = 0
    for plan, ours, expected in zip(plans, arranged, packed(tiler, plans, features, newline), strict=True):
        assert torch.equal(ours, expected), plan.image_size
        assert len(ours) == layout.num_tokens(plan, visual.spec)
        uncapped = AnyResTiler(tiler.tile_size, tiler.grids).layout.num_tokens(plan, visual.spec)
        brought_down += len(ours) != uncapped
    assert brought_down > count // 20


def test_an_image_among_several_is_one_view_and_a_newline() -> None:
    tiler = build_tiler("llava-onevision")
    plan = list(tiler.ranked((900, 1200)))[-1]
    assert plan.num_views == 1
    assert tiler.layout.num_tokens(plan, SO400M) == 730
    features, newline = torch.randn(1, 9, 4), torch.randn(4)
    (ours,) = tiler.layout.arrange(VisualTokens(features, (3, 3)), [plan], newline)
    (expected,) = packed(AnyResTiler(12, ONEVISION_GRIDS, cap=9), [plan], [features], newline)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("size", [(96, 128), (131, 77), (75, 75), (30, 500), (501, 20), (1, 9), (97, 33)])
def test_pixels_are_those_of_the_transformers_processor(size: tuple[int, int]) -> None:
    pinpoints = [[rows * 32, columns * 32] for rows, columns in ONEVISION_GRIDS]
    processor: Any = LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints)
    rng = np.random.default_rng(size[0])
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    pictures = cut(image, AnyResTiler(32, ONEVISION_GRIDS).plan(size))
    raw = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures]), raw)


def test_an_image_costs_up_to_8765_tokens_and_not_7290() -> None:
    """Over images of the shape of each map that padding can leave of a grid, at three sizes."""
    maps = {
        shape
        for rows, columns in ((27 * rows, 27 * columns) for rows, columns in ONEVISION_GRIDS)
        for shape in [
            *((rows - 2 * lost, columns) for lost in range(rows // 2)),
            *((rows, columns - 2 * lost) for lost in range(columns // 2)),
        ]
    }
    tiler = build_tiler("llava-onevision")
    sizes = [(height * step, width * step) for height, width in maps for step in (3, 14, 60)] + image_sizes(5000)
    counts = [tiler.layout.num_tokens(tiler.plan(size), SO400M) for size in sizes]
    assert max(counts) == tiler.layout.num_tokens(tiler.plan((1394, 1144)), SO400M) == 8765


@pytest.mark.parametrize(("tokens", "kept"), [(108 * 73, True), (108 * 75, False)])
def test_a_map_a_little_larger_than_the_cap_stays_as_it_is(tokens: int, *, kept: bool) -> None:
    layout, plan = build_tiler("llava-onevision").layout, AnyResTiler(384, ((4, 3),), cap=9).plan((108, tokens // 108))
    assert tokens > 6561
    assert (layout.num_tokens(plan, SO400M) == tokens + 108 + 729) is kept


def test_counting_is_exact_where_the_original_s_floats_are_not() -> None:
    """An image of 352x836 px: LLaVA-NeXT's own code keeps 56 columns of 24x72 tokens, transformers and we 58."""
    tiler, spec = build_tiler("llava-next"), TokenSpec(576, 64, (24, 24))
    plan = tiler.plan((352, 836))
    assert plan.grid == (1, 3)
    assert int(836 * (24 / 352)) == 56
    assert Fraction(836 * 24, 352) == 57
    assert tiler.layout.num_tokens(plan, spec) == 576 + 24 * (58 + 1)


def test_shown_tokens_are_those_of_exact_fractions() -> None:
    """Transformers rounds floats to seven places, which is the whole number below for sizes up to 20,000 px."""
    tiler, spec = AnyResTiler(), TokenSpec(576, 64, (24, 24))
    for height, width in image_sizes(10_000):
        plan = tiler.plan((height, width))
        rows, columns = (24 * side for side in plan.main.grid)
        if Fraction(width, height) > Fraction(columns, rows):
            rows -= (rows - int(Fraction(height * columns, width))) // 2 * 2
        else:
            columns -= (columns - int(Fraction(width * rows, height))) // 2 * 2
        assert tiler.layout.num_tokens(plan, spec) == 576 + rows * (columns + 1)


def test_an_image_thinner_than_a_token_leaves_the_thumbnail_or_else_two_rows() -> None:
    spec = TokenSpec(576, 64, (24, 24))
    tiler, bare = AnyResTiler(), AnyResTiler(thumbnail=False)
    assert tiler.layout.num_tokens(tiler.plan((20, 1527)), spec) == 576
    assert bare.layout.num_tokens(bare.plan((20, 1527)), spec) == 2 * 73
    (sequence,) = bare.layout.arrange(
        VisualTokens(torch.ones(3, 576, 3), (24, 24)), [bare.plan((20, 1527))], torch.zeros(3)
    )
    assert len(sequence) == 2 * 73
    assert int(sequence.sum()) == 2 * 72 * 3


def test_a_side_that_the_cap_brings_to_nothing_keeps_one() -> None:
    """Of one token a tile and six tiles in a row, transformers would make 0x2 tokens, and fails."""
    tiler = AnyResTiler(4, ONEVISION_GRIDS, cap=1)
    plan = tiler.plan((4, 24))
    features, newline = torch.randn(plan.num_views, 1, 3), torch.randn(3)
    assert plan.grid == (1, 6)
    with pytest.raises(RuntimeError, match="should be greater than 0"):
        packed(tiler, [plan], [features], newline)
    (ours,) = tiler.layout.arrange(VisualTokens(features, (1, 1)), [plan], newline)
    assert len(ours) == tiler.layout.num_tokens(plan, TokenSpec(1, 3, (1, 1))) == 1 + 1 * (2 + 1)


def test_tiles_are_those_of_llava_next_without_a_cap() -> None:
    """The two models' packing agrees where nothing is brought down; their grids need not."""
    tiler = AnyResTiler(12, ONEVISION_GRIDS, cap=36)
    plans = [tiler.plan(size) for size in image_sizes(200)]
    features, newline = [torch.randn(plan.num_views, 9, 2) for plan in plans], torch.randn(2)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=12, patch_size=4),
        image_grid_pinpoints=[[rows * 12, columns * 12] for rows, columns in ONEVISION_GRIDS],
    )
    model: Any = SimpleNamespace(config=config)
    sizes = [plan.image_size for plan in plans]
    expected, _ = LlavaNextModel.pack_image_features(model, features, sizes, "full", image_newline=newline)
    ours = tiler.layout.arrange(VisualTokens(torch.cat(features), (3, 3)), plans, newline)
    assert all(map(torch.equal, ours, expected))
