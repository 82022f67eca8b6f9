"""Released weights of models that no library has: their names, with references made of torch, timm and torchvision."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from connectors import VisualTokens, VlmError, recipe_of
from connectors.released import load_released, to_released

OUTSIDE = {
    "model.embed_tokens.weight": torch.ones(5, 3),
    "lm_head.weight": torch.ones(5, 3),
    "model.layers.0.mlp.gate_proj.weight": torch.ones(3, 3),
}


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomise(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=index + 2) * 0.3)
    return module.eval()


def named(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def check(state: dict[str, Tensor], layout: str, recipe: str, out_dim: int, **hints: Any) -> Any:
    """Load part and whole, compare the recipe, and send the weights back."""
    chain = load_released({**state, **OUTSIDE}, **hints)
    assert recipe_of(chain, out_dim) == recipe
    assert equal(load_released(state, **hints).state_dict(), chain.state_dict())
    assert equal(to_released(chain, layout), state)
    for name in state.keys() - {"abstractor.eos_tokens"}:
        with pytest.raises(VlmError):
            load_released({key: value for key, value in state.items() if key != name}, **hints)
    return chain


def same(chain: Any, expected: Tensor, tokens: Tensor, grid: tuple[int, int] | None, **extra: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(chain(VisualTokens(tokens, grid), **extra).tokens, expected, rtol=1e-5, atol=1e-5)


def llava_mlp(depth: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(6, 8)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(8, 8)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_llavas_projector(depth: int, grid: tuple[int, int]) -> None:
    reference = randomise(llava_mlp(depth))
    recipe = "mlp" if depth == 2 else f"mlp:depth={depth}"
    chain = check(named(reference, "model.mm_projector."), "llava", recipe, 8)
    tokens = draw(2, math.prod(grid), 6)
    same(chain, reference(tokens), tokens, grid)


def test_llavas_linear_projector() -> None:
    reference = randomise(nn.Linear(6, 8))
    chain = check(named(reference, "model.mm_projector."), "llava-linear", "linear", 8)
    tokens = draw(2, 6, 6)
    same(chain, reference(tokens), tokens, (2, 3))


def test_llava_next_has_a_newline_beside_the_projector() -> None:
    state = {**named(randomise(llava_mlp(2)), "model.mm_projector."), "model.image_newline": draw(8)}
    chain = load_released({**state, **OUTSIDE})
    assert torch.equal(chain.newline, state["model.image_newline"])
    assert equal(to_released(chain, "llava"), state)


def test_llavas_lora_files_have_a_longer_prefix() -> None:
    state = named(randomise(llava_mlp(2)), "base_model.model.model.mm_projector.")
    chain = load_released(state)
    assert equal(to_released(chain, "llava", prefix="base_model.model.model."), state)


def test_a_resampler_of_llava_is_not_left_out() -> None:
    state = named(randomise(llava_mlp(2)), "model.mm_projector.")
    with pytest.raises(VlmError, match=r"unexpected vision_resampler\.query \(4, 6\)"):
        load_released({**state, "model.vision_resampler.query": torch.ones(4, 6)})


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("grid", [(4, 4), (2, 6)])
def test_internvls_own_mlp1(grid: tuple[int, int], *, transposed: bool) -> None:
    reference = randomise(nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 8), nn.GELU(), nn.Linear(8, 8)))
    option = "transposed=true" if transposed else ""
    recipe = "+".join([f"pixel_shuffle:{option}".rstrip(":"), "mlp:norm=layer"])
    chain = check(named(reference, "mlp1."), "internvl", recipe, 8, transposed=transposed)
    tokens = draw(2, math.prod(grid), 6)
    rows, columns = grid
    # Token by token: the channels of a block run row by row; v1 puts the folded tokens column by column.
    picture = tokens.unflatten(1, grid)
    places = [(row, column) for row in range(0, rows, 2) for column in range(0, columns, 2)]
    if transposed:
        places = sorted(places, key=lambda place: (place[1], place[0]))
    blocks = [torch.cat([picture[:, y + i, x + j] for i in (0, 1) for j in (0, 1)], dim=-1) for y, x in places]
    same(chain, reference(torch.stack(blocks, dim=1)), tokens, grid)


def test_internvls_factor_is_held_to_the_encoders_width() -> None:
    state = named(randomise(nn.Sequential(nn.LayerNorm(36), nn.Linear(36, 8), nn.GELU(), nn.Linear(8, 8))), "mlp1.")
    whole = {**state, "vision_model.embeddings.patch_embedding.weight": torch.ones(4, 3, 2, 2)}
    assert recipe_of(load_released(whole, transposed=False), 8) == "pixel_shuffle:factor=3+mlp:norm=layer"
    assert recipe_of(load_released(state, transposed=False), 8) == "pixel_shuffle+mlp:norm=layer"
    with pytest.raises(VlmError, match="factor=2 contradicts the weights: folded tokens have width 36 and the encoder"):
        load_released(whole, factor=2, transposed=False)
    with pytest.raises(VlmError, match="factor=5 contradicts the weights: folded tokens have width 36, which"):
        load_released(state, factor=5, transposed=False)


class InvertedResiduals(nn.Module):
    """The two blocks of MobileVLM's first projector, of torchvision's class."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        from timm.layers.norm_act import LayerNormAct2d
        from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
        from torchvision.ops.misc import SqueezeExcitation

        norm = partial(LayerNormAct2d, act_layer=None)
        gate = partial(SqueezeExcitation, scale_activation=nn.Hardsigmoid)
        self.mlp = nn.Sequential(nn.Identity(), nn.Linear(6, dim), nn.GELU(), nn.Linear(dim, dim))
        configs = [InvertedResidualConfig(dim, 3, dim, dim, True, "HS", stride, 1, 1) for stride in (1, 2)]
        self.mb_block = nn.Sequential(nn.Identity(), *(InvertedResidual(each, norm, gate) for each in configs))


