"""Connectors without a class in transformers, against timm, torchvision and slow plain versions."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from connectors import Connector, PackedTokens, TokenSpec, VisualTokens, build_connector, recipe_of
from connectors.c_abstractor import CAbstractor
from connectors.errors import TokenShapeError, UnknownNameError, VlmError
from connectors.ldp import LDP, LDPv2, _multiple_of_8
from connectors.region_attention import RegionAttention
from connectors.sva import SpatialVisionAggregator
from connectors.testing import check_connector
from connectors.token_packer import TokenPacker

SQUARE = TokenSpec(16, 8, (4, 4))
OBLONG = TokenSpec(24, 8, (4, 6))
ODD = TokenSpec(15, 8, (3, 5))
WITH_CLS = TokenSpec(12, 8, (6, 2), num_prefix=1)
RECIPES = [
    "c_abstractor:grid=2x3,hidden=12,depth=2",
    "c_abstractor:grid=3x2,hidden=8,depth=1,mlp_depth=3,eos=2",
    "c_abstractor:grid=5x4,depth=0,mlp_depth=1",
    "ldp",
    "ldp_v2:grid=2x3",
    "token_packer:hidden=12,heads=3,on_odd=pad",
    "token_packer:factor=3,levels=2,hidden=12,heads=2,on_odd=resize",
    "sva:hidden=16,heads=4,depth=2",
    "sva:widths=4/1,folds=1/2,hidden=16,heads=2,depth=2,groups=2",
]


def randomise(module: nn.Module, scale: float = 0.3) -> None:
    """Draw every parameter, norms and biases too, so that none hides behind 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("spec", [SQUARE, OBLONG, ODD, WITH_CLS], ids=str)
def test_the_contract_of_connectors_holds(recipe: str, spec: TokenSpec) -> None:
    check_connector(build_connector(recipe, spec, 10), spec)


@pytest.mark.parametrize("recipe", RECIPES)
def test_packed_images_of_many_grids_equal_one_at_a_time(recipe: str) -> None:
    chain = build_connector(recipe, SQUARE, 10)
    randomise(chain)
    images = [VisualTokens(draw(1, rows * columns, 8), (rows, columns)) for rows, columns in ((4, 4), (1, 7), (6, 3))]
    images = [images[0], images[1], images[0], images[2], images[1]]
    packed = chain.forward_packed(PackedTokens.join(images))
    for part, image in zip(packed.split(), images, strict=True):
        alone = chain(image)
        assert part.grid == alone.grid
        close(part.tokens, alone.tokens)


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_compiles_to_one_graph_and_is_exported(recipe: str) -> None:
    chain = build_connector(recipe, OBLONG, 10).eval()
    visual = VisualTokens(draw(2, 24, 8), (4, 6))
    expected = chain(visual)
    torch.compiler.reset()
    compiled = torch.compile(chain, fullgraph=True, backend="eager")(visual)
    exported = torch.export.export(chain, (visual,)).module()(visual)
    for out in (compiled, exported):
        assert out.grid == expected.grid
        close(out.tokens, expected.tokens)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_written_as_it_was_read(recipe: str) -> None:
    assert recipe_of(build_connector(recipe, SQUARE, 10), 10) == recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_tells_its_source_its_users_and_when_to_choose_it(recipe: str) -> None:
    connector = build_connector(recipe, SQUARE, 10).connectors[0]
    assert "https://arxiv.org/abs/" in connector.source
    assert connector.used_by
    assert connector.choose[0].islower()


# C-Abstractor


