"""Connectors that change or read the grid: against other libraries, plain loops and one another."""

import math
import re
from collections.abc import Callable
from itertools import product
from shutil import which
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from connectors.base import CONNECTORS, Connector
from connectors.blocks import ON_ODD, divisible, fit, fit_packed, fold_grid, gather_blocks
from connectors.chain import Chain
from connectors.conv import Conv
from connectors.errors import TokenShapeError, UnknownNameError, VlmError
from connectors.patch_merger import PatchMerger
from connectors.pixel_shuffle import PixelShuffle
from connectors.pooled_projector import PooledProjector
from connectors.pooling import AvgPool, MaxPool, Pool
from connectors.position import Position
from connectors.recipe import build_connector, parse_recipe
from connectors.resize import RESIZE_MODES, Resize
from connectors.testing import check_connector
from connectors.tokens import Grid, PackedTokens, TokenSpec, VisualTokens

GRIDS = [(4, 4), (2, 6), (6, 4)]
ODD_GRIDS = [(5, 5), (3, 6), (7, 2), (1, 4), (5, 8)]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def randomise(module: nn.Module) -> None:
    """Draw every parameter, norms and biases too, so that none hides behind 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def view(grid: Grid, dim: int = 3, prefix: int = 0) -> VisualTokens:
    return VisualTokens(draw(2, math.prod(grid), dim), grid, draw(2, prefix, dim, seed=2) if prefix else None)


def put(ours: nn.Module, reference: nn.Module, names: dict[str, str]) -> None:
    """Load a reference's weights under our names, strictly."""
    renamed = {}
    for name, tensor in reference.state_dict().items():
        stem, _, kind = name.rpartition(".")
        renamed[f"{names[stem]}.{kind}"] = tensor
    ours.load_state_dict(renamed, strict=True)


# Pixel shuffle


def plain_fold(visual: VisualTokens, factor: int) -> Tensor:
    """Fold by loops over blocks and over places in a block; (B, R', C', D*factor**2)."""
    assert visual.grid is not None
    rows, columns = visual.grid
    places = visual.tokens.unflatten(1, visual.grid)
    lines = []
    for row in range(0, rows, factor):
        line = []
        for column in range(0, columns, factor):
            inside = [places[:, row + down, column + right] for down in range(factor) for right in range(factor)]
            line.append(torch.cat(inside, dim=-1))
        lines.append(torch.stack(line, dim=1))
    return torch.stack(lines, dim=1)