@pytest.mark.parametrize("grid", [(4, 4), (3, 6)])
def test_mobilevlms_projector(grid: tuple[int, int]) -> None:
    reference = randomise(InvertedResiduals(16))
    chain = check(named(reference, "model.mm_projector.model."), "mobilevlm", "ldp", 16)
    tokens = draw(2, math.prod(grid), 6)
    with torch.no_grad():
        expected = reference.mb_block(VisualTokens(reference.mlp(tokens), grid).as_map())
    same(chain, expected.flatten(2).mT, tokens, grid)


@pytest.mark.parametrize("grid", [(24, 24), (12, 36)])
def test_mobilevlm_v2s_projector(grid: tuple[int, int]) -> None:
    mlp = randomise(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8)))
    peg = randomise(nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8)))
    state = {**named(mlp, "model.mm_projector.mlp.mlp."), **named(peg, "model.mm_projector.peg.peg.")}
    chain = check(state, "mobilevlm-v2", "ldp_v2", 8)
    tokens = draw(1, math.prod(grid), 6)
    with torch.no_grad():
        pooled = F.adaptive_avg_pool2d(VisualTokens(mlp(tokens), grid).as_map(), (12, 12))
        expected = (peg(pooled) + pooled).flatten(2).mT
    same(chain, expected, tokens, grid)


