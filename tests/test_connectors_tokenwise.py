"""Connectors that map each token alone, and those that merge tokens or leave some out."""

import math
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from connectors import (
    MLP,
    Chain,
    Connector,
    GatedMLP,
    Grid,
    KeepPrefix,
    Linear,
    Matryoshka,
    Norm,
    Numbers,
    PackedTokens,
    Residual,
    TokenMerging,
    TokenShapeError,
    TokenSpec,
    UnknownNameError,
    VisualTokens,
    VlmError,
    build_connector,
    recipe_of,
)
from connectors.activations import ACTIVATIONS, QuickGELU, gated
from connectors.init import Draw
from connectors.matryoshka import choose_level
from connectors.testing import check_connector

SQUARE = TokenSpec(16, 8, (4, 4))
OBLONG = TokenSpec(24, 8, (4, 6))
TALL_WITH_CLS = TokenSpec(12, 8, (6, 2), num_prefix=1)
WITH_REGISTERS = TokenSpec(16, 8, (2, 8), num_prefix=5)
QUERIES = TokenSpec(8, 8)
SPECS = [SQUARE, OBLONG, TALL_WITH_CLS, WITH_REGISTERS, QUERIES]
GRIDS = [(4, 4), (2, 6), (6, 4)]


def randomise(module: nn.Module) -> None:
    """Draw every parameter, norms and biases too, so that none hides behind 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rename(state: dict[str, Tensor], keys: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in keys.items():
            new = re.sub(pattern, replacement, new)
        renamed[new] = tensor
    return renamed


def config(**options: object) -> SimpleNamespace:
    """A configuration as transformers' projectors read it, for tokens of 6 and an LLM of 10."""
    return SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=6),
        text_config=SimpleNamespace(hidden_size=10),
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        vision_feature_layer=-2,
        **options,
    )


MLP_KEYS = {"^linear_1": "layers.0", "^linear_2": "layers.2", "^(projector_layernorm|layer_norm)": "norm"}


@pytest.mark.parametrize("grid", [(3, 4), (5, 2)])
@pytest.mark.parametrize(
    ("activation", "theirs"),
    [
        ("gelu", "gelu"),
        ("gelu_tanh", "gelu_pytorch_tanh"),
        ("quick_gelu", "quick_gelu"),
        ("silu", "silu"),
        ("relu", "relu"),
    ],
)
def test_mlp_is_llavas_projector(activation: str, theirs: str, grid: Grid) -> None:
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    told = config()
    told.projector_hidden_act = theirs
    reference = LlavaMultiModalProjector(told)
    randomise(reference)
    ours = MLP(6, 10, activation=activation)
    ours.load_state_dict(rename(reference.state_dict(), MLP_KEYS))
    tokens = draw(2, math.prod(grid), 6)
    assert torch.equal(ours(VisualTokens(tokens, grid)).tokens, reference(tokens))


@pytest.mark.parametrize("bias", [True, False])
def test_mlp_is_llava_nexts_projector(bias: bool) -> None:  # noqa: FBT001 - a parameter of the test
    from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

    told = config()
    told.multimodal_projector_bias = bias
    reference = LlavaNextMultiModalProjector(told)
    randomise(reference)
    ours = MLP(6, 10, bias=bias)
    ours.load_state_dict(rename(reference.state_dict(), MLP_KEYS))
    tokens = draw(2, 12, 6)
    assert torch.equal(ours(VisualTokens(tokens, (3, 4))).tokens, reference(tokens))


def test_mlp_with_a_norm_is_vip_llavas_projector() -> None:
    from transformers.models.vipllava.modeling_vipllava import VipLlavaMultiModalProjector

    told = config(projector_layernorm_eps=1e-5)
    told.vision_feature_layer = [-2, -5, 6]
    reference = VipLlavaMultiModalProjector(told)
    randomise(reference)
    ours = MLP(18, 10, norm="layer")
    ours.load_state_dict(rename(reference.state_dict(), MLP_KEYS))
    tokens = draw(2, 12, 18)
    assert torch.equal(ours(VisualTokens(tokens, (3, 4))).tokens, reference(tokens))


@pytest.mark.parametrize("grid", GRIDS)
def test_mlp_with_a_norm_behind_a_fold_is_internvls_projector(grid: Grid) -> None:
    from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

    reference = InternVLMultiModalProjector(config(downsample_ratio=0.5))
    randomise(reference)
    spec = TokenSpec(math.prod(grid), 6, grid)
    ours = build_connector("pixel_shuffle+mlp:norm=layer", spec, 10)
    ours.connectors[1].load_state_dict(rename(reference.state_dict(), MLP_KEYS))
    tokens = draw(2, spec.num_tokens, 6)
    folded = InternVLModel.pixel_shuffle(None, tokens.unflatten(1, grid), scale_factor=0.5)
    assert torch.equal(ours(VisualTokens(tokens, grid)).tokens, reference(folded.flatten(1, 2)))


