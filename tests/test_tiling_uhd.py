"""LLaVA-UHD's slices against its own arithmetic and transformers' MiniCPM-V; UReader's and Monkey's grids."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops.boxes import box_area
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from connectors.errors import VlmError
from connectors.tokens import PackedTokens, TokenSpec, VisualTokens
from vlm_encoders.registry import encoder_spec
from vlm_encoders.tiling import Page, TilePlan, Tiler, build_tiler, cut, tiler_from_config
from vlm_encoders.tiling.uhd import UHDTiler
from vlm_encoders.tiling.ureader import DOCOWL_GRIDS, UREADER_GRIDS, MonkeyTiler, UReaderTiler


def image_sizes(count: int, largest: int = 20_000) -> Iterator[tuple[int, int]]:
    rng = random.Random(0)
    special = [1, 2, 13, 14, 223, 224, 225, 335, 336, 337, 448, 672, 896, 1008, largest]
    yield from ((height, width) for height in special for width in special)
    # Where float64 would choose another of UReader's grids.
    yield from ((251, 112), (341, 308), (123, 336), (345, 336), (503, 224), (287, 784), (671, 308), (12684, 12544))
    for _ in range(count):
        most = rng.choice((60, 1000, 4000, largest))
        yield rng.randint(1, most), rng.randint(1, most)


def uhd_slices(width: int, height: int, most: int, scale: int, patch: int) -> tuple[Any, Any, Any]:
    """Follow `slice_image_minicpm` of LLaVA-UHD's code in sizes alone: whole, canvas, grid, all (width, height)."""

    def whole(length: float, step: int) -> int:
        return max(math.floor(length / step) * step, step)

    def resized(size: tuple[float, float]) -> tuple[int, int]:
        shape = size[0] / size[1]
        tall = int(scale / math.sqrt(shape))
        return whole(int(tall * shape), patch), whole(tall, patch)

    wanted = min(math.ceil(width * height / (scale * scale)), most)
    if wanted <= 1:
        return resized((width, height)), None, None
    numbers = [number for number in (wanted - 1, wanted, wanted + 1) if number != 1 and number <= most]
    grids = [(m, number // m) for number in numbers for m in range(1, number + 1) if number % m == 0]
    best, least = (1, 1), float("inf")
    for grid in grids:
        error = abs(math.log(width / height) - math.log(grid[0] / grid[1]))
        if error < least:
            best, least = grid, error
    cell = resized((whole(width, best[0]) / best[0], whole(height, best[1]) / best[1]))
    return resized((width, height)), (cell[0] * best[0], cell[1] * best[1]), best


@pytest.mark.parametrize(
    ("most", "scale", "patch", "count"), [(7, 336, 14, 10_000), (9, 448, 16, 10_000), (1, 60, 7, 500)]
)
def test_slices_are_those_of_llava_uhd(most: int, scale: int, patch: int, count: int) -> None:
    tiler = UHDTiler(scale, patch=patch, max_slices=most)
    for height, width in image_sizes(count):
        plan = tiler.plan((height, width))
        whole, canvas, grid = uhd_slices(width, height, most, scale, patch)
        assert plan.pages[-1] == Page.squashed((1, 1), whole[::-1])
        assert plan.num_views == (1 if grid is None else grid[0] * grid[1] + 1) <= tiler.max_views
        if grid is None:
            assert (plan.thumbnail, len(plan.pages)) == (None, 1)
        else:
            assert (plan.main.grid, plan.main.canvas, plan.thumbnail) == (grid[::-1], canvas[::-1], "last")
            assert plan.main.content == (0, 0, *plan.canvas)


@pytest.mark.parametrize(("mode", "merge"), [("16x", 4), ("4x", 2)])
def test_slices_are_those_of_minicpm_in_transformers(mode: str, merge: int) -> None:
    processor: Any = MiniCPMV4_6ImageProcessorPil(downsample_mode=mode)
    tiler = build_tiler("minicpm-v", merge=merge)
    for size in image_sizes(10_000):
        grid = processor.get_sliced_grid(size, 9, 448)
        whole = processor.find_best_resize(size, 448, 14, mode, allow_upscale=grid is None)
        plan = tiler.plan(size)
        assert plan.pages[0] == Page.squashed((1, 1), whole), size
        if grid is None:
            assert len(plan.pages) == 1
        else:
            assert list(plan.main.grid) == grid, size
            assert plan.main.canvas == processor.get_refine_size(size, grid, 448, 14, mode, allow_upscale=True), size
            assert plan.thumbnail == "first"


@pytest.mark.parametrize("size", [(50, 77), (130, 31), (28, 20), (9, 300), (200, 300)])
def test_pixels_are_those_of_minicpm_in_transformers(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor: Any = MiniCPMV4_6ImageProcessorPil(
        scale_resolution=56, patch_size=7, downsample_mode="4x", do_rescale=False, do_normalize=False
    )
    theirs = processor(Image.fromarray(pixels), return_tensors="np")
    tiler = build_tiler("minicpm-v", 56, slice_size=56, patch=7, merge=2)
    views = cut(Image.fromarray(pixels), tiler.plan(size))
    patches = [
        np.asarray(view).transpose(2, 0, 1).reshape(3, view.height // 7, 7, view.width // 7, 7) for view in views
    ]
    ours = np.concatenate([each.transpose(0, 2, 1, 3, 4).reshape(3, 7, -1) for each in patches], axis=-1)
    assert np.array_equal(ours, theirs["pixel_values"][0])
    assert [[view.height // 7, view.width // 7] for view in views] == theirs["target_sizes"].tolist()


def test_views_keep_their_shape_within_the_area() -> None:
    tiler = UHDTiler()
    rng = random.Random(2)
    for _ in range(2000):
        height = rng.randint(40, 4000)
        plan = tiler.plan((height, round(height * rng.uniform(0.1, 10))))
        assert all(rows * columns <= 336 * 336 for rows, columns in plan.views)
        assert all(rows % 14 == columns % 14 == 0 for rows, columns in plan.views)


def test_squares_are_views_of_one_size() -> None:
    square, free = UHDTiler(28, 56, square=True), UHDTiler(28, 56)
    assert (square.native, free.native, UHDTiler.native) == (False, True, True)
    for size in image_sizes(500):
        plan = square.plan(size)
        assert set(plan.views) == {(28, 28)}
        assert [page.grid for page in plan.pages] == [page.grid for page in free.plan(size).pages]
    build_tiler("llava-uhd:square=true", 336).check(encoder_spec("clip-vit-l-14-336"))
    with pytest.raises(VlmError, match="views of many sizes"):
        build_tiler("llava-uhd").check(encoder_spec("clip-vit-l-14-336"))
    with pytest.raises(VlmError, match="multiples of 16; use patch=16"):
        build_tiler("llava-uhd").check(encoder_spec("siglip2-naflex-b-16"))
    build_tiler("llava-uhd", encoder_spec("siglip2-naflex-b-16")).check(encoder_spec("siglip2-naflex-b-16"))


def test_commas_and_line_breaks_tell_where_slices_stand() -> None:
    plan = UHDTiler().plan((500, 1000))
    assert plan.main.grid == (2, 3)
    spec = TokenSpec(64, 8)
    row = [64, ",", 64, ",", 64, "\n"]
    assert UHDTiler().layout.pieces(plan, spec) == [*row, *row, 64]
    assert UHDTiler(markers=False).layout.pieces(plan, spec) == [7 * 64]
    single = UHDTiler().plan((100, 100))
    assert UHDTiler().layout.pieces(single, spec) == [64]


def ureader_grid(size: tuple[int, int], grids: tuple[tuple[int, int], ...], side: int) -> Tensor:
    """Score grids by the tensors of UReader's `anchor_rank`, all of them boxes from the origin."""

    def overlap(boxes: Tensor, areas: Tensor, others: Tensor) -> Tensor:
        extent = torch.min(boxes[:, None, 2:], others[:, 2:]) - torch.max(boxes[:, None, :2], others[:, :2])
        inside = extent.clamp(min=0).prod(dim=2)
        return inside / (areas[:, None] + box_area(others) - inside + 1e-5)

    anchors = torch.tensor([[0, 0, columns * side, rows * side] for rows, columns in grids])
    shaped = anchors.clone()
    shaped[:, 3] = size[0] / size[1] * anchors[:, 2]
    areas = box_area(anchors)
    by_size = overlap(anchors, areas, torch.tensor([[0, 0, size[1], size[0]]])).squeeze(1)
    return overlap(anchors, areas, shaped).diag() * 100 + by_size


@pytest.mark.parametrize(
    ("grids", "side", "count"), [(UREADER_GRIDS, 224, 10_000), (DOCOWL_GRIDS, 448, 10_000), (UREADER_GRIDS, 4, 500)]
)
def test_grids_are_those_of_ureader(grids: tuple[tuple[int, int], ...], side: int, count: int) -> None:
    tiler = UReaderTiler(side, grids)
    for size in image_sizes(count):
        plan = tiler.plan(size)
        assert plan.main.grid == grids[int(ureader_grid(size, grids, side).argmax())], size
        assert plan.pages == (Page.squashed((1, 1), (side, side)), Page.squashed(plan.main.grid, (side, side)))
        assert plan.thumbnail == "first"
        assert plan.num_views <= tiler.max_views


def test_ranks_are_those_of_ureader_s_scores() -> None:
    tiler = UReaderTiler(thumbnail=False)
    for size in image_sizes(200):
        order = ureader_grid(size, UREADER_GRIDS, 224).argsort(descending=True, stable=True)
        assert [plan.main.grid for plan in tiler.ranked(size)] == [UREADER_GRIDS[place] for place in order]


def test_the_grids_of_ureader_and_docowl() -> None:
    assert (len(UREADER_GRIDS), max(map(math.prod, UREADER_GRIDS))) == (48, 20)
    assert (len(DOCOWL_GRIDS), max(map(math.prod, DOCOWL_GRIDS))) == (23, 9)
    for grids in (UREADER_GRIDS, DOCOWL_GRIDS):
        assert {(columns, rows) for rows, columns in grids} == set(grids)


def test_docowl_marks_each_view_from_zero() -> None:
    tiler = build_tiler("docowl", grids=((1, 2), (2, 1)))
    pieces = tiler.layout.pieces(tiler.plan((30, 60)), TokenSpec(256, 8))
    assert pieces == ["<global_img>", 256, "<crop_img_row0_col0>", 256, "<crop_img_row0_col1>", 256]
    assert build_tiler("ureader").layout.pieces(tiler.plan((30, 60)), TokenSpec(65, 8)) == [195]


def test_monkey_cuts_four_windows_of_any_image() -> None:
    tiler = MonkeyTiler()
    for size in image_sizes(200):
        plan = tiler.plan(size)
        assert plan.pages == (
            Page.squashed((2, 2), (448, 448)),
            Page.squashed((1, 1), (448, 448), through=((896, 896),)),
        )
        assert (plan.thumbnail, plan.num_views, tiler.max_views) == ("last", 5, 5)
    assert tiler.layout.pieces(tiler.plan((9, 9)), TokenSpec(256, 8)) == ["<img>", 1280, "</img>"]


TILERS: list[Tiler] = [
    UHDTiler(28, 42, patch=7),
    UHDTiler(28, patch=7, rounding="nearest", thumbnail="first", markers=False),
    UHDTiler(28, 56, square=True),
    UReaderTiler(28),
    UReaderTiler(28, DOCOWL_GRIDS, thumbnail=False, markers=True),
    MonkeyTiler(28),
    MonkeyTiler(28, (1, 3), thumbnail=False, markers=False),
]


@pytest.mark.parametrize("tiler", TILERS, ids=lambda tiler: tiler.name)
def test_counts_are_those_of_the_tokens(tiler: Tiler) -> None:
    torch.manual_seed(0)
    for size in random.Random(1).sample(list(image_sizes(300, 3000)), 30):
        for plan in tiler.ranked(size):
            assert plan.num_views <= (tiler.max_views or 0)
            views = [
                VisualTokens(torch.randn(1, rows // 7 * (columns // 7), 3), (rows // 7, columns // 7))
                for rows, columns in plan.views
            ]
            specs = [
                TokenSpec(rows // 7 * (columns // 7), 3, (rows // 7, columns // 7))
                for rows, columns in (page.view for page in plan.pages)
            ]
            (sequence,) = tiler.layout.arrange(PackedTokens.join(views), [plan])
            assert torch.equal(sequence, torch.cat([view.tokens[0] for view in views]))
            runs = [piece for piece in tiler.layout.pieces(plan, specs) if isinstance(piece, int)]
            assert sum(runs) == len(sequence) == tiler.layout.num_tokens(plan, specs)


@pytest.mark.parametrize("tiler", TILERS, ids=lambda tiler: tiler.name)
def test_budgets_are_kept(tiler: Tiler) -> None:
    def count(plan: TilePlan) -> int:
        views = [(rows // 7, columns // 7) for rows, columns in (page.view for page in plan.pages)]
        return tiler.layout.num_tokens(plan, [TokenSpec(rows * columns, 3, (rows, columns)) for rows, columns in views])

    for size in random.Random(1).sample(list(image_sizes(300, 3000)), 50):
        costs = list(map(count, tiler.ranked(size)))
        for most in {min(costs), max(costs), costs[0], (min(costs) + max(costs)) // 2}:
            assert count(tiler.plan_within(size, most, count)) <= most
        assert tiler.plan_within(size, costs[0], count) == tiler.plan(size)
        with pytest.raises(VlmError, match=f"at least {min(costs)} tokens"):
            tiler.plan_within(size, min(costs) - 1, count)


@pytest.mark.parametrize("tiler", TILERS, ids=lambda tiler: tiler.name)
def test_saved_tilers_come_back(tiler: Tiler) -> None:
    assert tiler_from_config(json.loads(json.dumps(tiler.config()))) == tiler
    assert hash(tiler) == hash(tiler_from_config(tiler.config()))
    assert tiler_from_config(tiler.config()).native == tiler.native


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: UHDTiler(0), "at least 1 px"),
        (lambda: UHDTiler(28, 0), "at least 1 px"),
        (lambda: UHDTiler(max_slices=0), "max_slices=0"),
        (lambda: UHDTiler(rounding="up"), "floor or nearest"),  # type: ignore[arg-type]
        (lambda: UHDTiler().plan((0, 1)), "at least 1 px"),
        (lambda: UReaderTiler(grids=()), "at least one tile"),
        (lambda: UReaderTiler(grids=((0, 1),)), "at least one tile"),
        (lambda: UReaderTiler().plan((1, 0)), "at least 1 px"),
        (lambda: MonkeyTiler(grid=(2, 0)), "at least one tile"),
        (lambda: MonkeyTiler().plan((1, 0)), "at least 1 px"),
    ],
)
def test_nonsense_is_refused(make: Any, said: str) -> None:
    with pytest.raises(VlmError, match=said):
        make()
