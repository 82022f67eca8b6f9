"""Plans against transformers, over thousands of image sizes."""

from __future__ import annotations

import random
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from connectors.errors import VlmError
from connectors.tokens import TokenSpec, VisualTokens
from vlm_encoders.tiling import (
    LLAVA_NEXT_GRIDS,
    ONEVISION_GRIDS,
    AnyResTiler,
    Box,
    InternVLTiler,
    Page,
    SlidingTiler,
    TilePlan,
    Tiler,
    build_tiler,
    plan_internvl,
    plan_tiles,
    whole_image,
)

ODD_GRIDS = ((2, 2), (1, 4), (4, 1), (2, 3), (3, 2), (1, 1), (3, 3))
VIEW = TokenSpec(256, 8, (16, 16))


def image_sizes() -> list[tuple[int, int]]:
    """Give over 10,000 sizes from 1x1 to 20,000 px: ties, borders of tiles, and the extremest aspect ratios."""
    rng = random.Random(0)
    special = [1, 2, 13, 14, 335, 336, 337, 352, 447, 448, 671, 672, 673, 836, 1008, 1344, 3000, 20_000]
    sizes = [(height, width) for height in special for width in special]
    sizes += [(rng.randint(1, 3000), rng.randint(1, 3000)) for _ in range(5000)]
    sizes += [(rng.randint(1, 20_000), rng.randint(1, 20_000)) for _ in range(2000)]
    sizes += [(int(20_000 ** rng.random()), int(20_000 ** rng.random())) for _ in range(2000)]
    # Two shapes are as near, and the image covers just half of the larger grid's tiles of 384 px.
    sizes += [(512, 1152), (256, 576)]
    thin = [(rng.randint(1, 30), rng.randint(5000, 20_000)) for _ in range(400)]
    return [*sizes, *thin, *(size[::-1] for size in thin)]


SIZES = image_sizes()
TILERS: list[Tiler] = [
    *map(build_tiler, ("whole", "squash", "pad", "crop", "llava-next", "llava-onevision", "internvl", "tiles")),
    AnyResTiler(224, ODD_GRIDS, thumbnail=False),
    InternVLTiler(384, min_tiles=2, max_tiles=9, thumbnail=False, markers=False),
    SlidingTiler(224, overlap=37, max_tiles=20),
    SlidingTiler(448, thumbnail=False),
]


def test_sizes_are_many_and_reach_the_ends() -> None:
    assert len(SIZES) >= 10_000
    assert {(1, 1), (1, 20_000), (20_000, 1), (20_000, 20_000)} <= set(SIZES)


@pytest.mark.parametrize(
    ("tile_size", "grids"),
    [(336, LLAVA_NEXT_GRIDS), (384, ONEVISION_GRIDS), (384, ODD_GRIDS), (224, ODD_GRIDS[::-1])],
)
def test_grid_is_the_one_transformers_selects(tile_size: int, grids: tuple[tuple[int, int], ...]) -> None:
    pinpoints = [(rows * tile_size, columns * tile_size) for rows, columns in grids]
    for size in SIZES:
        assert plan_tiles(size, tile_size, grids).canvas == select_best_resolution(size, pinpoints), size


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision"])
def test_content_is_resized_and_padded_as_in_transformers(name: str) -> None:
    processor: Any = LlavaNextImageProcessorPil() if name == "llava-next" else LlavaOnevisionImageProcessorPil()
    tiler = build_tiler(name)
    for size in SIZES:
        plan = tiler.plan(size)
        image = np.broadcast_to(np.uint8(0), (3, *size))
        resized = get_patch_output_size(image, plan.canvas, "channels_first")
        (above, below), (before, after) = processor._get_padding_size(resized, plan.canvas)
        top, left, height, width = plan.content
        assert (height, width, top, left) == (*resized, above, before), size
        assert (top + height + below, left + width + after) == plan.canvas, size
        assert plan.padded == (above + below + before + after > 0)


@pytest.mark.parametrize(
    ("fewest", "most", "tile_size"), [(1, 12, 448), (1, 6, 448), (2, 9, 384), (1, 12, 384), (1, 40, 224), (4, 4, 64)]
)
def test_internvl_grid_is_the_one_transformers_selects(fewest: int, most: int, tile_size: int) -> None:
    for size in SIZES:
        plan = plan_internvl(size, tile_size, min_tiles=fewest, max_tiles=most)
        columns, rows = get_optimal_tiled_canvas(size, (tile_size, tile_size), fewest, most)
        assert plan.grid == (rows, columns), size
        assert plan.thumbnail == (None if rows * columns == 1 else "last")
        assert plan.content == (0, 0, *plan.canvas)