def test_mlp_of_depth_three_is_prismatics_fused_projector() -> None:
    ours = MLP(6, 10, depth=3, hidden=24)
    randomise(ours)
    assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == {
        "layers.0.weight": (24, 6),
        "layers.0.bias": (24,),
        "layers.2.weight": (10, 24),
        "layers.2.bias": (10,),
        "layers.4.weight": (10, 10),
        "layers.4.bias": (10,),
    }
    token = draw(6).double()
    expected = token
    for index in (0, 2, 4):
        weight, bias = (ours.state_dict()[f"layers.{index}.{kind}"].double() for kind in ("weight", "bias"))
        expected = torch.stack([(weight[row] * expected).sum() + bias[row] for row in range(len(bias))])
        if index < 4:
            expected = 0.5 * expected * (1 + torch.erf(expected / math.sqrt(2)))
    out = ours(VisualTokens(token.float()[None, None], (1, 1))).tokens[0, 0]
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["layer", "rms", "gemma"])
def test_norms_are_those_of_the_libraries(kind: str, dtype: torch.dtype) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.idefics2.modeling_idefics2 import Idefics2RMSNorm

    reference = {"layer": nn.LayerNorm, "rms": Idefics2RMSNorm, "gemma": Gemma3RMSNorm}[kind](8, eps=1e-3)
    randomise(reference)
    ours = Norm(8, kind, eps=1e-3)
    ours.norm.load_state_dict(reference.state_dict())
    tokens, prefix = (draw(2, count, 8, seed=count).mul(300).to(dtype) for count in (12, 2))
    out = ours.to(dtype)(VisualTokens(tokens, (3, 4), prefix))
    reference.to(dtype)
    assert torch.equal(out.tokens, reference(tokens))
    assert torch.equal(out.prefix, reference(prefix))


def test_each_kind_of_norm_has_its_own_eps() -> None:
    assert [Norm(8, kind).norm.eps for kind in ("layer", "rms", "gemma")] == [1e-5, 1e-6, 1e-6]
    assert recipe_of(Norm(8, "rms", eps=1e-6), 10) == "norm:kind=rms"
    assert recipe_of(Norm(8, "rms", eps=1e-5), 10) == "norm:kind=rms,eps=1e-05"


def idefics2_connector() -> nn.Module:
    from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

    sizes = Idefics2PerceiverConfig(hidden_size=10, resampler_n_latents=3, resampler_depth=1)
    text = SimpleNamespace(hidden_size=10, intermediate_size=14, hidden_act="silu")
    made: nn.Module = Idefics2Connector(
        SimpleNamespace(vision_config=SimpleNamespace(hidden_size=6), text_config=text, perceiver_config=sizes)
    )
    return made


def test_gated_mlp_is_idefics2s_modality_projection() -> None:
    reference = idefics2_connector().modality_projection
    randomise(reference)
    ours = GatedMLP(6, 10, hidden=14)
    ours.load_state_dict(reference.state_dict())
    tokens = draw(2, 12, 6)
    assert torch.equal(ours(VisualTokens(tokens, (3, 4))).tokens, reference(tokens))


def split_gate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give transformers' `linear_1`, up and then gate, as two maps."""
    found = {}
    for kind in ("weight", "bias"):
        found[f"up_proj.{kind}"], found[f"gate_proj.{kind}"] = state[f"linear_1.{kind}"].chunk(2)
        found[f"down_proj.{kind}"] = state[f"linear_2.{kind}"]
    return found


@pytest.mark.parametrize(("side", "factor"), [(4, 2), (6, 3), (2, 1)])
def test_gated_mlp_behind_a_fold_is_aya_visions_projector(side: int, factor: int) -> None:
    from transformers.models.aya_vision.modeling_aya_vision import AyaVisionMultiModalProjector

    sizes = {"downsample_factor": factor, "alignment_intermediate_size": 12, "adapter_layer_norm_eps": 1e-6}
    reference = AyaVisionMultiModalProjector(config(**sizes))
    randomise(reference)
    spec = TokenSpec(side * side, 6, (side, side))
    recipe = f"pixel_shuffle:factor={factor}+norm:eps=1e-6+gated_mlp:hidden=6,bias=true"
    ours = build_connector(recipe, spec, 10)
    ours.connectors[1].norm.load_state_dict(reference.layernorm.state_dict())
    ours.connectors[2].load_state_dict(split_gate(reference.state_dict()))
    tokens = draw(2, side * side, 6)
    # Their fold takes the root of N for both sides, so that only square grids can be compared.
    expected = reference(tokens)
    out = ours(VisualTokens(tokens, (side, side)))
    assert out.grid == tuple(expected.shape[1:3])
    torch.testing.assert_close(out.tokens, expected.flatten(1, 2), rtol=1e-5, atol=1e-5)


