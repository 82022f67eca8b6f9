"""S2 and dynamic S2: plans against VILA's arithmetic, joined maps against S2's, and the whole way through a model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from connectors import build_connector
from connectors.errors import TokenShapeError, VlmError
from connectors.tokens import TokenSpec, VisualTokens
from vlm_encoders.budget import token_budget
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.multiscale import MultiScale
from vlm_encoders.testing import tiny_llm
from vlm_encoders.tiling import Page, TilePlan, build_tiler, tiler_from_config, whole_image
from vlm_encoders.tiling.s2 import DynamicS2Tiler, S2Tiler
from vlm_encoders.vlm.build import build_model
from vlm_encoders.vlm.model import VisionLanguageModel

PHOTO = Image.effect_mandelbrot((80, 50), (-2, -1.5, 1, 1.5), 50).convert("RGB")


def image_sizes(count: int, largest: int = 20_000) -> Iterator[tuple[int, int]]:
    rng = random.Random(0)
    special = [1, 2, 447, 448, 449, 672, 896, 1344, 2000, largest]
    yield from ((height, width) for height in special for width in special)
    for _ in range(count):
        most = rng.choice((60, 1000, 4000, largest))
        yield rng.randint(1, most), rng.randint(1, most)


def vila_grid(height: int, width: int, least: int, most: int, side: int) -> tuple[int, int]:
    """Follow the search of VILA's `dynamic_s2_preprocess`, its set of ratios and all."""
    shapes = {(i, j) for n in range(least, most + 1) for i in range(1, n + 1) for j in range(1, n + 1)}
    chosen, distance = (1, 1), float("inf")
    for shape in sorted((each for each in shapes if least <= each[0] * each[1] <= most), key=lambda x: x[0] * x[1]):
        off = abs(width / height - shape[0] / shape[1])
        if off < distance or (off == distance and width * height > 0.5 * side * side * shape[0] * shape[1]):
            chosen, distance = shape, off
    return chosen[1], chosen[0]


@pytest.mark.parametrize(("scales", "most", "side"), [((1, 2, 3), 12, 448), ((1, 2), 6, 384)])
def test_dynamic_grids_are_those_of_vila(scales: tuple[int, ...], most: int, side: int) -> None:
    tiler = DynamicS2Tiler(side, scales, most)
    for size in image_sizes(10_000):
        plan = tiler.plan(size)
        assert plan.main.grid == vila_grid(*size, scales[-1] ** 2, most, side), size
        assert [page.grid for page in plan.pages[:-1]] == [(scale, scale) for scale in scales[:-1]]
        assert all(page.content == (0, 0, *page.canvas) and page.view == (side, side) for page in plan.pages)
        assert plan.num_views <= tiler.max_views
        assert plan.thumbnail is None


