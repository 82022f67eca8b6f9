"""Layouts against LLaVA-NeXT in transformers: order, counts, and each token's place."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from connectors.errors import TokenShapeError, VlmError
from connectors.tokens import TokenSpec, VisualTokens
from vlm_encoders.tiling import LLAVA_NEXT_GRIDS, TileLayout, TilePlan, plan_internvl, plan_tiles, whole_image

LLAVA_NEXT = TileLayout(unpad=True, newline=True)
ALL_LAYOUTS = [TileLayout(unpad=unpad, newline=newline) for unpad in (True, False) for newline in (True, False)]
EXTREME = [(20, 1527), (1527, 20), (1, 3000), (3000, 1), (352, 836), (836, 352), (672, 672), (336, 336), (1, 1)]
EXTREME += [(20_000, 1), (1, 20_000), (20_000, 20_000), (7, 19_999)]


def image_sizes(count: int) -> list[tuple[int, int]]:
    """Give sizes from 1x1 to 20,000 px: half of them photos, half of any aspect ratio."""
    rng = random.Random(1)
    photos = [(rng.randint(1, 2500), rng.randint(1, 2500)) for _ in range(count // 2)]
    others = [(int(20_000 ** rng.random()), int(20_000 ** rng.random())) for _ in range(count - count // 2)]
    return [*EXTREME, *photos, *others]


def numbered(plans: list[TilePlan], grid: tuple[int, int], width: int = 2) -> VisualTokens:
    """Make tokens whose first value is their number, so that each can be found again."""
    views, tokens = sum(plan.num_views for plan in plans), grid[0] * grid[1]
    numbers = torch.arange(views * tokens, dtype=torch.float64).reshape(views, tokens, 1)
    return VisualTokens(torch.cat([numbers] + [-numbers] * (width - 1), dim=2), grid)


def transformers_order(visual: VisualTokens, plans: list[TilePlan], newline: torch.Tensor | None) -> list[torch.Tensor]:
    side, patch = 12, 12 // (visual.grid or (0, 0))[0]
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=side, patch_size=patch),
        image_grid_pinpoints=[[rows * side, columns * side] for rows, columns in LLAVA_NEXT_GRIDS],
    )
    views = visual.tokens.split([plan.num_views for plan in plans])
    model: Any = SimpleNamespace(config=config)
    arranged, _ = LlavaNextModel.pack_image_features(
        model, views, [plan.image_size for plan in plans], "full", image_newline=newline
    )
    return list(arranged)


@pytest.mark.parametrize(
    ("side", "newline", "count"), [(4, True, 500), (4, False, 500), (3, True, 10_000), (1, True, 500)]
)
def test_order_is_that_of_transformers(side: int, count: int, *, newline: bool) -> None:
    vector = torch.tensor([0.5, -0.5], dtype=torch.float64) if newline else None
    layout = TileLayout(unpad=True, newline=newline)
    plans = [plan_tiles(size, 12, LLAVA_NEXT_GRIDS) for size in image_sizes(count)]
    visual = numbered(plans, (side, side))
    theirs = transformers_order(visual, plans, vector)
    for plan, ours, expected in zip(plans, layout.arrange(visual, plans, vector), theirs, strict=True):
        assert torch.equal(ours, expected), plan.image_size


def test_single_view_is_that_of_transformers() -> None:
    plan = whole_image((30, 40), 12)
    visual, vector = numbered([plan], (3, 4)), torch.tensor([0.5, -0.5], dtype=torch.float64)
    for newline in (vector, None):
        (theirs,) = transformers_order(visual, [plan], newline)
        (ours,) = TileLayout(unpad=True, newline=newline is not None).arrange(visual, [plan], newline)
        assert torch.equal(ours, theirs)
    assert TileLayout(unpad=False, newline=False).num_tokens(plan, visual.spec) == 12


@pytest.mark.parametrize(("side", "patch"), [(336, 14), (384, 14), (224, 32)])
def test_counts_are_those_of_the_transformers_processor(side: int, patch: int) -> None:
    pinpoints = [[rows * side, columns * side] for rows, columns in LLAVA_NEXT_GRIDS]
    processor: Any = object.__new__(LlavaNextProcessor)
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=pinpoints)
    processor.patch_size, processor.num_additional_image_tokens = patch, 0
    grid = (side // patch, side // patch)
    spec = TokenSpec(grid[0] * grid[1], 64, grid)
    for size in image_sizes(10_000):
        ours = LLAVA_NEXT.num_tokens(plan_tiles(size, side, LLAVA_NEXT_GRIDS), spec)
        assert ours == processor._get_number_of_features(*size, side, side), size


@pytest.mark.parametrize("layout", ALL_LAYOUTS, ids=str)
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 1)])
def test_counts_are_the_lengths_of_the_sequences(layout: TileLayout, grid: tuple[int, int]) -> None:
    plans = [plan_tiles(size, 12, LLAVA_NEXT_GRIDS) for size in image_sizes(150)]
    plans += [plan_tiles(size, 12, [(2, 3), (1, 1)], thumbnail=False) for size in image_sizes(50)]
    plans += [plan_internvl(size, 12, max_tiles=6) for size in image_sizes(150)]
    plans += [whole_image(size, 12) for size in EXTREME]
    random.Random(2).shuffle(plans)
    visual = numbered(plans, grid)
    newline = torch.full((2,), -1.0, dtype=torch.float64)
    sequences = layout.arrange(visual, plans, newline)
    assert [layout.num_tokens(plan, visual.spec) for plan in plans] == [len(sequence) for sequence in sequences]
    kept = torch.cat(sequences)[:, 0]
    kept = kept[kept >= 0]
    assert kept.unique().numel() == kept.numel()
    if not layout.unpad:
        assert kept.sort().values.tolist() == list(range(visual.tokens[..., 0].numel()))


def test_every_token_stands_at_its_place_in_the_image() -> None:
    plan = plan_tiles((24, 36), 12, [(2, 3)])
    side = 4
    # The value of a token is its place in the joined map of 8 x 12 tokens; the thumbnail's are -1.
    places = torch.arange(96.0).reshape(2, side, 3, side).transpose(1, 2).reshape(6, side * side, 1)
    visual = VisualTokens(torch.cat([torch.full((1, side * side, 1), -1.0), places]), (side, side))
    (sequence,) = TileLayout(unpad=True, newline=False).arrange(visual, [plan])
    assert sequence.flatten().tolist() == [-1.0] * 16 + [float(place) for place in range(96)]
    (with_rows,) = LLAVA_NEXT.arrange(visual, [plan], torch.tensor([-2.0]))
    rows = with_rows[16:].reshape(8, 13)
    assert rows[:, 12].tolist() == [-2.0] * 8
    assert rows[:, :12].flatten().tolist() == [float(place) for place in range(96)]


def test_thumbnail_stands_where_the_plan_puts_it() -> None:
    plan = plan_internvl((12, 24), 12, max_tiles=2)
    visual = numbered([plan], (1, 2), width=1)
    (flat,) = TileLayout(unpad=False, newline=False).arrange(visual, [plan])
    (rows,) = LLAVA_NEXT.arrange(visual, [plan], torch.tensor([-1.0], dtype=torch.float64))
    assert flat.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert rows.flatten().tolist() == [0, 1, 2, 3, -1, 4, 5]


def test_squashed_tiles_have_no_padding_to_drop() -> None:
    spec = TokenSpec(16, 8, (4, 4))
    for size in image_sizes(300):
        plan = plan_internvl(size, 12, max_tiles=6)
        assert TileLayout(unpad=True, newline=False).num_tokens(plan, spec) == 16 * plan.num_views


def test_queries_are_refused_where_rows_are_needed() -> None:
    queries, plan = TokenSpec(32, 8), plan_tiles((480, 640), 336, LLAVA_NEXT_GRIDS)
    for layout in ALL_LAYOUTS[:3]:
        with pytest.raises(TokenShapeError, match="TileLayout\\(unpad=False, newline=False\\)"):
            layout.check(queries)
        with pytest.raises(TokenShapeError, match="32 queries"):
            layout.num_tokens(plan, queries)
        with pytest.raises(TokenShapeError, match="without a grid"):
            layout.arrange(VisualTokens(torch.zeros(5, 32, 8)), [plan], torch.zeros(8))
    flat = TileLayout(unpad=False, newline=False)
    (sequence,) = flat.arrange(VisualTokens(torch.zeros(5, 32, 8)), [plan])
    assert len(sequence) == flat.num_tokens(plan, queries) == 160


def test_views_and_newline_that_do_not_fit_are_refused() -> None:
    plan = plan_tiles((480, 640), 336, LLAVA_NEXT_GRIDS)
    visual = VisualTokens(torch.zeros(4, 16, 8), (4, 4))
    with pytest.raises(TokenShapeError, match="1 plans have 5 views, got tokens of 4"):
        LLAVA_NEXT.arrange(visual, [plan], torch.zeros(8))
    visual = VisualTokens(torch.zeros(5, 16, 8), (4, 4))
    with pytest.raises(TokenShapeError, match="got none"):
        LLAVA_NEXT.arrange(visual, [plan])
    with pytest.raises(TokenShapeError, match=r"shape \(8,\), got shape \(7,\)"):
        LLAVA_NEXT.arrange(visual, [plan], torch.zeros(7))


def test_newline_vector_is_trained() -> None:
    plan = plan_tiles((480, 640), 336, LLAVA_NEXT_GRIDS)
    newline = torch.zeros(8, requires_grad=True)
    (sequence,) = LLAVA_NEXT.arrange(VisualTokens(torch.ones(5, 16, 8), (4, 4)), [plan], newline)
    sequence.sum().backward()
    rows = LLAVA_NEXT.num_tokens(plan, TokenSpec(16, 8, (4, 4))) - 16 - 6 * 8
    assert newline.grad is not None
    assert newline.grad.tolist() == [rows] * 8


def test_a_layout_of_another_version_is_told() -> None:
    whole = {"unpad": True, "newline": True}
    assert TileLayout.from_config(whole) == TileLayout(**whole)
    for config in (whole | {"spiral": 1}, {}, whole | {"markers": {"x": 1}}):
        with pytest.raises(
            VlmError, match=r"the layout cannot be read .*; update vlm-encoders, or save the model again"
        ):
            TileLayout.from_config(config)
