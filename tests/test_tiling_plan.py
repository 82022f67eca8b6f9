"""Plans against transformers, over thousands of image sizes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from connectors.errors import VlmError
from vlm_encoders.tiling import LLAVA_NEXT_GRIDS, TilePlan, plan_internvl, plan_tiles, whole_image

ODD_GRIDS = ((2, 2), (1, 4), (4, 1), (2, 3), (3, 2), (1, 1), (3, 3))


def image_sizes(count: int, largest: int = 3000) -> Iterator[tuple[int, int]]:
    """Give sizes of all aspect ratios, with many that tie or touch a tile's border."""
    rng = random.Random(0)
    special = [1, 2, 13, 14, 335, 336, 337, 352, 447, 448, 671, 672, 673, 836, 1008, 1344, largest]
    yield from ((height, width) for height in special for width in special)
    for _ in range(count):
        yield rng.randint(1, largest), rng.randint(1, largest)


@pytest.mark.parametrize(("tile_size", "grids"), [(336, LLAVA_NEXT_GRIDS), (384, ODD_GRIDS), (224, ODD_GRIDS[::-1])])
def test_grid_is_the_one_transformers_selects(tile_size: int, grids: tuple[tuple[int, int], ...]) -> None:
    pinpoints = [(rows * tile_size, columns * tile_size) for rows, columns in grids]
    for size in image_sizes(4000):
        assert plan_tiles(size, tile_size, grids).canvas == select_best_resolution(size, pinpoints), size


def test_content_is_resized_and_padded_as_in_transformers() -> None:
    processor: Any = LlavaNextImageProcessorPil()
    for size in image_sizes(1500):
        plan = plan_tiles(size, 336, LLAVA_NEXT_GRIDS)
        image = np.broadcast_to(np.uint8(0), (3, *size))
        resized = get_patch_output_size(image, plan.canvas, "channels_first")
        (above, below), (before, after) = processor._get_padding_size(resized, plan.canvas)
        top, left, height, width = plan.content
        assert (height, width, top, left) == (*resized, above, before), size
        assert (top + height + below, left + width + after) == plan.canvas, size
        assert plan.padded == (above + below + before + after > 0)


@pytest.mark.parametrize(
    ("fewest", "most", "tile_size"), [(1, 12, 448), (1, 6, 448), (2, 9, 384), (1, 40, 224), (4, 4, 64)]
)
def test_internvl_grid_is_the_one_transformers_selects(fewest: int, most: int, tile_size: int) -> None:
    for size in image_sizes(2000):
        plan = plan_internvl(size, tile_size, min_tiles=fewest, max_tiles=most)
        columns, rows = get_optimal_tiled_canvas(size, (tile_size, tile_size), fewest, most)
        assert plan.grid == (rows, columns), size
        assert plan.thumbnail == (None if rows * columns == 1 else "last")
        assert plan.content == (0, 0, *plan.canvas)


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