@pytest.mark.parametrize("tiler", TILERS, ids=repr)
def test_every_plan_holds_together(tiler: Tiler) -> None:
    layout = tiler.layout
    for size in SIZES:
        plan = tiler.plan(size)
        assert plan.image_size == size
        views = plan.views
        assert plan.num_views == len(views) == sum(page.num_views for page in plan.pages)
        assert tiler.max_views is None or 1 <= plan.num_views <= tiler.max_views
        assert set(views) == {(tiler.tile_size, tiler.tile_size)}
        for page in plan.pages:
            check_views(page.grid, page.view, page.overlap)
            top, left, height, width = page.content
            assert min(top, left) >= 0, size
            assert min(height, width) >= 1, size
            assert top + height <= page.canvas[0], size
            assert left + width <= page.canvas[1], size
        pieces = layout.pieces(plan, VIEW)
        assert sum(piece for piece in pieces if isinstance(piece, int)) == layout.num_tokens(plan, VIEW), size


@cache
def check_views(grid: tuple[int, int], view: tuple[int, int], overlap: int) -> None:
    """Hold the views of a page to its canvas: row by row, inside it, and nothing left out."""
    page = Page.squashed(grid, view, overlap=overlap)
    starts = [sorted({box[axis] for box in page.boxes}) for axis in (0, 1)]
    assert page.boxes == tuple(Box(top, left, *view) for top in starts[0] for left in starts[1])
    for along, side, end in zip(starts, view, page.canvas, strict=True):
        assert (along[0], along[-1] + side) == (0, end)
        assert {after - before for before, after in pairwise(along)} <= {side - overlap}


@pytest.mark.parametrize("tiler", TILERS, ids=repr)
def test_sequences_are_as_long_as_counted(tiler: Tiler) -> None:
    layout, newline = tiler.layout, torch.zeros(3)
    for grid in ((3, 3), (2, 5)):
        for size in SIZES[::97]:
            plan = tiler.plan(size)
            if plan.num_views > 200:
                continue
            visual = VisualTokens(torch.ones(plan.num_views, grid[0] * grid[1], 3), grid)
            (sequence,) = layout.arrange(visual, [plan], newline if layout.newline else None)
            assert len(sequence) == layout.num_tokens(plan, visual.spec), size


def test_views_are_tiles_and_thumbnail() -> None:
    assert plan_tiles((480, 640), 336, LLAVA_NEXT_GRIDS).num_views == 5
    assert plan_tiles((480, 640), 336, LLAVA_NEXT_GRIDS, thumbnail=False).num_views == 4
    assert plan_internvl((896, 1344)).num_views == 7
    assert plan_internvl((448, 448)).num_views == 1
    whole = whole_image((480, 640), 336)
    assert (whole.num_views, whole.grid, whole.thumbnail) == (1, None, None)


def test_plans_are_values() -> None:
    plan: TilePlan = plan_tiles((480, 640), 336, [(2, 2)])
    assert plan == plan_tiles((480, 640), 336, ((2, 2),))
    assert hash(plan) == hash(plan_tiles((480, 640), 336, [(2, 2)]))


@pytest.mark.parametrize("size", [(0, 10), (10, -1)])
def test_sizes_without_pixels_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(VlmError, match="at least 1 px"):
        plan_tiles(size, 336, LLAVA_NEXT_GRIDS)
    with pytest.raises(VlmError, match="at least 1 px"):
        plan_internvl(size)
    with pytest.raises(VlmError, match="at least 1 px"):
        whole_image(size, 336)


def test_impossible_grids_are_refused() -> None:
    with pytest.raises(VlmError, match="at least one tile"):
        plan_tiles((480, 640), 336, [])
    with pytest.raises(VlmError, match="at least one tile"):
        plan_tiles((480, 640), 336, [(1, 0)])
    with pytest.raises(VlmError, match="min_tiles <= max_tiles"):
        plan_internvl((480, 640), min_tiles=5, max_tiles=4)
