"""Recipes: read, built, written again, and refused with a sentence."""

import random

import pytest
import torch

from connectors import (
    MLP,
    Chain,
    Connector,
    Linear,
    PixelShuffle,
    TokenShapeError,
    TokenSpec,
    UnknownNameError,
    VisualTokens,
    VlmError,
    build_connector,
    parse_recipe,
    recipe_of,
)
from connectors.base import CONNECTORS
from connectors.recipe import connector_options

SPEC = TokenSpec(16, 8, (4, 4), num_prefix=1)


def test_a_recipe_reads_as_names_and_options() -> None:
    links = parse_recipe(" avg_pool:grid=8x6 + qformer: queries=4 ,dropout=1e-1 + linear:bias=False")
    assert links == [
        ("avg_pool", {"grid": (8, 6)}),
        ("qformer", {"queries": 4, "dropout": 0.1}),
        ("linear", {"bias": False}),
    ]
    assert parse_recipe("mlp:activation=gelu,") == [("mlp", {"activation": "gelu"})]


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("", "the connector recipe is empty"),
        ("mlp:depth", "'depth' in recipe 'mlp:depth' is not option=value; write for example mlp:"),
        ("mlp:=3", "is not option=value"),
        ("mlp:depth=2,depth=3", "option 'depth' stands twice in 'mlp:depth=2,depth=3'; keep one"),
        ("mlp2x_gelu", "no connector 'mlp2x_gelu'; did you mean mlp[?]"),
        ("pixelshuffle+mlp", "no connector 'pixelshuffle'; did you mean pixel_shuffle[?]"),
        ("mlp+", "no connector ''; known are"),
        ("mlp:dept=2", "connector 'mlp' has no option 'dept'; did you mean depth[?]"),
        ("mlp:zzz=2", "connector 'mlp' has no option 'zzz'; known are activation, depth, dim"),
        ("keep_prefix:factor=2+mlp", "connector 'keep_prefix' has no option 'factor'; it takes none"),
        ("pixel_shuffle:factor=2.5+mlp", "'pixel_shuffle' has factor=2.5; give a whole number"),
        ("pixel_shuffle:factor=two+mlp", "'pixel_shuffle' has factor=two; give a whole number"),
        ("pixel_shuffle:factor=true+mlp", "'pixel_shuffle' has factor=true; give a whole number"),
        ("pixel_shuffle:factor=0+mlp", "'pixel_shuffle' has factor=0; give a whole number of at least 1"),
        ("linear:bias=1", "'linear' has bias=1; give true or false"),
        ("mlp:activation=3", "'mlp' has activation=3; give a word"),
        ("mlp:activation=glu", "'mlp' has no activation 'glu'; did you mean gelu"),
        ("mlp:depth=0", "'mlp' has depth=0; give a whole number of at least 1"),
        ("mlp:dim=0+linear", "'mlp' has dim=0; give a whole number of at least 1"),
        ("linear:dim=-3+linear", "'linear' has dim=-3; give a whole number of at least 1"),
        ("avg_pool+mlp", "'avg_pool' takes factor or grid, got neither; write avg_pool:factor=2 or"),
        ("avg_pool:factor=2,grid=2x2+mlp", "'avg_pool' takes factor or grid, got both"),
        ("avg_pool:factor=2.0+mlp", "'avg_pool' has factor=2.0; give a whole number of at least 1"),
        ("avg_pool:grid=4+mlp", "'avg_pool' has grid=4; give rows and columns, for example grid=8x8"),
        ("avg_pool:grid=0x2+mlp", "'avg_pool' has rows=0; give a whole number of at least 1"),
        ("avg_pool:grid=ab+mlp", "'avg_pool' has rows=a; give a whole number of at least 1"),
        ("avg_pool:grid=5x4+mlp", "avg_pool:grid=5x4 is finer than the 4x4 grid that comes in; use at most 4x4"),
        ("avg_pool:factor=3+mlp", "4x4 grid does not divide into 3x3 blocks; use avg_pool:grid=1x1, or pad or resize"),
        ("pixel_shuffle:factor=3+mlp", "4x4 grid does not divide into 3x3 blocks; pad or resize .* 3x3 or 6x6"),
        ("qformer:queries=0+linear", "'qformer' has queries=0; give a whole number of at least 1"),
        ("qformer:dim=10,heads=4+linear", "4 heads do not divide width 10; use a divisor of 10, for example 2"),
        ("qformer:dropout=1+linear", "'qformer' has dropout=1; give a probability from 0 to below 1"),
        ("qformer:dropout=-0.1+linear", "'qformer' has dropout=-0.1; give a probability"),
        ("perceiver:heads=4,kv_heads=3+mlp", "3 kv_heads do not divide 4 heads; use a divisor of 4, for example 2"),
        ("perceiver:depth=0+mlp", "'perceiver' has depth=0; give a whole number of at least 1"),
        ("pixel_shuffle", "'pixel_shuffle' ends at width 32, the LLM takes 6; end it with mlp or linear"),
        ("perceiver:queries=2,depth=1+pixel_shuffle+mlp", "query tokens have no grid; put spatial connectors before"),
        ("pixel_shuffle+keep_prefix+mlp", "'keep_prefix' needs prefix tokens, but .* or a link before dropped them"),
        ("keep_prefix+avg_pool:factor=2+mlp", "query tokens have no grid"),
    ],
)
def test_a_wrong_recipe_is_refused_when_built(recipe: str, sentence: str) -> None:
    with pytest.raises(VlmError, match=sentence) as caught:
        build_connector(recipe, SPEC, 6)
    message = str(caught.value)
    assert message[0].islower() or not message[0].isalpha()
    assert not message.endswith(".")
    assert "\n" not in message