@pytest.mark.parametrize("grid", GRIDS)
def test_pixel_shuffle_is_internvls(grid: Grid) -> None:
    from transformers.models.internvl.modeling_internvl import InternVLModel

    visual = view(grid)
    expected = InternVLModel.pixel_shuffle(None, visual.tokens.unflatten(1, grid), scale_factor=0.5)
    out = PixelShuffle(2)(visual)
    assert out.grid == (grid[0] // 2, grid[1] // 2)
    assert torch.equal(out.tokens, expected.flatten(1, 2))


@pytest.mark.parametrize(("side", "factor"), [(4, 2), (6, 3), (8, 4), (3, 1)])
def test_pixel_shuffle_is_idefics3s_and_llama4s(side: int, factor: int) -> None:
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
    from transformers.models.llama4.modeling_llama4 import pixel_shuffle

    visual = view((side, side), dim=factor * factor)
    out = PixelShuffle(factor)(visual).tokens
    assert torch.equal(out, Idefics3Connector.pixel_shuffle(None, visual.tokens, factor))
    if factor != 3:  # a third is no binary fraction, and Llama 4 rounds it down
        assert torch.equal(out, pixel_shuffle(visual.tokens, 1 / factor))


@pytest.mark.parametrize(("grid", "factor"), [*((grid, 2) for grid in GRIDS), ((3, 9), 3), ((2, 5), 1)])
def test_pixel_shuffle_is_a_loop_over_blocks(grid: Grid, factor: int) -> None:
    visual = view(grid)
    assert torch.equal(PixelShuffle(factor)(visual).tokens, plain_fold(visual, factor).flatten(1, 2))


@pytest.mark.parametrize("grid", [*GRIDS, (2, 4)])
def test_the_transposed_fold_is_internvls_first_version(grid: Grid) -> None:
    visual = view(grid)
    out = PixelShuffle(2, transposed=True)(visual)
    assert out.grid == (grid[1] // 2, grid[0] // 2)
    # `ps_version` "v1" stops before the last permute.
    rows, columns = grid
    halved = visual.tokens.reshape(2, rows, columns // 2, 6).permute(0, 2, 1, 3)
    assert torch.equal(out.tokens, halved.reshape(2, columns // 2, rows // 2, 12).flatten(1, 2))
    assert torch.equal(out.tokens, plain_fold(visual, 2).transpose(1, 2).flatten(1, 2))


def test_pixel_shuffle_takes_tokens_cut_from_a_longer_sequence() -> None:
    sequence = draw(2, 17, 3)
    cut = PixelShuffle(2)(VisualTokens(sequence[:, 1:], (4, 4))).tokens
    assert torch.equal(cut, PixelShuffle(2)(VisualTokens(sequence[:, 1:].clone(), (4, 4))).tokens)


# Grids that do not divide


def told(grid: Grid, factor: int) -> dict[str, Grid | None]:
    """Read what the refusal says of each other way."""
    with pytest.raises(TokenShapeError, match=rf"^a {grid[0]}x{grid[1]} grid does not divide into ") as caught:
        divisible(grid, factor)
    message = str(caught.value)
    assert f"into {factor}x{factor} blocks; " in message
    assert message.endswith(", or choose another image size")
    found: dict[str, Grid | None] = {}
    for way, count in re.findall(r"on_odd=(\w+) gives (none|\d+x\d+ = \d+ tokens?)", message):
        numbers = [int(number) for number in re.findall(r"\d+", count)]
        assert not numbers or numbers[0] * numbers[1] == numbers[2]
        found[way] = (numbers[0], numbers[1]) if numbers else None
    assert list(found) == list(ON_ODD[1:])
    return found


def odd_cases() -> list[tuple[Grid, int]]:
    sides = product(range(1, 8), range(1, 8), range(2, 5))
    return [((rows, columns), factor) for rows, columns, factor in sides if rows % factor or columns % factor]


def test_the_refusal_tells_what_each_way_really_gives() -> None:
    kinds: list[Callable[[int, str], Connector]] = [
        PixelShuffle,
        lambda factor, way: PixelShuffle(factor, way, transposed=True),
        lambda factor, way: AvgPool(factor, on_odd=way),
        lambda factor, way: MaxPool(factor, on_odd=way),
        lambda factor, way: PatchMerger(2, 3, factor, on_odd=way),
    ]
    for grid, factor in odd_cases():
        visual = view(grid, dim=2)
        for way, size in told(grid, factor).items():
            for kind in kinds:
                connector = kind(factor, way)
                turned = isinstance(connector, PixelShuffle) and connector.transposed
                if size is None:
                    with pytest.raises(TokenShapeError, match="on_odd=crop gives none"):
                        connector(visual)
                    continue
                with torch.no_grad():
                    out = connector(visual)
                assert out.spec == connector.out_spec(visual.spec)
                assert out.grid == (size[::-1] if turned else size), (grid, factor, way)


def test_27_by_27_in_twos() -> None:
    assert told((27, 27), 2) == {"pad": (14, 14), "crop": (13, 13), "resize": (14, 14)}
    assert told((13, 27), 3) == {"pad": (5, 9), "crop": (4, 9), "resize": (4, 9)}
    with pytest.raises(TokenShapeError, match="on_odd=pad gives 14x14 = 196 tokens, on_odd=crop gives 13x13 = 169"):
        PixelShuffle(2).out_spec(TokenSpec(729, 4, (27, 27)))
    assert fold_grid((4, 6), 2) == (2, 3)


@pytest.mark.parametrize("grid", ODD_GRIDS)
@pytest.mark.parametrize("factor", [2, 3])
def test_padding_is_zeros_at_the_bottom_and_right_and_cropping_cuts_there(grid: Grid, factor: int) -> None:
    visual = view(grid, prefix=1)
    rows, columns = (-(-side // factor) * factor for side in grid)
    padded = fit(visual, factor, "pad")
    expected = torch.zeros(2, rows, columns, 3)
    expected[:, : grid[0], : grid[1]] = visual.tokens.unflatten(1, grid)
    assert padded.grid == (rows, columns)
    assert torch.equal(padded.tokens, expected.flatten(1, 2))
    assert padded.prefix is visual.prefix
    if min(grid) < factor:
        return
    rows, columns = (side // factor * factor for side in grid)
    cropped = fit(visual, factor, "crop")
    assert cropped.grid == (rows, columns)
    assert torch.equal(cropped.tokens, visual.tokens.unflatten(1, grid)[:, :rows, :columns].flatten(1, 2))


@pytest.mark.parametrize("way", ON_ODD)
def test_gathered_blocks_are_those_of_each_image_fitted_alone(way: str) -> None:
    grids: list[Grid] = [(4, 6), (2, 2)] if way == "error" else [(5, 3), (4, 6), (2, 7), (4, 4)]
    packed = PackedTokens(draw(sum(map(math.prod, grids)), 3), grids)
    blocks, real, out = gather_blocks(packed, 2, way)
    images = fit_packed(packed, 2, way).split()
    expected = [plain_fold(image, 2)[0] for image in images]
    assert out == [tuple(each.shape[:2]) for each in expected]
    assert torch.equal(blocks.flatten(1), torch.cat([each.flatten(0, 1) for each in expected]))
    assert (real is not None) == (way == "pad")
    if real is not None:
        assert torch.equal(real, blocks.any(-1))


# Pooling


def plain_pool(visual: VisualTokens, spans: tuple[list[slice], list[slice]], how: Callable[[Tensor], Tensor]) -> Tensor:
    assert visual.grid is not None
    places = visual.tokens.unflatten(1, visual.grid)
    return torch.stack([how(places[:, down, right].flatten(1, 2)) for down in spans[0] for right in spans[1]], dim=1)


def blocks_of(side: int, factor: int, *, whole: bool) -> list[slice]:
    """Cut a side; the last block may be short unless only whole ones are wanted."""
    ends = range(factor, side + 1, factor) if whole else range(factor, side + factor, factor)
    return [slice(end - factor, min(end, side)) for end in ends]


def parts_of(side: int, parts: int) -> list[slice]:
    """Cut a side into parts that may overlap."""
    return [slice(part * side // parts, math.ceil((part + 1) * side / parts)) for part in range(parts)]


POOLS: list[tuple[type[Pool], Callable[[Tensor], Tensor]]] = [
    (AvgPool, lambda block: block.mean(1)),
    (MaxPool, lambda block: block.amax(1)),
]


@pytest.mark.parametrize(("kind", "how"), POOLS)
@pytest.mark.parametrize(("grid", "factor"), [((4, 6), 2), ((3, 6), 3), ((2, 3), 1)])
def test_pooling_by_a_factor_reads_each_block(
    kind: type[Pool], how: Callable[[Tensor], Tensor], grid: Grid, factor: int
) -> None:
    visual = view(grid, prefix=2)
    spans = (blocks_of(grid[0], factor, whole=True), blocks_of(grid[1], factor, whole=True))
    out = kind(factor)(visual)
    assert out.grid == (grid[0] // factor, grid[1] // factor)
    assert out.prefix is visual.prefix
    torch.testing.assert_close(out.tokens, plain_pool(visual, spans, how), **TOLERANCE)


@pytest.mark.parametrize(("kind", "how"), POOLS)
@pytest.mark.parametrize("grid", ODD_GRIDS)
@pytest.mark.parametrize("factor", [2, 3, 9])
def test_pooling_an_odd_grid_reads_only_what_is_there(
    kind: type[Pool], how: Callable[[Tensor], Tensor], grid: Grid, factor: int
) -> None:
    # All below zero: a zero that only fills up would show in a mean and in a maximum.
    visual = VisualTokens(view(grid).tokens - 9, grid)
    for way, whole in (("pad", False), ("crop", True)):
        if whole and min(grid) < factor:
            continue
        spans = (blocks_of(grid[0], factor, whole=whole), blocks_of(grid[1], factor, whole=whole))
        out = kind(factor, on_odd=way)(visual)
        assert out.grid == (len(spans[0]), len(spans[1]))
        torch.testing.assert_close(out.tokens, plain_pool(visual, spans, how), **TOLERANCE)


@pytest.mark.parametrize(("kind", "how"), POOLS)
@pytest.mark.parametrize(
    ("grid", "size"),
    [((4, 6), (2, 3)), ((7, 5), (3, 4)), ((5, 5), (5, 5)), ((6, 4), (1, 1)), ((3, 7), (2, 7)), ((4, 9), (2, 4))],
)
def test_pooling_to_a_grid_reads_blocks_that_may_overlap(
    kind: type[Pool], how: Callable[[Tensor], Tensor], grid: Grid, size: Grid
) -> None:
    visual = view(grid, prefix=1)
    out = kind(grid=size)(visual)
    assert out.grid == size
    assert out.prefix is visual.prefix
    spans = (parts_of(grid[0], size[0]), parts_of(grid[1], size[1]))
    torch.testing.assert_close(out.tokens, plain_pool(visual, spans, how), **TOLERANCE)


@pytest.mark.parametrize(("side", "stride"), [(4, 2), (6, 3), (5, 2)])
def test_pools_and_convolution_are_llava_next_videos(side: int, stride: int) -> None:
    from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler

    def theirs(mode: str) -> nn.Module:
        config = SimpleNamespace(
            spatial_pool_mode=mode,
            spatial_pool_stride=stride,
            spatial_pool_out_channels=5,
            vision_config=SimpleNamespace(hidden_size=3, image_size=side, patch_size=1),
        )
        made: nn.Module = LlavaNextVideoPooler(config)
        randomise(made)
        return made

    visual = view((side, side))
    average, largest = AvgPool(stride, on_odd="crop"), MaxPool(stride, on_odd="crop")
    torch.testing.assert_close(average(visual).tokens, theirs("average")(visual.tokens), **TOLERANCE)
    assert torch.equal(largest(visual).tokens, theirs("max")(visual.tokens))
    conv, reference = Conv(3, 5, stride, stride, 0, bias=True), theirs("conv")
    put(conv, reference, {"pool": "conv"})
    torch.testing.assert_close(conv(visual).tokens, reference(visual.tokens), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{"factor": 8}, {"factor": 7, "on_odd": "pad"}, {"grid": (1, 1)}, {"grid": (3, 3)}])
def test_the_mean_of_the_largest_half_numbers_is_finite(dtype: torch.dtype, options: dict[str, Any]) -> None:
    tokens = torch.full((64, 2), 60000.0).to(dtype)
    pool = AvgPool(**options)
    alone = pool(VisualTokens(tokens[None], (8, 8))).tokens
    packed = pool.forward_packed(PackedTokens(tokens, [(8, 8)])).tokens
    for out in (alone, packed):
        assert out.dtype == dtype
        assert (out == tokens[0, 0]).all()


def test_the_mean_keeps_double_precision() -> None:
    tokens = draw(16, 3).double()
    for pool in (AvgPool(2), AvgPool(grid=(3, 3))):
        out = pool.forward_packed(PackedTokens(tokens, [(4, 4)])).tokens
        assert out.dtype == torch.float64
        torch.testing.assert_close(out, pool(VisualTokens(tokens[None], (4, 4))).tokens[0], rtol=0, atol=1e-15)


# Resize


def weights_of(side: int, out: int, mode: str) -> Tensor:
    """Give, place by place that goes out, the weights of those that came in; corners not aligned."""
    weights = torch.zeros(out, side, dtype=torch.float64)
    if mode == "area":
        for row, span in enumerate(parts_of(side, out)):
            weights[row, span] = 1 / (span.stop - span.start)
        return weights
    for row in range(out):
        if mode == "nearest":
            weights[row, row * side // out] = 1
            continue
        place = (row + 0.5) * side / out - 0.5
        if mode == "bilinear":
            place = max(place, 0.0)
        low = math.floor(place)
        for column in range(low - 1, low + 3):
            away = abs(place - column)
            weight = max(0.0, 1 - away) if mode == "bilinear" else keys_cubic(away)
            weights[row, min(max(column, 0), side - 1)] += weight
    return weights


def keys_cubic(away: float, a: float = -0.75) -> float:
    if away <= 1:
        return (a + 2) * away**3 - (a + 3) * away**2 + 1
    return a * away**3 - 5 * a * away**2 + 8 * a * away - 4 * a if away < 2 else 0.0


def plain_resize(tokens: Tensor, grid: Grid, size: Grid, mode: str) -> Tensor:
    down, right = weights_of(grid[0], size[0], mode), weights_of(grid[1], size[1], mode)
    places = tokens.double().unflatten(1, grid)
    return torch.einsum("ir,jc,brcd->bijd", down, right, places).flatten(1, 2).to(tokens.dtype)


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize(("grid", "size"), [((4, 6), (2, 3)), ((5, 3), (3, 7)), ((4, 4), (4, 4)), ((7, 2), (3, 1))])
def test_resize_weighs_the_neighbours(mode: str, grid: Grid, size: Grid) -> None:
    visual = view(grid, prefix=2)
    out = Resize(grid=size, mode=mode)(visual)
    assert out.grid == size
    assert out.prefix is visual.prefix
    torch.testing.assert_close(out.tokens, plain_resize(visual.tokens, grid, size, mode), **TOLERANCE)


@pytest.mark.parametrize("side", [4, 5, 27])
def test_resize_by_two_is_onevisions_pooling_of_frames(side: int) -> None:
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=side * 14 + 6, patch_size=14))
    visual = view((side, side))
    expected = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=config), visual.tokens)
    out = Resize(2)(visual)
    assert out.grid == (math.ceil(side / 2), math.ceil(side / 2))
    assert torch.equal(out.tokens, expected)


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_half_tokens_are_resized_in_fp32(mode: str) -> None:
    visual = view((5, 7))
    for dtype in (torch.bfloat16, torch.float16):
        half = visual.tokens.to(dtype)
        out = Resize(2, mode=mode)(VisualTokens(half, visual.grid)).tokens
        assert torch.equal(out, Resize(2, mode=mode)(VisualTokens(half.float(), visual.grid)).tokens.to(dtype))


# Convolution


@pytest.mark.parametrize("grid", [(8, 8), (4, 12), (7, 5), (1, 1)])
def test_two_convolutions_and_a_matrix_are_got_ocr2s_projector(grid: Grid) -> None:
    from transformers.models.got_ocr2.modeling_got_ocr2 import GotOcr2MultiModalProjector

    config = SimpleNamespace(
        vision_config=SimpleNamespace(output_channels=3), text_config=SimpleNamespace(hidden_size=10)
    )
    reference = GotOcr2MultiModalProjector(config)
    randomise(reference)
    visual = view(grid)
    ours = build_connector("conv:dim=6+conv+linear", visual.spec, 10)
    names = {"conv_upsampler1": "links.0.conv", "conv_upsampler2": "links.1.conv"}
    put(ours, reference, {**names, "multimodal_projector": "links.2.proj"})
    torch.testing.assert_close(ours(visual).tokens, reference(visual.as_map()), **TOLERANCE)


def test_a_convolution_states_its_grid() -> None:
    refused = 0
    for kernel, stride, padding in product((1, 2, 3, 5), (1, 2, 3), (0, 1, 2)):
        conv = Conv(2, 3, kernel, stride, padding)
        for grid in product(range(1, 7), (1, 4, 5)):
            visual = view(grid, dim=2)
            if min(grid) + 2 * padding < kernel:
                least = kernel - 2 * padding
                with pytest.raises(TokenShapeError, match=f"a grid of at least {least}x{least}, got {grid[0]}x"):
                    conv(visual)
                refused += 1
                continue
            with torch.no_grad():
                out = conv(visual)
            assert out.spec == conv.out_spec(visual.spec)
            rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in grid)
            assert out.grid == (rows, columns)
    assert refused


def test_half_the_kernel_is_the_padding_unless_told() -> None:
    for kernel in (1, 2, 3, 5):
        assert Conv(2, 3, kernel).padding == kernel // 2
    assert Conv(2, 3).options() == {"kernel": 3, "stride": 2, "bias": False, "dim": 3}
    assert Conv(2, 3, padding=0).options()["padding"] == 0
    assert set(Conv(2, 3, bias=True).state_dict()) == {"conv.weight", "conv.bias"}


# Position


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (6, 2), (9, 8)])
def test_position_adds_its_table_resized_to_the_grid(grid: Grid) -> None:
    position = Position(3, (3, 5))
    randomise(position)
    visual = view(grid, prefix=2)
    before = visual.tokens.clone()
    out = position(visual)
    table = plain_resize(position.table.detach().flatten(0, 1)[None], (3, 5), grid, "bicubic")
    torch.testing.assert_close(out.tokens, visual.tokens + table, **TOLERANCE)
    assert (out.grid, out.prefix) == (grid, visual.prefix)
    assert torch.equal(visual.tokens, before)
    if grid == (3, 5):
        assert torch.equal(out.tokens[:, 7], visual.tokens[:, 7] + position.table[1, 2])


def test_the_table_is_of_the_encoders_grid_and_starts_small() -> None:
    position = Position.build(TokenSpec(40 * 30, 16, (40, 30), 1), 7)
    assert position.table.shape == (40, 30, 16)
    assert position.options() == {"grid": (40, 30)}
    assert position.table.std().item() == pytest.approx(0.02, rel=0.05)
    assert position.table.mean().abs().item() < 1e-3
    assert Position.build(TokenSpec(12, 16, (4, 3)), 7, grid=(2, 5)).table.shape == (2, 5, 16)


def test_a_half_table_is_resized_in_fp32() -> None:
    position = Position(3, (4, 4))
    randomise(position)
    position.to(torch.bfloat16)
    wide = Position(3, (4, 4))
    wide.load_state_dict(position.state_dict())
    assert torch.equal(position.table_of((5, 3)), wide.table_of((5, 3)).to(torch.bfloat16))
    tokens = draw(1, 15, 3).to(torch.bfloat16)
    assert wide(VisualTokens(tokens, (5, 3))).tokens.dtype == torch.bfloat16


def test_packed_images_of_one_grid_share_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Grid] = []
    resized = Position.table_of
    monkeypatch.setattr(Position, "table_of", lambda self, grid: made.append(grid) or resized(self, grid))
    grids: list[Grid] = [(2, 3), (3, 2), (2, 3), (2, 3)]
    Position(3, (3, 3)).forward_packed(PackedTokens(draw(24, 3), grids))
    assert sorted(made) == [(2, 3), (3, 2)]


# Patch merger


def in_blocks(visual: VisualTokens, factor: int) -> Tensor:
    """Order one image's tokens block by block, as Qwen's encoders give them."""
    return plain_fold(visual, factor).unflatten(-1, (factor * factor, -1)).flatten(1, 3)[0]


MERGER_KEYS = {"ln_q": "norm", "mlp.0": "layers.0", "mlp.2": "layers.2"}
MERGER_3_KEYS = {"norm": "norm", "linear_fc1": "layers.0", "linear_fc2": "layers.2"}


@pytest.mark.parametrize(("grid", "factor"), [*((grid, 2) for grid in GRIDS), ((3, 6), 3)])
def test_patch_merger_is_qwen2_vls_and_its_followers(grid: Grid, factor: int) -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger as Qwen2PatchMerger
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

    config = SimpleNamespace(hidden_size=6, spatial_merge_size=factor, out_hidden_size=10)
    cases = [
        (Qwen2PatchMerger(10, 6, factor), MERGER_KEYS, {}),
        (Qwen2_5_VLPatchMerger(10, 6, factor), MERGER_KEYS, {"norm": "rms"}),
        (Qwen3VLVisionPatchMerger(config), MERGER_3_KEYS, {}),
        (Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=True), MERGER_3_KEYS, {"norm_after": True}),
    ]
    images = VisualTokens(draw(1, math.prod(grid), 6), grid), VisualTokens(draw(1, math.prod(grid), 6, seed=3), grid)
    for reference, keys, options in cases:
        randomise(reference)
        ours = PatchMerger(6, 10, factor, **options)
        put(ours, reference, keys)
        expected = torch.stack([reference(in_blocks(image, factor)) for image in images])
        out = ours(VisualTokens(torch.cat([image.tokens for image in images]), grid))
        assert out.grid == (grid[0] // factor, grid[1] // factor)
        torch.testing.assert_close(out.tokens, expected, **TOLERANCE)
        packed = ours.forward_packed(PackedTokens(torch.cat([image.tokens[0] for image in images]), [grid, grid]))
        torch.testing.assert_close(packed.tokens, expected.flatten(0, 1), **TOLERANCE)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("grid", ODD_GRIDS)
def test_the_norm_of_a_merger_sees_no_padding(norm: str, grid: Grid) -> None:
    merger = PatchMerger(4, 5, norm=norm, on_odd="pad")
    randomise(merger)
    visual = view(grid, dim=4)
    rows, columns = (-(-side // 2) * 2 for side in grid)
    filled = torch.zeros(2, rows, columns, 4)
    filled[:, : grid[0], : grid[1]] = merger.norm(visual.tokens).unflatten(1, grid)
    expected = merger.layers(plain_fold(VisualTokens(filled.flatten(1, 2), (rows, columns)), 2)).flatten(1, 2)
    torch.testing.assert_close(merger(visual).tokens, expected, **TOLERANCE)
    with pytest.raises(VlmError, match="on_odd=pad and norm_after=true, so the norm would see the zeros; use on_odd="):
        PatchMerger(4, 5, norm_after=True, on_odd="pad")


def test_the_keys_of_mergers_and_projectors_are_stable() -> None:
    layers = {f"layers.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")}
    assert set(PatchMerger(4, 5).state_dict()) == {"norm.weight", "norm.bias", *layers}
    assert set(PatchMerger(4, 5, norm="rms").state_dict()) == {"norm.weight", *layers}
    assert set(PooledProjector(4, 5).state_dict()) == {"norm.weight", "proj.weight"}
    assert set(Position(4, (2, 3)).state_dict()) == {"table"}


# Pooled projector


@pytest.mark.parametrize(("side", "out"), [(8, 4), (6, 2), (4, 4)])
def test_pooled_projector_is_gemma3s(side: int, out: int) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

    eps = 1e-3
    config = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=6, layer_norm_eps=eps, image_size=side * 14, patch_size=14),
        text_config=SimpleNamespace(hidden_size=10),
        mm_tokens_per_image=out * out,
    )
    reference = Gemma3MultiModalProjector(config)
    randomise(reference)
    ours = PooledProjector(6, 10, (out, out), eps)
    state = reference.state_dict()
    matrix = state["mm_input_projection_weight"].T
    ours.load_state_dict({"norm.weight": state["mm_soft_emb_norm.weight"], "proj.weight": matrix})
    visual = view((side, side), dim=6)
    torch.testing.assert_close(ours(visual).tokens, reference(visual.tokens), **TOLERANCE)


@pytest.mark.parametrize(("grid", "size"), [((4, 6), (2, 3)), ((7, 5), (3, 4)), ((6, 2), (3, 2)), ((9, 4), (4, 1))])
def test_pooled_projector_takes_any_grid_that_is_not_smaller(grid: Grid, size: Grid) -> None:
    ours = PooledProjector(6, 5, size)
    randomise(ours)
    visual = view(grid, dim=6, prefix=1)
    spans = (parts_of(grid[0], size[0]), parts_of(grid[1], size[1]))
    pooled = plain_pool(visual, spans, lambda block: block.mean(1))
    normed = pooled / (pooled.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + ours.norm.weight)
    out = ours(visual)
    assert (out.grid, out.prefix) == (size, None)
    torch.testing.assert_close(out.tokens, normed @ ours.proj.weight.T, **TOLERANCE)


# All of them

RECIPES = [
    "pixel_shuffle:on_odd=pad",
    "pixel_shuffle:on_odd=crop,transposed=true",
    "pixel_shuffle:on_odd=resize",
    "avg_pool:factor=2,on_odd=pad",
    "avg_pool:factor=2,on_odd=crop",
    "avg_pool:factor=2,on_odd=resize",
    "avg_pool:grid=2x2",
    "max_pool:factor=2,on_odd=pad",
    "max_pool:factor=2,on_odd=crop",
    "max_pool:grid=2x2",
    "resize:factor=2",
    "resize:grid=5x6,mode=bicubic",
    "resize:grid=2x3,mode=area",
    "conv",
    "conv:kernel=2,stride=1,padding=0,bias=true",
    "position:grid=3x4",
    "patch_merger:on_odd=pad",
    "patch_merger:norm=rms,on_odd=resize",
    "patch_merger:norm_after=true,on_odd=crop",
    "pooled_projector:grid=2x2",
]
BIT_EQUAL = {recipe for recipe in RECIPES if re.match(r"(pixel_shuffle|max_pool):.*on_odd=(pad|crop)", recipe)}


def make(recipe: str) -> Connector:
    """Make one link for tokens of width 6."""
    ((name, options),) = parse_recipe(recipe)
    made: Connector = CONNECTORS.get(name).build(TokenSpec(16, 6, (4, 4)), 5, **options)
    return made


SPECS = [TokenSpec(16, 6, (4, 4)), TokenSpec(10, 6, (2, 5), num_prefix=5), TokenSpec(12, 6, (6, 2), num_prefix=1)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_spatial_connectors_keep_the_contract(recipe: str) -> None:
    for spec in SPECS:
        check_connector(make(recipe), spec)


@pytest.mark.parametrize("recipe", RECIPES)
def test_packed_images_are_those_mapped_alone(recipe: str) -> None:
    connector = make(recipe)
    randomise(connector)
    grids: list[Grid] = [(4, 6), (3, 5), (2, 2), (4, 6), (7, 3), (5, 4)]
    packed = PackedTokens(draw(sum(map(math.prod, grids)), 6), grids)
    before = packed.tokens.clone()
    with torch.no_grad():
        out = connector.forward_packed(packed)
        alone = [connector(image) for image in packed.split()]
    assert list(out.grids) == [image.grid for image in alone]
    torch.testing.assert_close(out.tokens, torch.cat([image.tokens[0] for image in alone]), **TOLERANCE)
    assert torch.equal(packed.tokens, before)
    if recipe in BIT_EQUAL:
        assert torch.equal(out.tokens, torch.cat([image.tokens[0] for image in alone]))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_spatial_connectors_compile_and_export(recipe: str, grid: Grid) -> None:
    connector = make(recipe).eval()
    visual = view(grid, dim=6, prefix=1)
    torch.compiler.reset()
    with torch.no_grad():
        expected = connector(visual)
        compiled = torch.compile(connector, fullgraph=True, backend="eager")(visual)
        exported = torch.export.export(Chain(connector), (visual,)).module()(visual)
    for out in (compiled, exported):
        assert torch.equal(out.tokens, expected.tokens)
        assert (out.grid, out.prefix is None) == (expected.grid, expected.prefix is None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_batch_without_an_image_passes(recipe: str) -> None:
    connector = make(recipe)
    out = connector(VisualTokens(torch.zeros(0, 15, 6), (3, 5), torch.zeros(0, 1, 6)))
    assert out.spec == connector.out_spec(TokenSpec(15, 6, (3, 5), 1))
    assert len(out.tokens) == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_queries_have_no_place_in_the_grid(recipe: str) -> None:
    with pytest.raises(TokenShapeError, match="query tokens have no grid; put spatial connectors before"):
        make(recipe)(VisualTokens(torch.zeros(1, 16, 6)))


def test_connectors_that_keep_the_width_hand_the_prefix_on() -> None:
    for recipe in RECIPES:
        keeps = re.match("avg_pool|max_pool|resize|position", recipe) is not None
        visual = view((4, 4), dim=6, prefix=3)
        assert (make(recipe)(visual).prefix is visual.prefix) == keeps, recipe


@pytest.mark.parametrize("name", ["conv", "position", "patch_merger", "pooled_projector"])
def test_connectors_built_for_a_width_refuse_another(name: str) -> None:
    wrong = VisualTokens(torch.zeros(1, 256, 7), (16, 16))
    with pytest.raises(TokenShapeError, match=f"'{name}' was built for tokens of width 6, got width 7"):
        make(name)(wrong)
    with pytest.raises(TokenShapeError, match=f"'{name}' was built for tokens of width 6, got width 7"):
        make(name).forward_packed(PackedTokens(wrong.tokens[0], [(16, 16)]))


@pytest.mark.parametrize("recipe", ["pixel_shuffle", "avg_pool:factor=2", "max_pool:factor=2", "patch_merger"])
def test_a_pack_without_an_image_is_refused(recipe: str) -> None:
    with pytest.raises(TokenShapeError, match="no image among the packed tokens; leave empty packs out"):
        make(recipe).forward_packed(PackedTokens(torch.zeros(0, 6), []))


def test_every_spatial_connector_tells_its_source() -> None:
    for recipe in RECIPES:
        cls = type(make(recipe))
        assert "https://" in cls.source
        assert cls.used_by
        assert cls.choose[0].islower()
        assert not cls.choose.endswith(".")


@pytest.mark.parametrize(
    ("attempt", "sentence"),
    [
        (lambda: PixelShuffle(0), "'pixel_shuffle' has factor=0; give a whole number of at least 1"),
        (lambda: PixelShuffle(2, "padd"), "'pixel_shuffle' has on_odd=padd; did you mean pad?"),
        (AvgPool, "'avg_pool' takes factor or grid, got neither; write avg_pool:factor=2 or avg_pool:grid="),
        (lambda: MaxPool(2, (2, 2)), "'max_pool' takes factor or grid, got both; write max_pool:factor=2 or max_pool:"),
        (lambda: MaxPool(-1), "'max_pool' has factor=-1; give a whole number of at least 1"),
        (lambda: AvgPool(grid=4), "'avg_pool' has grid=4; give rows and columns, for example grid=8x8"),  # type: ignore[arg-type]
        (lambda: AvgPool(grid=(2, 0)), "'avg_pool' has columns=0; give a whole number of at least 1"),
        (lambda: AvgPool(2, on_odd="cut"), "'avg_pool' has on_odd=cut; "),
        (lambda: AvgPool(grid=(2, 2), on_odd="pad"), "'avg_pool' has on_odd=pad beside a grid, which every grid pools"),
        (Resize, "'resize' takes factor or grid, got neither; write resize:factor=2 or resize:grid=8x8"),
        (lambda: Resize(grid=(0, 2)), "'resize' has rows=0; give a whole number of at least 1"),
        (lambda: Resize(2, mode="linear"), "'resize' has no mode 'linear'; did you mean bilinear or nearest?"),
        (lambda: Conv(4, 0), "'conv' has dim=0; give a whole number of at least 1"),
        (lambda: Conv(4, 4, 0), "'conv' has kernel=0; give a whole number of at least 1"),
        (lambda: Conv(4, 4, stride=0), "'conv' has stride=0; give a whole number of at least 1"),
        (lambda: Conv(4, 4, padding=-1), "'conv' has padding=-1; give a whole number of at least 0"),
        (lambda: Position(0, (2, 2)), "'position' has dim=0; give a whole number of at least 1"),
        (lambda: Position(4, (2, -2)), "'position' has columns=-2; give a whole number of at least 1"),
        (lambda: Position.build(TokenSpec(4, 4), 4), "query tokens have no grid; put spatial connectors before"),
        (lambda: PatchMerger(4, 4, 0), "'patch_merger' has factor=0; give a whole number of at least 1"),
        (lambda: PatchMerger(4, 4, norm="laye"), "'patch_merger' has no norm 'laye'; did you mean layer?"),
        (lambda: PatchMerger(4, 4, eps=0.0), "'patch_merger' has eps=0.0; give a small positive number such as 1e-6"),
        (lambda: PatchMerger(4, 4, eps=math.inf), "'patch_merger' has eps=inf; give a small positive number such as"),
        (lambda: PatchMerger(4, 4, eps="a"), "'patch_merger' has eps=a; give a small positive number such as 1e-6"),  # type: ignore[arg-type]
        (lambda: PatchMerger(4, 4, norm=None), "'patch_merger' has no norm 'None'; known are gemma, layer, rms"),  # type: ignore[arg-type]
        (lambda: PooledProjector(4, 4, eps=math.inf), "'pooled_projector' has eps=inf; give a small positive number"),
        (lambda: PatchMerger(4, 4, on_odd="cropp"), "'patch_merger' has on_odd=cropp; did you mean crop?"),
        (lambda: PooledProjector(4, 0), "'pooled_projector' has dim=0; give a whole number of at least 1"),
        (lambda: PooledProjector(4, 4, (2, 0)), "'pooled_projector' has columns=0; give a whole number of at least 1"),
        (lambda: PooledProjector(4, 4, eps=-1.0), "'pooled_projector' has eps=-1.0; give a small positive number such"),
        (lambda: AvgPool(grid=(5, 4))(view((4, 4))), "avg_pool:grid=5x4 is finer than the 4x4 grid that comes in; use"),
        (lambda: PooledProjector(3, 4)(view((4, 16))), "pooled_projector:grid=16x16 is finer than the 4x16 grid that"),
        (
            lambda: Conv(3, 4, 5, padding=1)(view((2, 4))),
            "'conv' with kernel=5 and padding=1 takes a grid of at least 3x3, got 2x4; use a smaller kernel or a",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(attempt: Callable[[], object], sentence: str) -> None:
    with pytest.raises(VlmError) as caught:
        attempt()
    message = str(caught.value)
    assert message.startswith(sentence)
    assert not message.endswith(".")
    assert "\n" not in message
    if "did you mean" in sentence:
        assert isinstance(caught.value, UnknownNameError)


@pytest.mark.parametrize(
    "make",
    [
        lambda grid: AvgPool(grid=grid),
        lambda grid: PooledProjector(3, 4, grid),
        lambda grid: Position(3, grid),
        lambda grid: Resize(grid=grid),
    ],
)
def test_a_grid_of_a_configuration_file_is_a_grid(make: Callable[[Any], Connector]) -> None:
    connector, spec = make([2, 2]), TokenSpec(16, 3, (4, 4))
    assert connector.options()["grid"] == (2, 2)
    assert isinstance(connector.options()["grid"], tuple)
    assert connector.out_spec(spec) == make((2, 2)).out_spec(spec)
    check_connector(connector, spec)


def test_resizing_keeps_doubles_double() -> None:
    visual = VisualTokens(draw(1, 15, 3).double() + 1e-12, (3, 5))
    expected = nn.functional.interpolate(visual.as_map(), size=(2, 2), mode="bilinear")
    torch.testing.assert_close(Resize(grid=(2, 2))(visual).as_map(), expected, rtol=1e-14, atol=1e-14)


def test_mergers_and_projectors_start_as_they_say() -> None:
    merger = PatchMerger(16, 64)
    for index in (0, 2):
        assert merger.layers[index].weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not merger.layers[index].bias.any()
    assert PooledProjector(16, 64).proj.weight.abs().max().item() == pytest.approx(0.25, rel=0.01)


def test_a_subclass_of_a_pool_is_called_by_its_own_name() -> None:
    class Mine(AvgPool):
        pass

    with pytest.raises(VlmError, match="'Mine' takes factor or grid, got neither"):
        Mine()


@pytest.mark.parametrize(
    ("recipe", "grid"),
    [
        ("pixel_shuffle:on_odd=pad,transposed=true+mlp", (3, 2)),
        ("avg_pool:factor=2,on_odd=crop+mlp", (2, 2)),
        ("max_pool:grid=3x2+mlp", (3, 2)),
        ("resize:factor=2,mode=area+linear", (2, 3)),
        ("conv:kernel=2,padding=0", (2, 2)),
        ("position:grid=2x2+patch_merger:on_odd=pad", (2, 3)),
        ("position+pooled_projector:grid=2x2", (2, 2)),
    ],
)
def test_recipes_say_every_spatial_option(recipe: str, grid: Grid) -> None:
    spec = TokenSpec(20, 6, (4, 5), 1)
    chain = build_connector(recipe, spec, 7)
    assert chain.out_spec(spec) == TokenSpec(math.prod(grid), 7, grid)
    check_connector(chain, spec)


@pytest.mark.skipif(which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("pool", [AvgPool(4, on_odd="pad"), MaxPool(4, on_odd="pad"), AvgPool(4, on_odd="resize")])
def test_a_compiled_pooling_has_the_gradient_of_the_plain_one_at_the_edge(pool: AvgPool | MaxPool) -> None:
    tokens = draw(1, 24, 3)
    gradients = []
    for call in (pool, torch.compile(pool, fullgraph=True)):
        asked = tokens.clone().requires_grad_()
        call(VisualTokens(asked, (4, 6))).tokens.square().sum().backward()
        gradients.append(asked.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
