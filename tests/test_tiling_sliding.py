"""Plain tiles: how many stand along a side, how a grid shrinks, and what overlaps."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import pairwise
from math import floor

import numpy as np
import pytest
from PIL import Image

from connectors.errors import VlmError
from connectors.tokens import TokenSpec
from vlm_encoders.tiling import SlidingTiler, build_tiler, cut

HALF = Fraction(1, 2)


def image_sizes(count: int) -> list[tuple[int, int]]:
    """Give sizes from 1x1 to 20,000 px: half of them photos, half of any aspect ratio."""
    rng = random.Random(6)
    ends = [(1, 1), (1, 20_000), (20_000, 1), (20_000, 20_000), (1024, 1024), (672, 1120), (448, 448), (7, 100)]
    photos = [(rng.randint(1, 4000), rng.randint(1, 4000)) for _ in range(count // 2)]
    others = [(int(20_000 ** rng.random()), int(20_000 ** rng.random())) for _ in range(count - count // 2)]
    return [*ends, *photos, *others]


def counted(side: Fraction | int, tile: int, overlap: int) -> int:
    """Count the tiles whose length together is nearest to a side, halves up."""
    return max(1, floor(Fraction(side - overlap) / (tile - overlap) + HALF))


def test_1024_px_with_tiles_of_448_px_are_four_tiles_and_a_thumbnail() -> None:
    plan = build_tiler("tiles", 448).plan((1024, 1024))
    assert (plan.grid, plan.num_tiles, plan.num_views, plan.thumbnail) == ((2, 2), 4, 5, "last")
    assert plan.views == ((448, 448),) * 5
    assert SlidingTiler().layout.num_tokens(plan, TokenSpec(256, 8, (16, 16))) == 5 * 256


@pytest.mark.parametrize(("tile", "overlap"), [(448, 0), (448, 112), (64, 63), (384, 1)])
def test_sides_have_the_nearest_number_of_tiles(tile: int, overlap: int) -> None:
    tiler = SlidingTiler(tile, overlap=overlap)
    for size in image_sizes(10_000):
        plan = tiler.plan(size)
        rows, columns = (counted(side, tile, overlap) for side in size)
        assert plan.grid == (rows, columns), size
        assert plan.canvas == tuple(count * (tile - overlap) + overlap for count in (rows, columns))
        # No other number of tiles is nearer to the image's own resolution.
        for side, along in zip(size, plan.canvas, strict=True):
            assert abs(along - side) * 2 <= tile - overlap or along == tile


@pytest.mark.parametrize(("tile", "overlap", "most"), [(448, 0, 12), (224, 50, 30), (448, 0, 1), (100, 99, 7)])
def test_a_grid_too_large_is_that_of_the_largest_smaller_copy(tile: int, overlap: int, most: int) -> None:
    """All copies that a side gains a tile at are tried; fractions, so that none is missed."""
    tiler = SlidingTiler(tile, overlap=overlap, max_tiles=most)
    for size in image_sizes(400):
        grids = {counted(side, tile, overlap) for side in size}
        if max(grids) > 60:
            continue
        steps = {
            (Fraction(overlap) + (number - HALF) * (tile - overlap)) / side
            for side in size
            for number in range(2, counted(side, tile, overlap) + 1)
        }
        # Where a copy is just as large as a step, its side has the tile still; a little below, no more.
        copies = sorted(
            {Fraction(1), *steps, *(step * Fraction(9_999_999_999, 10**10) for step in steps), Fraction(1, 10**6)}
        )
        fitting = [
            (rows, columns)
            for rows, columns in (
                (counted(copy * size[0], tile, overlap), counted(copy * size[1], tile, overlap)) for copy in copies
            )
            if rows * columns <= most
        ]
        assert tiler.plan(size).grid == fitting[-1], size


def test_grids_shrink_one_step_at_a_time_to_the_one_view() -> None:
    for overlap in (0, 100):
        tiler = SlidingTiler(224, overlap=overlap)
        for size in image_sizes(500):
            grids = [plan.main.grid for plan in tiler.ranked(size)]
            assert grids[-1] == (1, 1)
            for (rows, columns), (fewer_rows, fewer_columns) in pairwise(grids):
                assert (rows - fewer_rows, columns - fewer_columns) in {(1, 0), (0, 1), (1, 1)}, size


def test_a_turned_image_has_the_turned_grid() -> None:
    for height, width in image_sizes(500):
        for most in (None, 5, 12):
            tiler = SlidingTiler(max_tiles=most)
            rows, columns = tiler.plan((height, width)).main.grid
            assert tiler.plan((width, height)).main.grid == (columns, rows)


def test_one_tile_needs_no_thumbnail() -> None:
    for size in ((448, 448), (1, 1), (600, 500), (671, 671)):
        assert SlidingTiler().plan(size).num_views == 1
    assert SlidingTiler(thumbnail=False).plan((1024, 1024)).num_views == 4


def test_neighbours_share_the_pixels_of_the_overlap() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (88, 56, 3), dtype=np.uint8))
    plan = SlidingTiler(32, overlap=8).plan((88, 56))
    assert (plan.grid, plan.canvas) == ((3, 2), (80, 56))
    views = [np.asarray(view) for view in cut(image, plan)]
    assert [view.shape for view in views] == [(32, 32, 3)] * 7
    whole = np.asarray(image.resize((56, 80), Image.Resampling.BICUBIC))
    assert np.array_equal(views[0], whole[:32, :32])
    assert np.array_equal(views[1], whole[:32, 24:])
    assert np.array_equal(views[0][:, 24:], views[1][:, :8])
    assert np.array_equal(views[0][24:], views[2][:8])
    assert np.array_equal(views[6], np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)))


def test_what_leaves_no_grid_is_refused() -> None:
    with pytest.raises(VlmError, match="cannot overlap by 448 px; use 0 to 447"):
        SlidingTiler(overlap=448)
    with pytest.raises(VlmError, match="cannot overlap by -1 px"):
        SlidingTiler(overlap=-1)
    with pytest.raises(VlmError, match="max_tiles=0 leaves no tile"):
        SlidingTiler(max_tiles=0)
    with pytest.raises(VlmError, match="at least 1 px"):
        SlidingTiler(0)
    with pytest.raises(VlmError, match="at least 1 px"):
        SlidingTiler().plan((0, 5))