def test_keep_prefix_says_when_the_encoder_has_none() -> None:
    with pytest.raises(TokenShapeError, match="this encoder has none"):
        build_connector("keep_prefix+mlp", TokenSpec(16, 8, (4, 4)), 6)


@pytest.mark.parametrize("recipe", ["mlp", "linear", "qformer:dim=4,layers=1,heads=1,ffn=4+linear"])
def test_tokens_of_another_width_are_refused_without_a_tensor(recipe: str) -> None:
    chain = build_connector(recipe, SPEC, 6)
    with pytest.raises(TokenShapeError, match="was built for tokens of width 8, got width 9; build it from"):
        chain.out_spec(TokenSpec(16, 9, (4, 4)))
    with pytest.raises(TokenShapeError, match="was built for tokens of width 8, got width 9; build it from"):
        chain(VisualTokens(torch.zeros(1, 16, 9), (4, 4)))


def test_a_chain_takes_links_and_joins_chains() -> None:
    inner = Chain(PixelShuffle(2), MLP(32, 6))
    outer = Chain(inner, Linear(6, 4))
    assert [link.name for link in outer.connectors] == ["pixel_shuffle", "mlp", "linear"]
    assert set(outer.state_dict()) == {
        *(f"links.1.layers.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")),
        "links.2.proj.weight",
        "links.2.proj.bias",
    }
    with pytest.raises(VlmError, match="a chain needs at least one connector"):
        Chain()
    with pytest.raises(VlmError, match="a chain has no options of its own"):
        Chain.build(SPEC, 6)


@pytest.mark.parametrize(
    ("recipe", "written"),
    [
        ("mlp", "mlp"),
        ("mlp:depth=2,dim=6", "mlp"),
        ("mlp:dim=7,depth=3+linear:bias=false", "mlp:depth=3,dim=7+linear:bias=false"),
        ("avg_pool:factor=6+linear", "avg_pool:factor=6+linear"),
        ("avg_pool:grid=2x3+linear", "avg_pool:grid=2x3+linear"),
        ("pixel_shuffle:factor=2+mlp", "pixel_shuffle+mlp"),
        (
            "qformer:layers=1,dim=12,ffn=4,dropout=0.25+mlp",
            "qformer:dim=12,layers=1,ffn=4,dropout=0.25+mlp",
        ),
    ],
)
def test_a_chain_is_written_as_the_shortest_recipe(recipe: str, written: str) -> None:
    spec = TokenSpec(36, 8, (6, 6))
    assert recipe_of(build_connector(recipe, spec, 6), 6) == written