def chessboard(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Lay maps (rows * columns, D, R, C) side by side, as `merge_chessboard` of S2 and VILA."""
    return torch.cat([torch.cat(list(line), dim=2) for line in maps.split(columns)], dim=1)[None]


def unboard(whole: Tensor, rows: int, columns: int) -> Tensor:
    """Cut a map (1, D, R, C) into rows * columns, as `split_chessboard`."""
    return torch.cat([part for line in whole.chunk(rows, dim=2) for part in line.chunk(columns, dim=3)])


def joined_by_hand(maps: Tensor, plan: TilePlan, on: int) -> Tensor:
    """Join the maps (V, D, R, C) of one image as S2's `forward` and VILA's `merge_features_for_dynamic_s2` do."""
    laid, begin = [], 0
    for page in plan.pages:
        laid.append(chessboard(maps[begin : begin + page.num_views], *page.grid))
        begin += page.num_views
    goal = laid[on].shape[-2:]
    whole = torch.cat([interpolate(each.float(), size=goal, mode="area").to(each.dtype) for each in laid], dim=1)
    return unboard(whole, *plan.pages[on].grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["s2", "dynamic-s2"])
@pytest.mark.parametrize("grid", [(3, 3), (4, 4), (2, 5)])
def test_maps_are_joined_as_in_s2_and_vila(name: str, grid: tuple[int, int], dtype: torch.dtype) -> None:
    tiler = build_tiler(name, 28)
    plans = [tiler.plan(size) for size in ((50, 90), (300, 20), (64, 64), (1, 5000))]
    torch.manual_seed(0)
    visual = VisualTokens(
        torch.randn(sum(plan.num_views for plan in plans), grid[0] * grid[1], 6).to(dtype),
        grid,
        torch.randn(sum(plan.num_views for plan in plans), 1, 6).to(dtype),
    )
    gathered = tiler.layout.gather(visual, plans)
    on = 0 if name == "s2" else -1
    parts = visual.as_map().split([plan.num_views for plan in plans])
    theirs = torch.cat([joined_by_hand(part, plan, on) for part, plan in zip(parts, plans, strict=True)])
    assert torch.equal(gathered.as_map(), theirs)
    assert gathered.prefix is None
    assert gathered.spec == tiler.layout.connector_spec(visual.spec)
    assert len(theirs) == sum(tiler.layout.joined(plan).num_views for plan in plans)


def test_an_image_of_one_view_is_repeated_for_each_scale() -> None:
    tiler = build_tiler("dynamic-s2", 28)
    visual = VisualTokens(torch.randn(2, 4, 5), (2, 2))
    single = list(tiler.ranked((30, 50)))[-1]
    gathered = tiler.layout.gather(visual, [single, whole_image((9, 9), 28)])
    assert torch.equal(gathered.tokens, visual.tokens.repeat(1, 1, 3))


def test_a_prompt_reads_the_joined_map_row_by_row() -> None:
    tiler = DynamicS2Tiler(28)
    plan = tiler.plan((30, 40))
    rows, columns = plan.main.grid
    spec = TokenSpec(4, 1, (2, 2))
    numbers = torch.arange(rows * 2 * columns * 2).reshape(1, 1, rows * 2, columns * 2)
    visual = VisualTokens.from_map(unboard(numbers, rows, columns))
    (sequence,) = tiler.layout.arrange(visual, [plan])
    assert sequence[:, 0].tolist() == list(range(rows * columns * 4))
    assert tiler.layout.pieces(plan, spec) == [rows * columns * 4, "\n"]
    assert DynamicS2Tiler(28, markers=False).layout.pieces(plan, spec) == [rows * columns * 4]


@pytest.mark.parametrize("scales", [(1, 2), (1, 2, 3)])
def test_s2_views_give_the_tokens_of_the_s2_encoder(scales: tuple[int, ...], clip: Encoder) -> None:
    encoder = MultiScale(clip, scales=scales).eval()
    torch.manual_seed(1)
    largest = torch.randn(2, 3, *encoder.spec.image_size)
    tiler = S2Tiler(28, scales)
    plan = tiler.plan((100, 70))
    views = []
    for image in largest:
        for scale in scales:
            size = (28 * scale, 28 * scale)
            whole = image[None] if scale == scales[-1] else interpolate(image[None], size=size, mode="bicubic")
            views.append(unboard(whole, scale, scale))
    with torch.no_grad():
        wanted, ours = encoder(largest), tiler.layout.gather(clip(torch.cat(views)), [plan, plan])
    torch.testing.assert_close(ours.tokens, wanted.tokens, rtol=0, atol=1e-6)
    assert ours.grid == wanted.grid


@pytest.mark.parametrize(
    "recipe", ["mlp", "pixel_shuffle:factor=2+mlp", "perceiver:queries=3,heads=2,kv_heads=2,head_dim=8,depth=1+linear"]
)
@pytest.mark.parametrize("name", ["s2", "dynamic-s2"])
def test_counts_are_those_of_the_model(name: str, recipe: str, clip: Encoder) -> None:
    tiler = build_tiler(name, 28, **({"scales": (1, 2), "max_tiles": 5} if name == "dynamic-s2" else {}))
    connector = build_connector(recipe, tiler.layout.connector_spec(clip.token_spec), 32)
    out = connector.out_spec(tiler.layout.connector_spec(clip.token_spec))
    layout = tiler.layout_for(out)
    model = VisionLanguageModel(clip, connector, tiny_llm(), image_token_id=70, layout=layout)
    plans = [plan for size in ((30, 40), (90, 20)) for plan in (tiler.plan(size), list(tiler.ranked(size))[-1])]
    pixels = torch.randn(sum(plan.num_views for plan in plans), 3, 28, 28)
    with torch.no_grad():
        embedded = model.embed_images(pixels, plans)
        model.chunk_tokens = 20
        for one, other in zip(embedded, model.embed_images(pixels, plans), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    for plan, image in zip(plans, embedded, strict=True):
        runs = [piece for piece in layout.pieces(plan, out) if isinstance(piece, int)]
        assert len(image) == layout.num_tokens(plan, out) == sum(runs)


def test_budgets_count_what_the_connector_reads() -> None:
    alone = token_budget("clip-vit-l-14-336", "mlp")
    row = token_budget("clip-vit-l-14-336", "mlp", tiler="s2", image_size=(700, 900))
    assert (row.views, row.per_view, row.total) == (14, 576, 576)
    assert row.connector_parameters == alone.connector_parameters + 2 * 1024 * 4096
    # Its first matrix reads three widths of 1024 where one view has one, the second one is the same.
    assert row.connector_flops == alone.connector_flops + 2 * 576 * 2 * 1024 * 4096


def test_a_model_with_joined_scales_comes_back_from_its_checkpoint(kit: Any, tmp_path: Any) -> None:
    encoder = kit.build().encoder
    tiler = S2Tiler(28, (1, 2))
    connector = build_connector("mlp", tiler.layout.connector_spec(encoder.token_spec), 32)
    llm = kit.build().llm
    model = VisionLanguageModel(encoder, connector, llm, image_token_id=70, layout=tiler.layout).eval()
    model.save_pretrained(tmp_path / "saved")
    again = VisionLanguageModel.from_pretrained(tmp_path / "saved")
    assert again.layout == tiler.layout
    pixels, plans = torch.randn(5, 3, 28, 28), [tiler.plan((40, 40))]
    with torch.no_grad():
        assert torch.equal(again.embed_images(pixels, plans)[0], model.embed_images(pixels, plans)[0])


def test_budgets_fall_to_one_view() -> None:
    tiler = build_tiler("dynamic-s2", 28)
    spec = TokenSpec(16, 8, (4, 4))

    def count(plan: TilePlan) -> int:
        return tiler.layout.num_tokens(plan, spec)

    for size in image_sizes(100):
        for most in (16, 143, 150, 176, 500):
            assert count(tiler.plan_within(size, most, count)) <= most
    with pytest.raises(VlmError, match="at least 16 tokens"):
        tiler.plan_within((30, 40), 15, count)


def test_what_cannot_be_joined_is_refused() -> None:
    layout = S2Tiler(28).layout
    plan = S2Tiler(28).plan((30, 40))
    with pytest.raises(TokenShapeError, match="14 views, got tokens of 13"):
        layout.gather(VisualTokens(torch.zeros(13, 4, 2), (2, 2)), [plan])
    with pytest.raises(TokenShapeError, match="2 pages, 3 scales"):
        layout.gather(VisualTokens(torch.zeros(5, 4, 2), (2, 2)), [S2Tiler(28, (1, 2)).plan((30, 40))])
    with pytest.raises(TokenShapeError, match="no grid"):
        layout.gather(VisualTokens(torch.zeros(14, 4, 2)), [plan])
    with pytest.raises(TokenShapeError, match="no grid"):
        layout.connector_spec(TokenSpec(4, 2))
    for scales in ((), (0, 1), (2, 1), (1, 1)):
        with pytest.raises(VlmError, match="growing scales"):
            S2Tiler(28, scales)
    with pytest.raises(VlmError, match="at least 9 tiles"):
        DynamicS2Tiler(28, max_tiles=8)
    with pytest.raises(VlmError, match="at least 1 px"):
        S2Tiler(28).plan((0, 5))


def test_saved_tilers_come_back() -> None:
    for tiler in (S2Tiler(56, (1, 3)), DynamicS2Tiler(56, (1, 2), 7, markers=False)):
        assert tiler_from_config(json.loads(json.dumps(tiler.config()))) == tiler
        assert type(tiler.layout).from_config(json.loads(json.dumps(tiler.layout.config()))) == tiler.layout
    assert S2Tiler().plan((5, 5)).pages[0] == Page.squashed((1, 1), (336, 336))


@pytest.mark.parametrize("name", ["s2", "dynamic-s2:scales=1/2,max_tiles=5,markers=false"])
def test_build_model_makes_the_connector_as_wide_as_all_scales(name: str, kit: Any, clip: Encoder) -> None:
    kit.build()
    model, processor = build_model(clip, "mlp", kit.root / "llm", tiler=name)
    sample = processor.sample(
        [{"role": "user", "content": "<image> w1"}, {"role": "assistant", "content": "w2"}], [PHOTO]
    )
    assert torch.isfinite(model(**processor.collate([sample])).loss)
    assert processor.num_image_tokens((50, 80)) == sample.input_ids.count(processor.image_token_id)
