"""Plans within a budget: never above it, and the best by the tiler's own rule."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from connectors.errors import VlmError
from connectors.tokens import TokenSpec
from vlm_encoders.tiling import AnyResTiler, InternVLTiler, SlidingTiler, TilePlan, Tiler, WholeImage, build_tiler


class Budgeted(NamedTuple):
    """A tiler, the tokens of a view, and budgets from too few to plenty."""

    tiler: Tiler
    view: TokenSpec
    budgets: tuple[int, ...]

    def count(self, plan: TilePlan) -> int:
        return self.tiler.layout.num_tokens(plan, self.view)


CLIP, SO400M, FOLDED = TokenSpec(576, 8, (24, 24)), TokenSpec(729, 8, (27, 27)), TokenSpec(256, 8, (16, 16))
PLENTY = 10**9
BUDGETED = {
    "whole": Budgeted(WholeImage(336), CLIP, (576, 577)),
    "llava-next": Budgeted(AnyResTiler(), CLIP, (577, 700, 1000, 1500, 2000, 2340, 2500, 2927)),
    "llava-next-bare": Budgeted(AnyResTiler(thumbnail=False), CLIP, (1200, 1500, 1770, 2000)),
    "llava-onevision": Budgeted(build_tiler("llava-onevision"), SO400M, (730, 1500, 2200, 3000, 4500, 7300)),
    "internvl": Budgeted(InternVLTiler(), FOLDED, tuple(256 * views for views in range(1, 13))),
    "internvl-bare": Budgeted(InternVLTiler(thumbnail=False), FOLDED, tuple(256 * views for views in range(1, 12))),
    "tiles": Budgeted(SlidingTiler(), FOLDED, (256, 767, 768, 1280, 2560, 5000, 20_000)),
    "tiles-overlap": Budgeted(SlidingTiler(224, overlap=60, max_tiles=30), FOLDED, (256, 1280, 2560, 5000)),
}


def image_sizes() -> list[tuple[int, int]]:
    """Give 700 sizes from 1x1 to 20,000 px: half of them photos, half of any aspect ratio."""
    rng = random.Random(5)
    ends = [(1, 1), (1, 20_000), (20_000, 1), (20_000, 20_000), (480, 640), (1024, 1024)]
    photos = [(rng.randint(1, 4000), rng.randint(1, 4000)) for _ in range(350)]
    return [*ends, *photos, *((int(20_000 ** rng.random()), int(20_000 ** rng.random())) for _ in range(350))]


SIZES = image_sizes()


@pytest.mark.parametrize("name", BUDGETED)
def test_the_best_plan_of_those_within_the_budget_is_taken(name: str) -> None:
    tiler, _, budgets = case = BUDGETED[name]
    for size in SIZES:
        plans = [(plan, case.count(plan)) for plan in tiler.ranked(size)]
        assert tiler.plan(size) == plans[0][0] == tiler.plan_within(size, PLENTY, case.count)
        kept = 0
        for budget in budgets:
            affordable = [plan for plan, tokens in plans if tokens <= budget]
            if not affordable:
                with pytest.raises(VlmError, match=f"at least {min(tokens for _, tokens in plans)} tokens"):
                    tiler.plan_within(size, budget, case.count)
                continue
            chosen = tiler.plan_within(size, budget, case.count)
            assert chosen == affordable[0], (size, budget)
            assert kept <= case.count(chosen) <= budget, (size, budget)
            kept = case.count(chosen)


@pytest.mark.parametrize("name", BUDGETED)
def test_no_plan_stands_twice_and_all_are_for_the_image(name: str) -> None:
    tiler = BUDGETED[name].tiler
    for size in SIZES[:300]:
        plans = list(tiler.ranked(size))
        assert len(set(plans)) == len(plans)
        assert {plan.image_size for plan in plans} == {size}


@pytest.mark.parametrize("name", ["whole", "llava-next", "llava-onevision", "internvl", "tiles", "tiles-overlap"])
def test_the_tokens_of_one_view_are_enough(name: str) -> None:
    tiler, view, _ = case = BUDGETED[name]
    for size in SIZES:
        least = view.num_tokens + tiler.layout.newline
        # A thin image may leave no token of its tiles, and then costs less than its thumbnail and a newline.
        assert tiler.plan_within(size, least, case.count).num_views == 1 or tiler.layout.unpad
    with pytest.raises(VlmError, match="raise max_tokens"):
        tiler.plan_within((480, 640), view.num_tokens - 1, case.count)


@pytest.mark.parametrize("views", range(1, 14))
def test_internvl_within_a_budget_is_internvl_with_fewer_tiles(views: int) -> None:
    case = BUDGETED["internvl"]
    # A second view would be a thumbnail beside its only tile, or a second tile and the thumbnail third.
    most = max(1, views - 1)
    for size in SIZES:
        columns, rows = get_optimal_tiled_canvas(size, (448, 448), 1, most)
        grid = case.tiler.plan_within(size, 256 * views, case.count).grid
        assert grid == ((rows, columns) if views > 2 else (1, 1)), size


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision"])
def test_anyres_within_a_budget_is_anyres_of_the_grids_that_it_pays(name: str) -> None:
    tiler, _, budgets = case = BUDGETED[name]
    assert isinstance(tiler, AnyResTiler)
    for size in SIZES[:700]:
        tokens = {
            grid: case.count(AnyResTiler(tiler.tile_size, (grid,), cap=tiler.cap).plan(size)) for grid in tiler.grids
        }
        for budget in budgets[::2]:
            paid = [
                (rows * tiler.tile_size, columns * tiler.tile_size)
                for rows, columns in tiler.grids
                if tokens[rows, columns] <= budget
            ]
            chosen = tiler.plan_within(size, budget, case.count)
            assert (chosen.canvas if chosen.grid else None) == (select_best_resolution(size, paid) if paid else None)


def test_more_views_never_come_of_a_smaller_budget() -> None:
    for name in ("internvl", "internvl-bare", "tiles", "tiles-overlap"):
        tiler, _, budgets = case = BUDGETED[name]
        for size in SIZES[:300]:
            views = [tiler.plan_within(size, budget, case.count).num_views for budget in (*budgets, PLENTY)]
            assert views == sorted(views), (name, size)


def test_tiles_that_must_be_several_are_told_what_they_cost() -> None:
    tiler = InternVLTiler(min_tiles=4)
    with pytest.raises(VlmError, match="needs at least 1280 tokens for an image of 448x448 px, 1000 are allowed"):
        tiler.plan_within((448, 448), 1000, lambda plan: 256 * plan.num_views)
