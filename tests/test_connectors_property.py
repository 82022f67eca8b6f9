"""Drawn recipes over drawn grids: what is stated is what comes, packed equals single, and a recipe builds again."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from connectors import (
    Chain,
    Numbers,
    PackedTokens,
    TokenShapeError,
    TokenSpec,
    VisualTokens,
    VlmError,
    build_connector,
    list_connectors,
    recipe_of,
)
from connectors.base import CONNECTORS
from connectors.chain import Wrapper
from connectors.recipe import connector_options
from connectors.tokens import Grid

ROUNDS = 20
DRAWS = 50
OUT_DIM = 6
ODD = ("error", "pad", "crop", "resize")

# What an option is drawn from, by connector; one that is not here keeps its default.
VALUES: dict[str, dict[str, tuple[object, ...]]] = {
    "avg_pool": {"factor": (1, 2, 3), "on_odd": ODD},
    "c_abstractor": {"grid": ("2x2", "3x2"), "hidden": (4, 8), "depth": (0, 1), "mlp_depth": (1, 2), "eos": (0, 2)},
    "conv": {"kernel": (1, 2, 3), "stride": (1, 2), "padding": (0, 1), "bias": ("true", "false"), "dim": (6, 8)},
    "flamingo": {"queries": (1, 4), "depth": (1, 2), "heads": (2,), "head_dim": (4,), "qk_norm": ("true", "false")},
    "gated_mlp": {"hidden": (4, 8), "norm": ("none", "layer"), "bias": ("true", "false")},
    "instruct_qformer": {
        "queries": (1, 3),
        "dim": (4, 8),
        "layers": (1, 2),
        "heads": (2,),
        "ffn": (4,),
        "vocab": (103,),
        "positions": (2,),
    },
    "keep_prefix": {},
    "ldp": {"dim": (6, 8)},
    "ldp_v2": {"grid": ("2x2", "3x1"), "dim": (6, 8)},
    "linear": {"dim": (6, 8), "bias": ("true", "false")},
    "matryoshka": {"levels": ("1/2", "2/1", "3"), "on_odd": ODD},
    "max_pool": {"factor": (1, 2, 3), "on_odd": ODD},
    "mlp": {"depth": (1, 2, 3), "norm": ("none", "layer", "rms"), "dim": (6, 8)},
    "norm": {"kind": ("layer", "rms", "gemma")},
    "patch_merger": {"factor": (1, 2), "norm": ("layer", "rms"), "norm_after": ("true", "false"), "on_odd": ODD},
    "perceiver": {"queries": (1, 4), "depth": (1, 2), "heads": (2,), "head_dim": (4,), "kv_heads": (1, 2)},
    "pixel_shuffle": {"factor": (1, 2, 3), "on_odd": ODD, "transposed": ("true", "false")},
    "pooled_projector": {"grid": ("2x2", "1x3")},
    "position": {"grid": ("4x4", "2x3")},
    "qformer": {"queries": (1, 3), "dim": (4, 8), "layers": (1, 2), "heads": (2,), "ffn": (4,), "cross_every": (1, 2)},
    "residual": {},
    "resize": {"factor": (1, 2, 3), "mode": ("bilinear", "nearest", "bicubic", "area")},
    "sva": {"folds": ("1", "2", "1/1"), "hidden": (4,), "heads": (1, 2), "depth": (1, 2), "groups": (1, 2)},
    "token_packer": {"factor": (1, 2), "levels": (1, 2), "hidden": (4,), "heads": (1, 2), "on_odd": ODD},
    "tome": {"tokens": (1, 3, 6)},
}
# Without these a connector would be built at its published size.
ALWAYS = {
    "vocab",
    "positions",
    "heads",
    "head_dim",
    "hidden",
    "queries",
    "dim",
    "layers",
    "depth",
    "ffn",
    "grid",
    "kv_heads",
    "tokens",
}
ALSO = {"avg_pool": {"factor"}, "max_pool": {"factor"}, "resize": {"factor"}}


def draw_link(draw: random.Random, depth: int = 0) -> str:
    name = draw.choice(list_connectors())
    cls = CONNECTORS.get(name)
    chosen = [
        f"{option}={draw.choice(values)}"
        for option, values in VALUES.get(name, {}).items()
        if option in ALWAYS | ALSO.get(name, set()) or draw.random() < 0.6
    ]
    inner = f"({draw_recipe(draw, 2, depth + 1)})" if issubclass(cls, Wrapper) else ""
    return f"{name}:{','.join(chosen)}{inner}" if chosen else f"{name}{inner}"


def draw_recipe(draw: random.Random, longest: int = 4, depth: int = 0) -> str:
    if depth > 1:
        return draw.choice(["mlp:dim=8", "norm"])
    return "+".join(draw_link(draw, depth) for _ in range(draw.randint(1, longest)))


def draw_grid(draw: random.Random) -> Grid:
    kind = draw.random()
    if kind < 0.15:
        return (1, draw.randint(1, 9)) if draw.random() < 0.5 else (draw.randint(1, 9), 1)
    return (draw.choice((2, 4, 6)), draw.choice((2, 4, 6))) if kind < 0.6 else (draw.randint(2, 7), draw.randint(2, 7))


def draw_spec(draw: random.Random, dim: int = 8) -> TokenSpec:
    rows, columns = draw_grid(draw)
    return TokenSpec(rows * columns, dim, (rows, columns), draw.choice((0, 0, 1, 5)))


def tokens_of(spec: TokenSpec, draw: random.Random, views: int = 2) -> VisualTokens:
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    prefix = torch.randn(views, spec.num_prefix, spec.dim, generator=generator) if spec.num_prefix else None
    tokens = torch.randn(views, spec.num_tokens, spec.dim, generator=generator)
    return VisualTokens(tokens, spec.grid, prefix)


def require_sentence(error: VlmError) -> None:
    text = str(error)
    assert "\n" not in text, text
    assert not text.endswith("."), text
    assert not re.match(r"[A-Z][a-z]+ ", text), text


def build_or_refuse(recipe: str, spec: TokenSpec) -> Chain | None:
    try:
        return build_connector(recipe, spec, OUT_DIM)
    except VlmError as error:
        require_sentence(error)
        return None


def stated(chain: Chain, spec: TokenSpec) -> TokenSpec | None:
    try:
        return chain.out_spec(spec)
    except TokenShapeError as error:
        require_sentence(error)
        return None


def check_forward(chain: Chain, spec: TokenSpec, draw: random.Random) -> bool:
    """Hold `forward` to `out_spec`, refusals too; give whether the tokens are taken."""
    wanted = stated(chain, spec)
    visual = tokens_of(spec, draw)
    if wanted is None:
        with pytest.raises(VlmError) as caught:
            chain(visual)
        require_sentence(caught.value)
        return False
    out = chain(visual)
    assert out.spec == wanted
    assert out.tokens.isfinite().all()
    return True


def check_packed(chain: Chain, draw: random.Random, dim: int) -> bool:
    """Hold 2 to 4 packed images, prefix and all, to the same images alone; give whether they are taken."""
    num_prefix = draw.choice((0, 0, 1, 5))
    specs = [replace(draw_spec(draw, dim), num_prefix=num_prefix) for _ in range(draw.randint(2, 4))]
    images = [tokens_of(spec, draw, views=1) for spec in specs]
    packed = PackedTokens.join(images)
    if any(stated(chain, spec) is None for spec in specs):
        with pytest.raises(VlmError) as caught:
            chain.forward_packed(packed)
        require_sentence(caught.value)
        return False
    for image, part in zip(images, chain.forward_packed(packed).split(), strict=True):
        alone = chain(image)
        assert part.spec == alone.spec == chain.out_spec(image.spec)
        torch.testing.assert_close(part.tokens, alone.tokens, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part.prefix, alone.prefix, rtol=1e-5, atol=1e-5)
    return True


def check_again(chain: Chain, recipe: str, spec: TokenSpec, draw: random.Random) -> None:
    """Build what the chain writes of itself, and find the same."""
    written = recipe_of(chain, OUT_DIM)
    again = build_connector(written, spec, OUT_DIM)
    assert recipe_of(again, OUT_DIM) == written, recipe
    mine, other = chain.state_dict(), again.state_dict()
    assert mine.keys() == other.keys(), recipe
    assert all(torch.equal(mine[key], other[key]) for key in mine), recipe
    visual = tokens_of(spec, draw, views=1)
    assert torch.equal(chain.eval()(visual).tokens, again.eval()(visual).tokens), recipe


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_drawn_recipes_do_what_they_state(seed: int) -> None:
    draw = random.Random(seed)
    counts: Counter[str] = Counter()
    while counts["built"] < DRAWS:
        spec = draw_spec(draw)
        recipe = f"{draw_recipe(draw)}+linear"
        chain = build_or_refuse(recipe, spec)
        counts["drawn"] += 1
        if chain is None:
            continue
        counts["built"] += 1
        with torch.no_grad():
            assert check_forward(chain.eval(), spec, draw), recipe
            # The same chain on another grid, or with another prefix, may refuse.
            counts["taken" if check_forward(chain, draw_spec(draw, spec.dim), draw) else "refused"] += 1
            counts["packed" if check_packed(chain, draw, spec.dim) else "packed refused"] += 1
            check_again(chain, recipe, spec, draw)
    assert counts["built"] > counts["drawn"] / 8, counts
    assert min(counts["taken"], counts["packed"]) > DRAWS / 4, counts
    assert min(counts["refused"], counts["packed refused"]) > 0, counts


def test_the_draws_meet_every_connector_and_its_options() -> None:
    draw = random.Random(0)
    seen: Counter[str] = Counter()
    for _ in range(ROUNDS * DRAWS):
        seen.update(re.findall(r"[a-z_0-9]+(?=[:+(]|$)", draw_recipe(draw)))
    assert set(list_connectors()) <= seen.keys()
    for name, options in VALUES.items():
        assert options.keys() <= connector_options(CONNECTORS.get(name)).keys(), name


def test_drawn_recipes_build_without_memory() -> None:
    draw = random.Random(1)
    built = 0
    while built < 40:
        spec, recipe = draw_spec(draw), f"{draw_recipe(draw)}+linear"
        real = build_or_refuse(recipe, spec)
        if real is None:
            continue
        built += 1
        with torch.device("meta"):
            meta = build_connector(recipe, spec, OUT_DIM)
        assert all(tensor.is_meta for tensor in meta.state_dict().values()), recipe
        assert {key: tensor.shape for key, tensor in meta.state_dict().items()} == {
            key: tensor.shape for key, tensor in real.state_dict().items()
        }
        prefix = torch.empty(1, spec.num_prefix, spec.dim, device="meta") if spec.num_prefix else None
        tokens = torch.empty(1, spec.num_tokens, spec.dim, device="meta")
        assert meta(VisualTokens(tokens, spec.grid, prefix)).spec == real.out_spec(spec), recipe


def test_a_level_chosen_at_run_time_keeps_to_what_is_stated() -> None:
    draw = random.Random(2)
    levels = Numbers((1, 2, 3))
    for _ in range(30):
        spec = draw_spec(draw)
        chain = build_connector(f"matryoshka:levels={levels},on_odd=pad+linear", spec, OUT_DIM)
        link = chain.connectors[0]
        for level in levels:
            link.choose_level(level)  # type: ignore[operator]
            assert check_forward(chain, spec, draw)