def test_an_exponent_does_not_read_as_a_link() -> None:
    class Scaled(Linear):
        name = "scaled"

        @classmethod
        def build(cls, in_spec: TokenSpec, out_dim: int, *, scale: float = 1.0) -> "Scaled":  # type: ignore[override]
            return cls(in_spec.dim, out_dim)

        def options(self) -> dict[str, float]:  # type: ignore[override]
            return {"scale": 1e20}

    assert recipe_of(Scaled(8, 6), 6) == "scaled:scale=1e20"
    assert list(connector_options(Scaled)) == ["scale"]


def draw_recipe(random_state: random.Random, out_dim: int) -> str:
    """Draw links of every kind in any order; about half of the recipes fit together."""
    pick = random_state.choice
    kinds = [
        lambda: f"avg_pool:factor={pick([1, 2, 3])}",
        lambda: f"avg_pool:grid={pick([1, 2, 3])}x{pick([1, 2, 4])}",
        lambda: f"pixel_shuffle:factor={pick([1, 2, 3])}",
        lambda: "pixel_shuffle",
        lambda: "keep_prefix",
        lambda: f"linear:dim={pick([2, 5, out_dim])},bias={pick(['true', 'false'])}",
        lambda: f"mlp:depth={pick([1, 2, 3])},activation={pick(['gelu', 'silu'])},dim={pick([3, out_dim])}",
        lambda: f"perceiver:queries={pick([1, 4])},depth=1,heads=4,head_dim=2,kv_heads={pick([1, 2, 4])}",
        lambda: f"qformer:queries={pick([1, 3])},dim=4,layers={pick([1, 2])},heads={pick([1, 2])},ffn=6",
    ]
    links = [pick(kinds)() for _ in range(random_state.randrange(3))]
    return "+".join([*links, pick(["mlp", "linear", "linear:bias=false"])])


def test_what_a_drawn_recipe_states_is_what_it_gives() -> None:
    random_state = random.Random(0)
    built = refused = 0
    while built < 300:
        grid = random_state.choice([None, (random_state.randint(1, 7), random_state.randint(1, 7))])
        number = random_state.randint(1, 12) if grid is None else grid[0] * grid[1]
        spec = TokenSpec(number, random_state.choice([2, 6]), grid, random_state.choice([0, 1, 5]))
        out_dim = random_state.choice([2, 3, 8])
        recipe = draw_recipe(random_state, out_dim)
        try:
            chain = build_connector(recipe, spec, out_dim)
        except VlmError:
            refused += 1
            continue
        built += 1
        prefix = torch.randn(2, spec.num_prefix, spec.dim) if spec.num_prefix else None
        with torch.no_grad():
            out = chain(VisualTokens(torch.randn(2, number, spec.dim), grid, prefix))
        assert out.spec == chain.out_spec(spec), recipe
        assert out.tokens.shape == (2, out.spec.num_tokens, out_dim), recipe
        written = recipe_of(chain, out_dim)
        again = build_connector(written, spec, out_dim)
        assert repr(again) == repr(chain), (recipe, written)
        assert [link.options() for link in again.connectors] == [link.options() for link in chain.connectors], recipe
        assert recipe_of(again, out_dim) == written
    assert refused > 50


def test_recipes_reach_every_option_of_every_connector() -> None:
    for name in ("avg_pool", "keep_prefix", "linear", "mlp", "perceiver", "pixel_shuffle", "qformer"):
        cls: type[Connector] = CONNECTORS.get(name)
        options = dict.fromkeys(connector_options(cls))
        with torch.device("meta"):
            link = cls.build(SPEC, 6, **({"factor": 2} if name == "avg_pool" else {}))
        assert set(link.options()) <= set(options), name


def test_unknown_names_are_key_errors_that_read_as_a_sentence() -> None:
    with pytest.raises(KeyError) as caught:
        build_connector("mpl", SPEC, 6)
    assert isinstance(caught.value, UnknownNameError)
    assert str(caught.value) == "no connector 'mpl'; did you mean mlp?"