class Honeybee(nn.Module):
    """The parts of Honeybee's C-Abstractor under its names, of timm's class."""

    def __init__(
        self, depth: int, in_dim: int, hidden: int, positions: int, eos: int = 0, *, prenorm: bool = False
    ) -> None:
        super().__init__()
        from timm.layers import LayerNorm, LayerNorm2d
        from timm.models.regnet import RegStage

        if eos:
            self.eos_tokens = nn.Parameter(torch.empty(1, eos, 10))
        if positions:
            self.pos_emb = nn.Parameter(torch.empty(1, positions, in_dim))
        if prenorm:
            self.prenorm = LayerNorm(in_dim)
        stage = partial(RegStage, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
        self.pool = nn.AdaptiveAvgPool2d((2, 2))
        if depth:
            self.net = nn.Sequential(stage(depth, in_dim, hidden), self.pool, stage(depth, hidden, hidden))
        else:
            self.net = self.pool
        self.readout = nn.Sequential(nn.Linear(hidden, 10), nn.SiLU(), nn.Linear(10, 10))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        if hasattr(self, "prenorm"):
            tokens = self.prenorm(tokens)
        if hasattr(self, "pos_emb"):
            tokens = tokens + self.pos_emb
        out = self.readout(self.net(VisualTokens(tokens, grid).as_map()).flatten(2).mT)
        if hasattr(self, "eos_tokens"):
            out = torch.cat([out, self.eos_tokens.expand(len(out), -1, -1)], dim=1)
        return out


@pytest.mark.parametrize(
    ("options", "recipe", "grids"),
    [
        ((3, 8, 8, 16), "position:grid=4x4+c_abstractor:grid=2x2,hidden=8", [(4, 4)]),
        ((1, 8, 12, 0), "c_abstractor:grid=2x2,hidden=12,depth=1", [(4, 4), (2, 6), (5, 3)]),
        ((0, 8, 8, 0), "c_abstractor:grid=2x2,hidden=8,depth=0", [(4, 4), (2, 6)]),
        ((1, 8, 8, 0, 3), "c_abstractor:grid=2x2,hidden=8,depth=1,eos=3", [(2, 6)]),
    ],
)
def test_honeybees_c_abstractor(options: Any, recipe: str, grids: list[tuple[int, int]]) -> None:
    reference = randomise(Honeybee(*options))
    state = named(reference, "abstractor.")
    hints = {} if options[3] else {"positions": False}
    chain = check(state, "honeybee", recipe, 10, grid=(2, 2), **hints)
    for grid in grids:
        tokens = draw(2, math.prod(grid), 8)
        same(chain, reference(tokens, grid), tokens, grid)


def test_honeybees_norm_and_positions_stand_in_front() -> None:
    reference = randomise(Honeybee(1, 8, 8, 9, prenorm=True))
    chain = load_released(named(reference, "abstractor."), grid=(2, 2))
    assert recipe_of(chain, 10) == "norm:eps=1e-06+position:grid=3x3+c_abstractor:grid=2x2,hidden=8,depth=1"
    tokens = draw(2, 9, 8)
    same(chain, reference(tokens, (3, 3)), tokens, (3, 3))


def test_honeybees_old_files_have_a_place_for_cls() -> None:
    reference = randomise(Honeybee(1, 8, 8, 16))
    state = named(reference, "abstractor.")
    old = {**state, "abstractor.pos_emb": torch.cat([draw(1, 1, 8), state["abstractor.pos_emb"]], dim=1)}
    with pytest.raises(VlmError, match=r"has 17 places, one of them for CLS, .* pass cls_position=False to drop it"):
        load_released(old, grid=(2, 2))
    chain = load_released(old, grid=(2, 2), cls_position=False)
    assert equal(to_released(chain, "honeybee"), state)
    with pytest.raises(VlmError, match=r"cls_position=False contradicts 'abstractor.pos_emb', which has 16 places"):
        load_released(state, grid=(2, 2), cls_position=False)
    with pytest.raises(VlmError, match="has 15 places, which are no square grid"):
        load_released({**state, "abstractor.pos_emb": draw(1, 15, 8)}, grid=(2, 2))


def test_honeybees_mlp() -> None:
    reference = randomise(nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 8)))
    chain = check(named(reference, "abstractor.net."), "honeybee-mlp", "mlp:activation=silu", 8, positions=False)
    tokens = draw(2, 6, 6)
    same(chain, reference(tokens), tokens, (2, 3))


def lavis_of(reference: Any, last: str) -> dict[str, Tensor]:
    """Give transformers' names the form that LAVIS has."""
    renamed = {"query_tokens": reference.query_tokens.data}
    for name, tensor in reference.qformer.state_dict().items():
        new = name.replace("attention.attention.", "attention.self.").replace("layernorm", "LayerNorm")
        renamed["Qformer.bert." + (f"embeddings.{new}" if new.startswith("LayerNorm") else new)] = tensor
    renamed |= named(reference.language_projection, f"{last}.")
    return {**renamed, "Qformer.bert.embeddings.position_ids": torch.arange(512)[None]}


def blip(*, instruct: bool) -> Any:
    import transformers as hf

    vision = {
        "hidden_size": 6,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    text = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 30,
    }
    qformer = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "encoder_hidden_size": 6,
        "vocab_size": 110,
        "max_position_embeddings": 7,
    }
    config = hf.InstructBlipConfig if instruct else hf.Blip2Config
    model = hf.InstructBlipForConditionalGeneration if instruct else hf.Blip2ForConditionalGeneration
    made = config(vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=3)
    return randomise(model(made))