def test_gated_mlp_behind_a_fold_is_cohere2_visions_projector() -> None:
    from transformers.models.cohere2_vision.modeling_cohere2_vision import Cohere2VisionMultiModalProjector

    reference = Cohere2VisionMultiModalProjector(config(downsample_factor=2, alignment_intermediate_size=12))
    randomise(reference)
    ours = build_connector("pixel_shuffle+gated_mlp:hidden=6,bias=true", TokenSpec(16, 6, (4, 4)), 10)
    ours.connectors[1].load_state_dict(split_gate(reference.state_dict()))
    tokens = draw(2, 16, 6)
    expected = reference(tokens).flatten(1, 2)
    torch.testing.assert_close(ours(VisualTokens(tokens, (4, 4))).tokens, expected, rtol=1e-5, atol=1e-5)


def test_gated_mlp_starts_as_published() -> None:
    maps = GatedMLP(100, 200, bias=True)
    for name, parameter in maps.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gate_changes_only_products_past_the_end_of_fp16(dtype: torch.dtype) -> None:
    gate, value = (draw(4, 500, seed=seed).mul(scale).to(dtype) for seed, scale in ((1, 300), (2, 200)))
    plain, out = gate * value, gated(gate, value)
    assert out.dtype == dtype
    assert plain.isinf().any() == (dtype is torch.float16)
    assert torch.equal(out, plain.clamp(-65504, 65504) if dtype is torch.float16 else plain)


def test_fp16_tokens_that_overflow_the_gate_and_the_map_behind_it_stay_finite() -> None:
    maps = GatedMLP(8, 10, hidden=16, activation="relu").half()
    with torch.no_grad():
        for parameter in maps.parameters():
            parameter.fill_(0.5)
    out = maps(VisualTokens(torch.full((1, 4, 8), 1000.0, dtype=torch.float16), (2, 2))).tokens
    assert torch.equal(out, torch.full_like(out, 65504))


def pooled_by_hand(tokens: Tensor, grid: Grid, level: int) -> Tensor:
    """Average each block, what is there of it, by loops over the places."""
    rows, columns = (math.ceil(side / level) for side in grid)
    found = []
    for row in range(rows):
        for column in range(columns):
            members = [
                tokens[:, r * grid[1] + c]
                for r in range(row * level, min(grid[0], (row + 1) * level))
                for c in range(column * level, min(grid[1], (column + 1) * level))
            ]
            found.append(torch.stack(members).mean(0))
    return torch.stack(found, dim=1)