def layer_norm(token: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return (token - token.mean()) / torch.sqrt(((token - token.mean()) ** 2).mean() + eps) * weight + bias


def norm_map(feature_map: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    out = torch.empty_like(feature_map)
    for row in range(feature_map.shape[1]):
        for column in range(feature_map.shape[2]):
            token = feature_map[:, row, column]
            out[:, row, column] = layer_norm(token, state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)
    return out


def pointwise(feature_map: Tensor, weight: Tensor) -> Tensor:
    out = torch.zeros(len(weight), *feature_map.shape[1:])
    for channel in range(len(weight)):
        for before in range(len(feature_map)):
            out[channel] += weight[channel, before, 0, 0] * feature_map[before]
    return out


def depthwise(feature_map: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    dim, rows, columns = feature_map.shape
    out = torch.zeros(dim, math.ceil(rows / stride), math.ceil(columns / stride))
    for row in range(out.shape[1]):
        for column in range(out.shape[2]):
            for down in range(3):
                for right in range(3):
                    y, x = row * stride + down - 1, column * stride + right - 1
                    if 0 <= y < rows and 0 <= x < columns:
                        out[:, row, column] += weight[:, 0, down, right] * feature_map[:, y, x]
    return out


def squeeze(feature_map: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean = feature_map.flatten(1).mean(1)
    return state[f"{name}.fc1.weight"][:, :, 0, 0] @ mean + state[f"{name}.fc1.bias"]


def excite(inner: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return state[f"{name}.fc2.weight"][:, :, 0, 0] @ inner + state[f"{name}.fc2.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def slow_reg_block(feature_map: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    inner = silu(norm_map(pointwise(feature_map, state[f"{name}.conv1.weight"]), state, f"{name}.norm1"))
    inner = silu(norm_map(depthwise(inner, state[f"{name}.conv2.weight"]), state, f"{name}.norm2"))
    gate = excite(silu(squeeze(inner, state, f"{name}.se")), state, f"{name}.se")
    inner = inner * (1 / (1 + torch.exp(-gate)))[:, None, None]
    inner = norm_map(pointwise(inner, state[f"{name}.conv3.weight"]), state, f"{name}.norm3")
    if f"{name}.shortcut.conv.weight" in state:
        narrowed = pointwise(feature_map, state[f"{name}.shortcut.conv.weight"])
        feature_map = norm_map(narrowed, state, f"{name}.shortcut.norm")
    return silu(inner + feature_map)


def slow_pool(feature_map: Tensor, grid: tuple[int, int]) -> Tensor:
    dim, rows, columns = feature_map.shape
    out = torch.empty(dim, *grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            top, bottom = row * rows // grid[0], -(-(row + 1) * rows // grid[0])
            left, right = column * columns // grid[1], -(-(column + 1) * columns // grid[1])
            out[:, row, column] = feature_map[:, top:bottom, left:right].mean((1, 2))
    return out


@pytest.mark.parametrize(("grid", "out"), [((4, 4), (2, 2)), ((3, 5), (2, 3)), ((2, 3), (3, 2))])
@pytest.mark.parametrize("hidden", [8, 12])
@torch.no_grad()
def test_c_abstractor_is_its_equations(grid: tuple[int, int], out: tuple[int, int], hidden: int) -> None:
    ours = CAbstractor(8, 6, out, hidden, depth=2, eos=1)
    randomise(ours)
    state = ours.state_dict()
    tokens = draw(2, math.prod(grid), 8)
    found = ours(VisualTokens(tokens, grid)).tokens
    for view in range(2):
        feature_map = tokens[view].T.reshape(8, *grid)
        for index in range(2):
            feature_map = slow_reg_block(feature_map, state, f"before.{index}")
        feature_map = slow_pool(feature_map, out)
        for index in range(2):
            feature_map = slow_reg_block(feature_map, state, f"after.{index}")
        for place in range(math.prod(out)):
            token = feature_map[:, place // out[1], place % out[1]]
            inner = silu(state["mlp.0.weight"] @ token + state["mlp.0.bias"])
            close(found[view, place], state["mlp.2.weight"] @ inner + state["mlp.2.bias"])
        assert torch.equal(found[view, -1], state["eos"][0])


class Honeybees(nn.Module):
    """The C-Abstractor put together from timm's stages, as Honeybee's code does."""

    def __init__(self, in_dim: int, hidden: int, out_dim: int, grid: tuple[int, int], depth: int) -> None:
        from timm.layers import LayerNorm2d
        from timm.models.regnet import RegStage

        super().__init__()
        stage = partial(RegStage, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
        self.net = nn.Sequential(stage(depth, in_dim, hidden), nn.AdaptiveAvgPool2d(grid), stage(depth, hidden, hidden))
        self.readout = nn.Sequential(nn.Linear(hidden, out_dim), nn.SiLU(), nn.Linear(out_dim, out_dim))

    def forward(self, feature_map: Tensor) -> Tensor:
        out: Tensor = self.readout(self.net(feature_map).flatten(2).transpose(1, 2))
        return out

    def as_ours(self) -> dict[str, Tensor]:
        found = {}
        for key, value in self.state_dict().items():
            name = key.replace("readout.", "mlp.").replace("net.0.b", "before.").replace("net.2.b", "after.")
            stage, _, rest = name.partition(".")
            if stage != "mlp":
                index, _, rest = rest.partition(".")
                rest = rest.replace("downsample.conv", "shortcut.conv").replace("downsample.bn", "shortcut.norm")
                for number in "123":
                    rest = rest.replace(f"conv{number}.conv", f"conv{number}")
                    rest = rest.replace(f"conv{number}.bn", f"norm{number}")
                name = f"{stage}.{int(index) - 1}.{rest}"
            found[name] = value
        return found


@pytest.mark.parametrize(("grid", "out"), [((6, 6), (3, 3)), ((4, 6), (3, 3)), ((5, 3), (2, 2)), ((2, 2), (3, 3))])
@pytest.mark.parametrize(("in_dim", "hidden"), [(8, 8), (10, 16), (16, 6)])
@torch.no_grad()
def test_c_abstractor_is_timms_stages(grid: tuple[int, int], out: tuple[int, int], in_dim: int, hidden: int) -> None:
    theirs = Honeybees(in_dim, hidden, 12, out, depth=3).eval()
    randomise(theirs)
    ours = CAbstractor(in_dim, 12, out, hidden)
    ours.load_state_dict(theirs.as_ours())
    visual = VisualTokens(draw(2, math.prod(grid), in_dim), grid)
    close(ours(visual).tokens, theirs(visual.as_map()))


def test_c_abstractor_has_the_published_size_by_default() -> None:
    with torch.device("meta"):
        theirs = Honeybees(1024, 1024, 4096, (12, 12), depth=3)
        ours = build_connector("c_abstractor", TokenSpec(576, 1024, (24, 24)), 4096)
    shapes = {name: value.shape for name, value in ours.connectors[0].state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.as_ours().items()}
    assert ours.out_spec(TokenSpec(576, 1024, (24, 24), 1)) == TokenSpec(144, 4096, (12, 12))


def test_c_abstractor_starts_as_honeybee() -> None:
    ours = CAbstractor(64, 64, hidden=64, depth=1, eos=40)
    for name, parameter in ours.named_parameters():
        if "norm" in name or "bias" in name:
            assert set(parameter.flatten().tolist()) == {float("norm" in name and "weight" in name)}
        elif parameter.numel() > 500:
            assert 0.018 < parameter.std() < 0.022, name


# LDP


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 2)])
@torch.no_grad()
def test_ldp_is_its_equations(grid: tuple[int, int]) -> None:
    ours = LDP(6, 4)
    randomise(ours)
    state = ours.state_dict()
    tokens = draw(2, math.prod(grid), 6)
    found = ours(VisualTokens(tokens, grid))
    assert found.grid == (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
    for view in range(2):
        feature_map = slow_mlp(tokens[view], state).T.reshape(4, *grid)
        for index, stride in enumerate((1, 2)):
            name = f"blocks.{index}"
            inner = norm_map(depthwise(feature_map, state[f"{name}.depthwise.weight"], stride), state, f"{name}.norm1")
            inner = inner * (inner + 3).clamp(0, 6) / 6
            gate = excite(squeeze(inner, state, f"{name}.se").clamp(min=0), state, f"{name}.se")
            inner = inner * ((gate + 3).clamp(0, 6) / 6)[:, None, None]
            inner = norm_map(pointwise(inner, state[f"{name}.pointwise.weight"]), state, f"{name}.norm2")
            feature_map = feature_map + inner if stride == 1 else inner
        close(found.as_map()[view], feature_map)


def slow_mlp(tokens: Tensor, state: dict[str, Tensor]) -> Tensor:
    inner = tokens @ state["mlp.0.weight"].T + state["mlp.0.bias"]
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    return inner @ state["mlp.2.weight"].T + state["mlp.2.bias"]


@pytest.mark.parametrize("grid", [(4, 4), (4, 6), (5, 3)])
@pytest.mark.parametrize("dim", [16, 48])
@torch.no_grad()
def test_ldp_blocks_are_torchvisions(grid: tuple[int, int], dim: int) -> None:
    from timm.layers.norm_act import LayerNormAct2d
    from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig

    configs = [InvertedResidualConfig(dim, 3, dim, dim, True, "HS", stride, 1, 1) for stride in (1, 2)]
    theirs = nn.Sequential(*(InvertedResidual(each, partial(LayerNormAct2d, act_layer=None)) for each in configs))
    randomise(theirs)
    ours = LDP(dim, dim)
    parts = {
        "0.0": "depthwise",
        "0.1": "norm1",
        "1.fc1": "se.fc1",
        "1.fc2": "se.fc2",
        "2.0": "pointwise",
        "2.1": "norm2",
    }
    state = {}
    for key, value in theirs.state_dict().items():
        index, _, first, second, kind = key.split(".")
        state[f"{index}.{parts[f'{first}.{second}']}.{kind}"] = value
    ours.blocks.load_state_dict(state)
    feature_map = draw(2, dim, *grid)
    close(ours.blocks(feature_map), theirs(feature_map.clone()))


def test_squeezed_widths_are_torchvisions() -> None:
    from torchvision.models._utils import _make_divisible

    assert all(_multiple_of_8(width) == _make_divisible(width, 8) for width in range(1, 3000))


@pytest.mark.parametrize(("grid", "out"), [((4, 4), (2, 2)), ((3, 5), (2, 3)), ((2, 2), (3, 3))])
@torch.no_grad()
def test_ldp_v2_is_its_equations(grid: tuple[int, int], out: tuple[int, int]) -> None:
    ours = LDPv2(6, 4, out)
    randomise(ours)
    state = ours.state_dict()
    tokens = draw(2, math.prod(grid), 6)
    found = ours(VisualTokens(tokens, grid))
    for view in range(2):
        pooled = slow_pool(slow_mlp(tokens[view], state).T.reshape(4, *grid), out)
        local = depthwise(pooled, state["peg.weight"]) + state["peg.bias"][:, None, None]
        close(found.as_map()[view], local + pooled)


def test_both_ldps_give_144_tokens_of_24_by_24() -> None:
    spec = TokenSpec(576, 1024, (24, 24), 1)
    with torch.device("meta"):
        assert {build_connector(name, spec, 2048).out_spec(spec) for name in ("ldp", "ldp_v2")} == {
            TokenSpec(144, 2048, (12, 12))
        }


# TokenPacker


@pytest.mark.parametrize(("grid", "factor"), [((4, 4), 2), ((4, 6), 2), ((6, 3), 3), ((4, 8), 4), ((2, 3), 1)])
@torch.no_grad()
def test_token_packer_is_its_equations(grid: tuple[int, int], factor: int) -> None:
    ours = TokenPacker(10, 6, factor, levels=2, hidden=8, heads=2)
    randomise(ours)
    state = ours.state_dict()
    tokens = draw(2, math.prod(grid), 10)
    found = ours(VisualTokens(tokens, grid))
    rows, columns = grid[0] // factor, grid[1] // factor
    assert found.grid == (rows, columns)
    fine = tokens.reshape(2, *grid, 10)
    coarse = F.interpolate(fine[..., 5:].permute(0, 3, 1, 2), size=(rows, columns), mode="bilinear")
    for view in range(2):
        for row in range(rows):
            for column in range(columns):
                query = layer_norm(
                    state["q_proj.weight"] @ coarse[view, :, row, column], *norm_of(state, "q_norm"), 1e-6
                )
                region = [
                    fine[view, row * factor + down, column * factor + right]
                    for down in range(factor)
                    for right in range(factor)
                ]
                keys, values = (
                    [
                        layer_norm(two_maps(token, state, f"{way}_proj"), *norm_of(state, f"{way}_norm"), 1e-6)
                        for token in region
                    ]
                    for way in "kv"
                )
                read = slow_attention(query, keys, values, state, "attention", heads=2)
                read = two_maps(read, state, "mlp")
                close(found.as_map()[view, :, row, column], read)


def norm_of(state: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return state[f"{name}.weight"], state[f"{name}.bias"]


def two_maps(token: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    first, second = (f"{name}.{index}" for index in (0, 2))
    inner = state[f"{first}.weight"] @ token + state.get(f"{first}.bias", torch.zeros(()))
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    return state[f"{second}.weight"] @ inner + state.get(f"{second}.bias", torch.zeros(()))


def slow_attention(
    query: Tensor, keys: list[Tensor], values: list[Tensor], state: dict[str, Tensor], name: str, heads: int
) -> Tensor:
    def project(token: Tensor, way: str) -> Tensor:
        return state[f"{name}.{way}_proj.weight"] @ token + state[f"{name}.{way}_proj.bias"]

    asks = project(query, "q")
    read = heads_apart(asks, [project(key, "k") for key in keys], [project(value, "v") for value in values], heads)
    return project(read, "out")


def heads_apart(query: Tensor, keys: list[Tensor], values: list[Tensor], heads: int) -> Tensor:
    size, found = len(query) // heads, []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = torch.tensor([float(query[part] @ key[part]) / math.sqrt(size) for key in keys])
        weights = torch.exp(scores - scores.max())
        weights = weights / weights.sum()
        found.append(
            sum((weight * value[part] for weight, value in zip(weights, values, strict=True)), torch.zeros(size))
        )
    return torch.cat(found)


@torch.no_grad()
def test_region_attention_is_torchs_multihead_attention() -> None:
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    randomise(theirs)
    ours = RegionAttention(12, 3)
    state = dict(zip(("q", "k", "v"), theirs.in_proj_weight.chunk(3), strict=True))
    biases = dict(zip(("q", "k", "v"), theirs.in_proj_bias.chunk(3), strict=True))
    ours.load_state_dict(
        {f"{way}_proj.weight": weight for way, weight in state.items()}
        | {f"{way}_proj.bias": bias for way, bias in biases.items()}
        | {f"out_proj.{key}": value for key, value in theirs.out_proj.state_dict().items()}
    )
    query, keys, values = draw(5, 12), draw(5, 4, 12), draw(5, 4, 12).flip(0)
    close(ours(query, keys, values), theirs(query[:, None], keys, values)[0][:, 0])


@pytest.mark.parametrize(("on_odd", "out"), [("crop", (1, 2)), ("resize", (2, 3))])
def test_token_packer_takes_grids_that_do_not_divide(on_odd: str, out: tuple[int, int]) -> None:
    ours = TokenPacker(8, 6, 2, hidden=8, on_odd=on_odd)
    assert ours.out_spec(ODD).grid == ours(VisualTokens(draw(1, 15, 8), (3, 5))).grid == out
    whole = TokenPacker(8, 6, 2, hidden=8)
    picture = VisualTokens(draw(1, 15, 8), (3, 5)).as_map()
    fitted = {
        "crop": picture[:, :, :2, :4],
        "resize": F.interpolate(picture, size=(4, 6), mode="bilinear"),
    }[on_odd]
    close(ours(VisualTokens.from_map(picture)).tokens, whole(VisualTokens.from_map(fitted)).tokens)


@pytest.mark.parametrize(("grid", "factor"), [((3, 5), 2), ((4, 4), 3), ((5, 7), 4), ((1, 1), 3)])
@torch.no_grad()
def test_a_block_that_is_padded_counts_its_real_tokens_alone(grid: tuple[int, int], factor: int) -> None:
    ours = TokenPacker(10, 6, factor, levels=2, hidden=8, heads=2, on_odd="pad")
    randomise(ours)
    state = ours.state_dict()
    visual = VisualTokens(draw(1, math.prod(grid), 10), grid)
    found, packed = ours(visual), ours.forward_packed(PackedTokens.join([visual, visual])).split()
    middle = {factor // 2} if factor % 2 else {factor // 2 - 1, factor // 2}
    for row in range(found.grid[0]):
        for column in range(found.grid[1]):
            places = {
                (down, right): visual.as_map()[0, :, row * factor + down, column * factor + right]
                for down in range(factor)
                for right in range(factor)
                if row * factor + down < grid[0] and column * factor + right < grid[1]
            }
            asked = [token[5:] for place, token in places.items() if set(place) <= middle]
            asked = asked or [token[5:] for token in places.values()]
            query = layer_norm(state["q_proj.weight"] @ (sum(asked) / len(asked)), *norm_of(state, "q_norm"), 1e-6)
            keys, values = (
                [
                    layer_norm(two_maps(token, state, f"{way}_proj"), *norm_of(state, f"{way}_norm"), 1e-6)
                    for token in places.values()
                ]
                for way in "kv"
            )
            read = two_maps(slow_attention(query, keys, values, state, "attention", heads=2), state, "mlp")
            for each in (found, *packed):
                close(each.as_map()[0, :, row, column], read)


def test_token_packer_has_the_published_shapes_and_start() -> None:
    with torch.device("meta"):
        ours = TokenPacker(4096, 4096, levels=4)
    assert ours.attention.heads == 8
    assert {name: tuple(ours.state_dict()[f"{name}.weight"].shape) for name in ("q_proj", "k_proj.0", "v_proj.2")} == {
        "q_proj": (1024, 1024),
        "k_proj.0": (1024, 4096),
        "v_proj.2": (1024, 1024),
    }
    assert ours.out_spec(TokenSpec(576, 4096, (24, 24))) == TokenSpec(144, 4096, (12, 12))
    assert {norm.eps for norm in (ours.q_norm, ours.k_norm, ours.v_norm)} == {1e-6}
    drawn = TokenPacker(64, 64, hidden=64)
    theirs = nn.MultiheadAttention(64, 1)
    nn.init.xavier_uniform_(theirs.in_proj_weight, generator=torch.Generator().manual_seed(0))
    bound = theirs.in_proj_weight.abs().max().item()
    assert drawn.attention.q_proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    for name in ("q_proj", "v_proj.0", "mlp.2", "attention.out_proj"):
        assert 0.018 < drawn.state_dict()[f"{name}.weight"].std() < 0.022


# Spatial Vision Aggregator


@pytest.mark.parametrize("grid", [(2, 2), (2, 3)])
@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_sva_is_its_equations(grid: tuple[int, int], groups: int) -> None:
    widths, folds = (5, 3, 4), (2, 1, 3)
    in_dim = sum(width * fold**2 for width, fold in zip(widths, folds, strict=True))
    ours = SpatialVisionAggregator(in_dim, 6, widths, folds, hidden=8, heads=2, depth=2, groups=groups)
    randomise(ours)
    state = ours.state_dict()
    # Pictures of each tower at its own grid; what comes in is their windows.
    pictures = [draw(2, grid[0] * fold, grid[1] * fold, width) for width, fold in zip(widths, folds, strict=True)]
    joined = torch.empty(2, *grid, in_dim)
    for row in range(grid[0]):
        for column in range(grid[1]):
            folded = [
                picture[:, row * fold : (row + 1) * fold, column * fold : (column + 1) * fold].flatten(1)
                for picture, fold in zip(pictures, folds, strict=True)
            ]
            joined[:, row, column] = torch.cat(folded, dim=1)
    found = ours(VisualTokens(joined.flatten(1, 2), grid))
    for view in range(2):
        towers = [
            torch.stack([torch.stack([slow_tower(token, state, tower) for token in row]) for row in picture[view]])
            for tower, picture in enumerate(pictures)
        ]
        context = towers[0].flatten(0, 1).mean(0)
        for row in range(grid[0]):
            for column in range(grid[1]):
                windows = [
                    [
                        projected[row * fold + down, column * fold + right]
                        for down in range(fold)
                        for right in range(fold)
                    ]
                    for projected, fold in zip(towers, folds, strict=True)
                ]
                groups_found = []
                for group in range(groups):
                    query = state["queries"][group]
                    for layer in range(2):
                        query = slow_sva_layer(query, context, windows, state, f"groups.{group}.{layer}")
                    groups_found.append(query)
                close(found.as_map()[view, :, row, column], two_maps(torch.cat(groups_found), state, "mlp"))


def slow_tower(token: Tensor, state: dict[str, Tensor], tower: int) -> Tensor:
    return layer_norm(two_maps(token, state, f"towers.{tower}"), *norm_of(state, f"towers.{tower}.3"), 1e-5)


def slow_sva_layer(
    query: Tensor, context: Tensor, windows: list[list[Tensor]], state: dict[str, Tensor], name: str
) -> Tensor:
    asks = state[f"{name}.in_proj.weight"] @ torch.cat([query, state[f"{name}.context_proj.weight"] @ context])
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for tower, window in enumerate(windows):
        for place, token in enumerate(window):
            placed = token + state[f"{name}.positions.{tower}"][place] if len(window) > 1 else token
            for way, found in (("k", keys), ("v", values)):
                normed = layer_norm(placed, *norm_of(state, f"{name}.{way}_norms.{tower}"), 1e-5)
                found.append(state[f"{name}.{way}_projs.{tower}.weight"] @ normed)
    normed = layer_norm(asks, *norm_of(state, f"{name}.q_norm"), 1e-5)
    read = heads_apart(state[f"{name}.q_proj.weight"] @ normed, keys, values, heads=2)
    asks = layer_norm(asks + state[f"{name}.out_proj.weight"] @ read, *norm_of(state, f"{name}.norm"), 1e-5)
    return query + two_maps(asks, state, f"{name}.ffn")


def test_sva_has_cambrians_sizes_and_start() -> None:
    spec = TokenSpec(576, 1152 + 1024 + 1536 + 16 * 3072, (24, 24))
    with torch.device("meta"):
        ours = build_connector("sva:widths=1152/1024/1536/3072,folds=1/1/1/4", spec, 4096)
    assert ours.out_spec(spec) == TokenSpec(576, 4096, (24, 24))
    shapes = {name.removeprefix("links.0."): tuple(value.shape) for name, value in ours.state_dict().items()}
    assert [name for name in shapes if "positions" in name] == [f"groups.0.{layer}.positions.3" for layer in range(3)]
    assert shapes["groups.0.0.positions.3"] == (16, 1024)
    assert shapes["groups.0.0.in_proj.weight"] == (1024, 2048)
    small = SpatialVisionAggregator(36, 400, (4,), (3,), hidden=64, groups=9, depth=1)
    assert 0.9 < torch.stack([layers[0].positions["0"] for layers in small.groups]).std() < 1.1  # type: ignore[index]
    assert 0.045 < small.queries.std() < 0.055


def test_one_tower_needs_no_widths() -> None:
    assert SpatialVisionAggregator(12, 6, hidden=16).widths == (12,)
    assert SpatialVisionAggregator(12, 6, folds=(2,), hidden=16).widths == (3,)


# Messages


@pytest.mark.parametrize(
    ("recipe", "error", "sentence"),
    [
        ("c_abstractor:depth=-1", VlmError, "'c_abstractor' has depth=-1; give a whole number, 0 or more"),
        ("c_abstractor:eos=-2", VlmError, "'c_abstractor' has eos=-2; give a whole number, 0 or more"),
        ("c_abstractor:hidden=0", VlmError, "'c_abstractor' has hidden=0; give a whole number of at least 1"),
        ("c_abstractor:grid=0x3", VlmError, "'c_abstractor' has rows=0; give a whole number of at least 1"),
        ("ldp:dim=0", VlmError, "'ldp' has dim=0; give a whole number of at least 1"),
        ("ldp_v2:grid=3x0", VlmError, "'ldp_v2' has columns=0; give a whole number of at least 1"),
        ("token_packer:factor=0", VlmError, "'token_packer' has factor=0; give a whole number of at least 1"),
        ("token_packer:levels=3", TokenShapeError, "has levels=3, which do not divide the width 8; give the number of"),
        (
            "token_packer:heads=5,hidden=12",
            VlmError,
            "heads=5, which do not divide hidden=12; use a divisor of 12, for example 4",
        ),
        ("token_packer:on_odd=padd", UnknownNameError, "'token_packer' has on_odd=padd; did you mean pad"),
        (
            "token_packer:factor=3,hidden=8",
            TokenShapeError,
            "4x4 grid does not divide into 3x3 blocks; on_odd=pad gives",
        ),
        ("sva:heads=0", VlmError, "'sva' has heads=0; give a whole number of at least 1"),
        ("sva:heads=5,hidden=16", VlmError, "'sva' has heads=5, which do not divide hidden=16; use a divisor"),
        ("sva:widths=4/4,folds=1/1/2", VlmError, "'sva' has 2 widths and 3 folds; give one of each for each tower"),
        ("sva:widths=4/0", VlmError, "'sva' has widths=0; give a whole number of at least 1"),
        (
            "sva:widths=4/2,folds=1/2",
            TokenShapeError,
            "which make tokens of width 12, and width 8 comes in; give the width",
        ),
        (
            "sva:folds=3",
            TokenShapeError,
            "'sva' has folds=3, and a window of 9 tokens does not divide width 8; give the",
        ),
        ("sva:folds=0", VlmError, "'sva' has folds=0; give a whole number of at least 1"),
        ("sva:folds=1/2", VlmError, "'sva' has 0 widths and 2 folds; give one of each for each tower"),
        (
            "sva:heads=1000000000000",
            VlmError,
            "which do not divide hidden=1024; use a divisor of 1024, for example 1024",
        ),
    ],
)
def test_wrong_options_are_refused(recipe: str, error: type[VlmError], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        build_connector(recipe, SQUARE, 10)


@pytest.mark.parametrize("make", [CAbstractor, LDPv2])
def test_a_grid_has_two_sides(make: type[Connector]) -> None:
    with pytest.raises(VlmError, match="grid=12; give rows and columns, for example grid=8x8"):
        make(8, 6, 12)
    assert make(8, 6, [2, 3]).options()["grid"] == (2, 3)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if not recipe.startswith("sva")])
def test_queries_have_no_place_to_mix(recipe: str) -> None:
    with pytest.raises(TokenShapeError, match="query tokens have no grid"):
        build_connector(recipe, SQUARE, 10).out_spec(TokenSpec(16, 8))


@pytest.mark.parametrize("recipe", ["token_packer:hidden=8", "sva:hidden=16,depth=1"])
def test_packs_without_an_image_are_refused(recipe: str) -> None:
    with pytest.raises(TokenShapeError, match="no image among the packed tokens; leave empty packs out"):
        build_connector(recipe, SQUARE, 10).forward_packed(PackedTokens(torch.zeros(0, 8), []))
    with pytest.raises(TokenShapeError, match="was built for tokens of width 8, got width 7"):
        build_connector(recipe, SQUARE, 10).forward_packed(PackedTokens(torch.zeros(4, 7), [(2, 2)]))