@pytest.mark.parametrize(("layout", "last"), [("blip-2-opt-lavis", "opt_proj"), ("blip-2-t5-lavis", "t5_proj")])
def test_lavis_blip_2(layout: str, last: str) -> None:
    reference = blip(instruct=False)
    recipe = "keep_prefix+qformer:queries=3,dim=8,layers=2,heads=2,ffn=12+linear"
    chain = check(lavis_of(reference, last), layout, recipe, 8, heads=2)
    tokens = draw(2, 5, 6)
    with torch.no_grad():
        out = reference.qformer(query_embeds=reference.query_tokens.expand(2, -1, -1), encoder_hidden_states=tokens)
        expected = reference.language_projection(out.last_hidden_state)
        got = chain(VisualTokens(tokens[:, 1:], (2, 2), tokens[:, :1])).tokens
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layout", "last"), [("instructblip-lavis", "llm_proj"), ("instructblip-t5-lavis", "t5_proj")])
def test_lavis_instructblip(layout: str, last: str) -> None:
    reference = blip(instruct=True)
    recipe = "keep_prefix+instruct_qformer:queries=3,dim=8,layers=2,heads=2,ffn=12,vocab=110,positions=7+linear"
    chain = check(lavis_of(reference, last), layout, recipe, 8, heads=2)
    tokens, ids = draw(2, 5, 6), torch.tensor([[3, 4, 5], [6, 7, 8]])
    with torch.no_grad():
        out = reference.qformer(
            ids,
            query_embeds=reference.query_tokens.expand(2, -1, -1),
            encoder_hidden_states=tokens,
            attention_mask=torch.ones(2, 6, dtype=torch.long),
        )
        expected = reference.language_projection(out.last_hidden_state[:, :3])
        got = chain(VisualTokens(tokens[:, 1:], (2, 2), tokens[:, :1]), instruction=ids).tokens
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_lavis_place_numbers_must_count() -> None:
    state = lavis_of(blip(instruct=False), "opt_proj")
    state["Qformer.bert.embeddings.position_ids"] = torch.zeros(1, 512, dtype=torch.long)
    with pytest.raises(VlmError, match=r"'Qformer.bert.embeddings.position_ids' does not count 0 to 511"):
        load_released(state, heads=2)


def flamingo_state(dim: int, heads: int, head_dim: int, ffn: int) -> dict[str, Tensor]:
    state = {"perceiver.latents": draw(3, dim), "perceiver.norm.weight": draw(dim), "perceiver.norm.bias": draw(dim)}
    inner = heads * head_dim
    shapes = {
        "0.norm_media.weight": (dim,),
        "0.norm_media.bias": (dim,),
        "0.norm_latents.weight": (dim,),
        "0.norm_latents.bias": (dim,),
        "0.to_q.weight": (inner, dim),
        "0.to_kv.weight": (2 * inner, dim),
        "0.to_out.weight": (dim, inner),
        "1.0.weight": (dim,),
        "1.0.bias": (dim,),
        "1.1.weight": (ffn, dim),
        "1.3.weight": (dim, ffn),
    }
    for layer in (0, 1):
        for index, (name, shape) in enumerate(shapes.items()):
            state[f"perceiver.layers.{layer}.{name}"] = draw(*shape, seed=20 * layer + index + 2) * 0.3
    return state


def test_openflamingos_resampler() -> None:
    dim, heads, head_dim = 6, 2, 5
    state = flamingo_state(dim, heads, head_dim, 24)
    chain = check(state, "openflamingo", "flamingo:queries=3,depth=2,heads=2,head_dim=5", dim, heads=2)
    tokens = draw(2, 7, dim)
    queries = state["perceiver.latents"].expand(2, -1, -1)
    for layer in (0, 1):
        w = {name.removeprefix(f"perceiver.layers.{layer}."): tensor for name, tensor in state.items()}
        media = F.layer_norm(tokens, (dim,), w["0.norm_media.weight"], w["0.norm_media.bias"])
        asked = F.layer_norm(queries, (dim,), w["0.norm_latents.weight"], w["0.norm_latents.bias"])
        both = torch.cat([media, asked], dim=1)
        q = asked @ w["0.to_q.weight"].T
        k, v = (both @ w["0.to_kv.weight"].T).chunk(2, dim=-1)
        read = []
        for head in range(heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            read.append((q[..., part] @ k[..., part].mT * head_dim**-0.5).softmax(-1) @ v[..., part])
        queries = queries + torch.cat(read, dim=-1) @ w["0.to_out.weight"].T
        inner = F.layer_norm(queries, (dim,), w["1.0.weight"], w["1.0.bias"])
        queries = queries + F.gelu(inner @ w["1.1.weight"].T) @ w["1.3.weight"].T
    expected = F.layer_norm(queries, (dim,), state["perceiver.norm.weight"], state["perceiver.norm.bias"])
    same(chain, expected, tokens, None)