@pytest.mark.parametrize(
    ("grid", "levels"), [((4, 4), (1, 2, 4)), ((4, 6), (2, 1)), ((6, 3), (3, 1)), ((24, 24), (8,))]
)
def test_a_level_averages_blocks_of_the_grid(grid: Grid, levels: tuple[int, ...]) -> None:
    spec = TokenSpec(math.prod(grid), 5, grid, num_prefix=2)
    link = Matryoshka(Numbers(levels))
    tokens, prefix = draw(2, spec.num_tokens, 5), draw(2, 2, 5)
    assert link.counts(spec) == {level: math.prod(grid) // level**2 for level in levels}
    for level in levels:
        link.choose_level(level)
        out = link(VisualTokens(tokens, grid, prefix))
        assert out.spec == link.out_spec(spec)
        assert out.grid == (grid[0] // level, grid[1] // level)
        assert torch.equal(out.prefix, prefix)
        torch.testing.assert_close(out.tokens, pooled_by_hand(tokens, grid, level), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", [(5, 3), (1, 6), (2, 2), (7, 4)])
def test_a_padded_level_averages_what_is_there_of_the_last_blocks(grid: Grid) -> None:
    tokens = draw(2, math.prod(grid), 3)
    link = Matryoshka(Numbers((4,)), on_odd="pad")
    expected = pooled_by_hand(tokens, grid, 4)
    tokens.requires_grad_()
    out = link(VisualTokens(tokens, grid)).tokens
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    out.sum().backward()
    assert tokens.grad is not None
    torch.testing.assert_close(tokens.grad.sum(1), torch.full((2, 3), float(out.shape[1])))


def test_a_level_keeps_the_first_queries() -> None:
    link = Matryoshka(Numbers((1, 2, 8)))
    tokens = draw(2, 16, 5)
    for level, count in link.counts(TokenSpec(16, 5)).items():
        link.choose_level(level)
        assert torch.equal(link(VisualTokens(tokens)).tokens, tokens[:, :count])
    assert link.counts(TokenSpec(16, 5)) == {1: 16, 2: 8, 8: 2}


@pytest.mark.parametrize(("on_odd", "counts"), [("pad", [10, 4, 1]), ("crop", [10, 3, 0]), ("resize", [10, 3, 1])])
def test_queries_that_a_level_does_not_divide_are_rounded(on_odd: str, counts: list[int]) -> None:
    for level, count in zip((1, 3, 16), counts, strict=True):
        link = Matryoshka(level, on_odd)
        if count:
            assert link.out_spec(TokenSpec(10, 5)) == TokenSpec(count, 5)
        else:
            with pytest.raises(TokenShapeError, match="level 16 does not divide 10 queries; on_odd=pad keeps 1, on_od"):
                link.out_spec(TokenSpec(10, 5))


@pytest.mark.parametrize("on_odd", ["pad", "crop", "resize"])
@pytest.mark.parametrize("level", [1, 2, 4])
def test_packed_levels_are_those_of_one_image_at_a_time(on_odd: str, level: int) -> None:
    link = Matryoshka(Numbers((1, 2, 4)), on_odd)
    link.choose_level(level)
    require_packed(link, [(4, 4), (5, 7), (4, 6), (9, 5), (5, 7)])
    queries = Matryoshka(Numbers((1, 2, 4)), on_odd)
    queries.choose_level(level)
    images = [VisualTokens(draw(1, count, 8, seed=count)) for count in (4, 7, 9)]
    parts = queries.forward_packed(PackedTokens.join(images)).split()
    for part, image in zip(parts, images, strict=True):
        assert torch.equal(part.tokens, queries(image).tokens)


def test_packed_queries_of_a_chain_are_not_taken_for_a_grid_of_one_row() -> None:
    recipe = "perceiver:queries=4,depth=1,heads=2,head_dim=4,kv_heads=1+matryoshka:levels=2/1+mlp"
    chain = build_connector(recipe, SQUARE, 10).eval()
    require_packed(chain, [(4, 4), (2, 3)])
    with pytest.raises(TokenShapeError, match="there is no image among the packed tokens; leave empty packs out"):
        chain.connectors[1].forward_packed(PackedTokens(draw(1, 8)[:0], []))


@pytest.mark.parametrize("recipe", ["avg_pool:factor=2,on_odd=pad", "conv", "position", "resize:factor=2"])
def test_packed_queries_are_refused_where_queries_alone_are(recipe: str) -> None:
    (link,) = build_connector(f"{recipe}+linear", SQUARE, 8).connectors[:1]
    queries = VisualTokens(draw(2, 4, 8))
    for call, given in ((link, queries), (link.forward_packed, PackedTokens.join([queries]))):
        with pytest.raises(TokenShapeError, match="query tokens have no grid; put spatial connectors before"):
            call(given)


def test_a_level_is_chosen_for_a_chain_and_lasts() -> None:
    chain = build_connector("mlp:dim=4+residual(norm)+matryoshka:levels=1/2+linear", SQUARE, 10)
    before = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
    written = recipe_of(chain, 10)
    assert chain.out_spec(SQUARE).num_tokens == 16
    choose_level(chain, 2)
    assert chain.out_spec(SQUARE).num_tokens == 4
    assert chain.train().eval()(VisualTokens(draw(1, 16, 8), (4, 4))).grid == (2, 2)
    assert recipe_of(chain, 10) == written == "mlp:dim=4+residual(norm)+matryoshka:levels=1/2+linear"
    assert all(torch.equal(before[name], tensor) for name, tensor in chain.state_dict().items())
    chain.load_state_dict(before)
    assert chain.out_spec(SQUARE).num_tokens == 4


def test_a_level_that_one_link_does_not_have_changes_none() -> None:
    chain = Chain(Matryoshka(Numbers((1, 2, 4))), Matryoshka(Numbers((1, 2))))
    with pytest.raises(VlmError, match=r"^'matryoshka' has no level 4; choose one of 1, 2, or build it with that lev"):
        choose_level(chain, 4)
    assert chain.out_spec(SQUARE) == SQUARE
    with pytest.raises(VlmError, match="there is no matryoshka link to set to level 2; add one to the recipe, for exa"):
        choose_level(MLP(8, 10), 2)
    with pytest.raises(VlmError, match="no level 3; choose one of 1, 2, 4, or"):
        Matryoshka().choose_level(3)


def merged_by_hand(tokens: Tensor, target: int) -> Tensor:
    """Merge one view token by token: ToMe section 3, with the tokens for its keys."""
    kept = [(place, token.double(), 1) for place, token in enumerate(tokens)]
    while len(kept) > target:
        merged = min(len(kept) - target, len(kept) // 2)
        edges = []
        for i in range(0, len(kept), 2):
            cosines = [
                (float(kept[i][1] @ kept[j][1] / kept[i][1].norm() / kept[j][1].norm()), -j)
                for j in range(1, len(kept), 2)
            ]
            cosine, other = max(cosines)
            edges.append((-cosine, i, -other))
        gone = sorted(edges)[:merged]
        after = []
        for j, (place, token, size) in enumerate(kept):
            if j in {i for _, i, _ in gone}:
                continue
            parts = [(token, size), *((kept[i][1], kept[i][2]) for _, i, other in gone if other == j)]
            total = sum(count for _, count in parts)
            after.append((place, sum(count * part for part, count in parts) / total, total))
        kept = after
    assert [place for place, _, _ in kept] == sorted(place for place, _, _ in kept)
    return torch.stack([token for _, token, _ in kept]).float()


@pytest.mark.parametrize(
    ("number", "target"), [(16, 15), (16, 8), (16, 5), (17, 16), (17, 3), (24, 1), (2, 1), (63, 7)]
)
def test_merging_is_that_of_the_plain_version(number: int, target: int) -> None:
    tokens = draw(3, number, 6)
    out = TokenMerging(target)(VisualTokens(tokens, (1, number), tokens[:, :2]))
    expected = torch.stack([merged_by_hand(view, target) for view in tokens])
    assert out.grid is None
    assert torch.equal(out.prefix, tokens[:, :2])
    torch.testing.assert_close(out.tokens, expected, rtol=1e-5, atol=1e-5)


def test_of_equal_similarities_the_first_counts_and_means_are_weighted() -> None:
    tokens = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, :, None]
    expected = {4: [1.0, 2.0, 3.0, 4.0], 3: [1.5, 3.0, 4.0], 2: [2.0, 4.0], 1: [2.5]}
    for target, values in expected.items():
        assert TokenMerging(target)(VisualTokens(tokens)).tokens.flatten().tolist() == values


def test_a_token_of_zeros_is_merged_without_nan() -> None:
    tokens = torch.zeros(1, 6, 3, requires_grad=True)
    out = TokenMerging(2)(VisualTokens(tokens, (2, 3))).tokens
    out.sum().backward()
    assert not out.any()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()


def test_merging_hands_each_token_its_share_of_the_gradient() -> None:
    tokens = draw(2, 15, 4).requires_grad_()
    TokenMerging(4)(VisualTokens(tokens, (3, 5))).tokens.sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad > 0).all()
    torch.testing.assert_close(tokens.grad.sum(1), torch.full((2, 4), 4.0))


@pytest.mark.parametrize("connector", [TokenMerging(5), Matryoshka(8, "pad"), Matryoshka(4)], ids=repr)
def test_large_fp16_tokens_are_merged_and_averaged_as_in_fp32(connector: Connector) -> None:
    tokens = draw(1, 128, 6).abs().add(1).mul(5000).half()
    visual, wide = VisualTokens(tokens, (8, 16)), VisualTokens(tokens.float(), (8, 16))
    expected = connector(wide).tokens.half()
    assert torch.equal(connector(visual).tokens, expected)
    assert torch.equal(connector.forward_packed(PackedTokens.join([visual])).tokens, expected[0])


def test_autocast_changes_neither_which_tokens_are_merged_nor_their_means() -> None:
    visual = VisualTokens(draw(2, 24, 6), (4, 6))
    link = TokenMerging(5)
    expected = link(visual).tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(link(visual).tokens, expected)
    with torch.device("meta"):
        assert link(VisualTokens(torch.empty(2, 24, 6), (4, 6))).tokens.shape == (2, 5, 6)


def test_keep_prefix_puts_the_prefix_in_front() -> None:
    tokens, prefix = draw(2, 12, 8), draw(2, 3, 8, seed=2)
    out = KeepPrefix()(VisualTokens(tokens, (3, 4), prefix))
    assert out.grid is None
    assert out.prefix is None
    assert torch.equal(out.tokens, torch.cat([prefix, tokens], dim=1))


def test_keep_prefix_refuses_packed_tokens_which_have_none() -> None:
    with pytest.raises(TokenShapeError, match="'keep_prefix' needs prefix tokens, but this encoder has none, or a li"):
        KeepPrefix().forward_packed(PackedTokens(draw(12, 8), [(3, 4)]))


def test_residual_adds_what_its_chain_makes_of_the_tokens() -> None:
    link = Residual(Chain(Norm(8), MLP(8, 8)))
    randomise(link)
    norm, mlp = link.inner.connectors
    tokens, prefix = draw(2, 12, 8), draw(2, 1, 8)
    out = link(VisualTokens(tokens, (3, 4), prefix))
    assert torch.equal(out.tokens, tokens + mlp.change(norm.change(tokens)))
    assert torch.equal(out.prefix, prefix)
    assert out.grid == (3, 4)
    assert set(link.state_dict()) == {
        "inner.links.0.norm.weight",
        "inner.links.0.norm.bias",
        *(f"inner.links.1.layers.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")),
    }


def test_a_residual_of_large_fp16_tokens_saturates() -> None:
    wide = TokenSpec(16, 1024, (4, 4))
    check_connector(build_connector("residual(gated_mlp)+norm+mlp", wide, 8), wide)
    link = Residual(Chain(Linear(2, 2, bias=False))).half()
    with torch.no_grad():
        link.inner.connectors[0].proj.weight.copy_(torch.eye(2))
    tokens = torch.tensor([[[60000.0, -60000.0], [1.0, -3.0]]]).half()
    expected = torch.tensor([[[65504.0, -65504.0], [2.0, -6.0]]]).half()
    assert torch.equal(link(VisualTokens(tokens, (1, 2))).tokens, expected)
    assert torch.equal(link.forward_packed(PackedTokens(tokens[0], [(1, 2)])).tokens, expected[0])


@pytest.mark.parametrize(
    ("inner", "gives"),
    [
        (Linear(8, 6), "12 tokens on 3x4 of width 6"),
        (TokenMerging(4), "4 tokens without grid of width 8"),
        (Matryoshka(2, "pad"), "4 tokens on 2x2 of width 8"),
        (TokenMerging(12), "12 tokens without grid of width 8"),
    ],
)
def test_residual_refuses_a_chain_that_changes_the_shape(inner: Connector, gives: str) -> None:
    link, visual = Residual(Chain(inner)), VisualTokens(draw(1, 12, 8), (3, 4))
    sentence = f"^'residual' adds what its chain gives, {gives}, to what comes in, 12 tokens on 3x4 of width 8; wrap on"
    for ask in (link, lambda visual: link.out_spec(visual.spec)):
        with pytest.raises(TokenShapeError, match=sentence):
            ask(visual)
    with pytest.raises(TokenShapeError, match=sentence):
        link.forward_packed(PackedTokens.join([visual]))


MAKE: list[tuple[str, Callable[[TokenSpec], Connector]]] = [
    ("linear", lambda spec: Linear(spec.dim, 10, bias=False)),
    ("mlp", lambda spec: MLP(spec.dim, 10)),
    ("mlp of depth 1", lambda spec: MLP(spec.dim, 10, depth=1)),
    ("mlp fused", lambda spec: MLP(spec.dim, 10, depth=3, hidden=4 * spec.dim, norm="rms", bias=False)),
    ("gated_mlp", lambda spec: GatedMLP(spec.dim, 10)),
    ("gated_mlp with all", lambda spec: GatedMLP(spec.dim, 10, 5, "gelu_tanh", bias=True, norm="layer")),
    ("norm", lambda spec: Norm(spec.dim)),
    ("norm rms", lambda spec: Norm(spec.dim, "rms", eps=1e-3)),
    ("norm gemma", lambda spec: Norm(spec.dim, "gemma")),
    ("residual", lambda spec: Residual(Chain(Norm(spec.dim), MLP(spec.dim, spec.dim, norm="rms")))),
    ("residual twice", lambda spec: Residual(Chain(Residual(Chain(Linear(spec.dim, spec.dim)))))),
    ("matryoshka of 1", lambda spec: Matryoshka.build(spec, 10, levels=Numbers((1, 2)))),
    ("matryoshka of 2", lambda spec: Matryoshka.build(spec, 10, levels=Numbers((2, 1)))),
    ("matryoshka of 4", lambda spec: Matryoshka.build(spec, 10, levels=Numbers(4), on_odd="pad")),
    ("matryoshka of 3", lambda spec: Matryoshka.build(spec, 10, levels=Numbers(3), on_odd="resize")),
    ("tome", lambda _: TokenMerging(3)),
    ("tome of 1", lambda _: TokenMerging(1)),
    ("tome of all", lambda spec: TokenMerging(spec.num_tokens)),
]
EACH = pytest.mark.parametrize("make", [make for _, make in MAKE], ids=[name for name, _ in MAKE])


@EACH
def test_each_keeps_the_contract(make: Callable[[TokenSpec], Connector]) -> None:
    for spec in SPECS:
        check_connector(make(spec), spec)
    for spec in (TALL_WITH_CLS, WITH_REGISTERS):
        check_connector(KeepPrefix(), spec)


def require_packed(connector: Connector, grids: list[Grid]) -> None:
    images = [VisualTokens(draw(1, math.prod(grid), 8, seed=index), grid) for index, grid in enumerate(grids)]
    with torch.no_grad():
        out = connector.forward_packed(PackedTokens.join(images))
        for part, image in zip(out.split(), images, strict=True):
            alone = connector(image)
            assert part.grid == alone.grid
            torch.testing.assert_close(part.tokens, alone.tokens, rtol=1e-5, atol=1e-5)


@EACH
def test_each_gives_packed_images_what_it_gives_them_alone(make: Callable[[TokenSpec], Connector]) -> None:
    connector = make(TokenSpec(16, 8, (4, 4))).eval()
    if isinstance(connector, TokenMerging) and connector.tokens == 16:
        return
    randomise(connector)
    require_packed(connector, [(4, 4), (2, 6), (6, 4), (2, 6), (8, 2)])


def test_packed_tokens_pass_the_token_wise_ones_at_once() -> None:
    passes = []
    for connector in (Linear(8, 10), MLP(8, 10), GatedMLP(8, 10), Norm(8), Residual(Chain(Norm(8), MLP(8, 8)))):
        layer = next(module for module in connector.modules() if isinstance(module, (nn.Linear, nn.LayerNorm)))
        layer.register_forward_hook(lambda _, given, __: passes.append(given[0].shape))
        connector.forward_packed(PackedTokens(draw(26, 8), [(4, 4), (2, 5)]))
    assert passes == [(26, 8)] * 5


@EACH
def test_each_compiles_in_one_graph_and_is_exported(make: Callable[[TokenSpec], Connector]) -> None:
    for spec in (OBLONG, TALL_WITH_CLS):
        connector = make(spec).eval()
        randomise(connector)
        prefix = draw(2, spec.num_prefix, spec.dim) if spec.num_prefix else None
        visual = VisualTokens(draw(2, spec.num_tokens, spec.dim), spec.grid, prefix)
        expected = connector(visual)
        torch._dynamo.reset()
        compiled = torch.compile(connector, fullgraph=True, backend="aot_eager")(visual)
        exported = torch.export.export(connector, (visual,)).module()(visual)
        for out in (compiled, exported):
            assert out.spec == expected.spec
            torch.testing.assert_close(out.tokens, expected.tokens, rtol=1e-5, atol=1e-5)


def test_a_compiled_matryoshka_follows_the_level() -> None:
    link = Matryoshka()
    compiled = torch.compile(link, fullgraph=True, backend="eager")
    visual = VisualTokens(draw(1, 16, 8), (4, 4))
    for level, count in ((1, 16), (4, 1), (2, 4)):
        link.choose_level(level)
        assert compiled(visual).tokens.shape[1] == count


def test_norms_and_merging_keep_doubles_double() -> None:
    tokens = draw(1, 12, 8).double()
    expected = tokens / (tokens.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    for kind in ("rms", "gemma"):
        found = Norm(8, kind).double()(VisualTokens(tokens, (3, 4))).tokens
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    merged = TokenMerging(1)(VisualTokens(tokens, (3, 4))).tokens
    torch.testing.assert_close(merged, tokens.mean(1, keepdim=True), rtol=1e-13, atol=1e-13)


def test_modules_of_plugins_draw_nothing_from_the_global_generator() -> None:
    root = nn.ModuleDict(
        {
            "conv": nn.Conv1d(4, 6, 3),
            "norm": nn.GroupNorm(2, 4),
            "scale": nn.PReLU(),
            "pair": nn.Bilinear(3, 3, 2),
            "recurrent": nn.GRUCell(3, 3),
        }
    )
    left = {name: tensor.clone() for name, tensor in root.state_dict().items()}
    with torch.no_grad():
        root["norm"].weight.fill_(3.0)
    before = torch.get_rng_state()
    Draw(0).modules(root)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(root["norm"].weight, torch.ones(4))
    assert not torch.equal(root["conv"].weight, left["conv.weight"])
    assert root["conv"].weight.abs().max().item() == pytest.approx(12**-0.5, rel=0.1)
    for name, tensor in root.state_dict().items():
        assert torch.equal(tensor, left[name]) or name.startswith("conv")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Linear(0, 4), "'linear' has in_dim=0; give a whole number of at least 1"),
        (lambda: Linear(4, 0), "'linear' has dim=0; give a whole number of at least 1"),
        (lambda: MLP(4, 6, depth=0), "'mlp' has depth=0; give a whole number of at least 1"),
        (lambda: MLP(4, 6, hidden=0), "'mlp' has hidden=0; give a whole number of at least 1"),
        (lambda: MLP(4, 6, depth=1, hidden=5), "depth=1, so no hidden layer of width 5; leave hidden out, or use dep"),
        (lambda: MLP(4, 6, activation="glu"), "'mlp' has no activation 'glu'; did you mean gelu"),
        (lambda: MLP(4, 6, activation=None), "'mlp' has no activation 'None'; known are gelu, gelu_tanh, quick_gelu"),
        (lambda: MLP(4, 6, norm="layr"), "'mlp' has no norm 'layr'; did you mean layer"),
        (lambda: GatedMLP(4, 0), "'gated_mlp' has dim=0; give a whole number of at least 1"),
        (lambda: GatedMLP(4, 6, hidden=-1), "'gated_mlp' has hidden=-1; give a whole number of at least 1"),
        (lambda: GatedMLP(4, 6, activation="swish"), "'gated_mlp' has no activation 'swish'; known are gelu, gelu_tan"),
        (lambda: GatedMLP(4, 6, norm="batch"), "'gated_mlp' has no norm 'batch'; known are gemma, layer, rms"),
        (lambda: Norm(0), "'norm' has dim=0; give a whole number of at least 1"),
        (lambda: Norm(4, "group"), "'norm' has no norm 'group'; known are gemma, layer, rms"),
        (lambda: Norm(4, eps=0.0), "'norm' has eps=0.0; give a small positive number such as 1e-6"),
        (lambda: Norm(4, eps="a"), "'norm' has eps=a; give a small positive number such as 1e-6"),
        (lambda: Norm(4, eps=math.nan), "'norm' has eps=nan; give a small positive number"),
        (lambda: Norm(4, eps=math.inf), "'norm' has eps=inf; give a small positive number"),
        (lambda: Matryoshka(Numbers(())), "'matryoshka' has levels=; give each level once, for example levels=1/2/4"),
        (lambda: Matryoshka(Numbers((2, 2))), "'matryoshka' has levels=2/2; give each level once"),
        (lambda: Matryoshka(Numbers((1, 0))), "'matryoshka' has levels=0; give a whole number of at least 1"),
        (lambda: Matryoshka(2, "stretch"), "'matryoshka' has on_odd=stretch; "),
        (lambda: Matryoshka(3).out_spec(SQUARE), "a 4x4 grid does not divide into 3x3 blocks; on_odd=pad gives 2x2 ="),
        (lambda: Matryoshka(3).out_spec(QUERIES), "level 3 does not divide 8 queries; on_odd=pad keeps 3, on_odd=crop"),
        (lambda: Matryoshka(Numbers((1, 3))).counts(SQUARE), "a 4x4 grid does not divide into 3x3 blocks"),
        (lambda: TokenMerging(0), "'tome' has tokens=0; give a whole number of at least 1"),
        (
            lambda: TokenMerging(17).out_spec(SQUARE),
            "'tome' merges to 17 tokens, only 16 come in; use at most tokens=1",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(VlmError) as caught:
        make()
    message = str(caught.value)
    assert sentence in message
    assert not message.endswith(".")
    assert "\n" not in message


def test_a_tensor_that_does_not_fit_is_refused_as_its_spec_is() -> None:
    visual = VisualTokens(draw(1, 16, 8), (4, 4))
    with pytest.raises(TokenShapeError, match="a 4x4 grid does not divide into 3x3 blocks"):
        Matryoshka(3)(visual)
    with pytest.raises(TokenShapeError, match="a 4x4 grid does not divide into 3x3 blocks"):
        Matryoshka(3).forward_packed(PackedTokens.join([visual]))
    for ask in (TokenMerging(17), lambda visual: TokenMerging(17).forward_packed(PackedTokens.join([visual]))):
        with pytest.raises(TokenShapeError, match="'tome' merges to 17 tokens, only 16 come in"):
            ask(visual)
    for make in (GatedMLP(9, 4), Norm(9), MLP(9, 4), Linear(9, 4)):
        for ask in (make, lambda visual, make=make: make.forward_packed(PackedTokens.join([visual]))):
            with pytest.raises(TokenShapeError, match=f"'{make.name}' was built for tokens of width 9, got width 8"):
                ask(visual)


def test_unknown_words_are_key_errors() -> None:
    for make in (lambda: GatedMLP(4, 6, activation="x"), lambda: Norm(4, "x"), lambda: Matryoshka(2, "x")):
        with pytest.raises(UnknownNameError):
            make()


def test_quick_gelu_is_its_formula() -> None:
    values = torch.linspace(-5, 5, 41)
    assert ACTIVATIONS["quick_gelu"] is QuickGELU
    torch.testing.assert_close(QuickGELU()(values), values / (1 + torch.exp(-1.702 * values)))
