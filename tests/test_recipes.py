"""Recipes: read, built, written again, and refused with a sentence."""

import itertools
import random
from typing import Any, cast

import pytest
import torch

from connectors import (
    MLP,
    Chain,
    Connector,
    Linear,
    Numbers,
    PixelShuffle,
    Residual,
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
    assert parse_recipe("matryoshka:levels=1/2/24,on_odd=pad") == [
        ("matryoshka", {"levels": Numbers((1, 2, 24)), "on_odd": "pad"})
    ]
    assert str(Numbers((1, 2, 24))) == "1/2/24"
    assert str(Numbers(2)) == "2"


def test_a_recipe_in_parentheses_is_read_with_its_link() -> None:
    assert parse_recipe(" residual( norm:kind=rms + mlp ) + linear") == [
        ("residual", {"inner": " norm:kind=rms + mlp "}),
        ("linear", {}),
    ]
    assert parse_recipe("residual:(residual(norm)+residual(mlp))") == [
        ("residual", {"inner": "residual(norm)+residual(mlp)"})
    ]


@pytest.mark.parametrize(
    ("recipe", "written", "width"),
    [
        ("residual(norm+mlp)+linear", "residual(norm+mlp:dim=8)+linear", 8),
        (
            "residual(residual(norm:kind=rms)+gated_mlp:hidden=3)+mlp",
            "residual(residual(norm:kind=rms)+gated_mlp:hidden=3,dim=8)+mlp",
            8,
        ),
        ("linear:dim=5+residual(linear:bias=false)+mlp", "linear:dim=5+residual(linear:bias=false,dim=5)+mlp", 5),
    ],
)
def test_a_chain_in_a_link_is_as_wide_as_the_tokens_and_written_so(recipe: str, written: str, width: int) -> None:
    chain = build_connector(recipe, SPEC, 6)
    assert recipe_of(chain, 6) == written
    again = build_connector(written, SPEC, 6)
    assert recipe_of(again, 6) == written
    assert repr(again) == repr(chain)
    again.load_state_dict(chain.state_dict())
    residual = next(link for link in chain.connectors if isinstance(link, Residual))
    assert residual.inner.out_spec(TokenSpec(16, width, (4, 4))).dim == width


def test_links_in_parentheses_start_from_numbers_of_their_own() -> None:
    chain = build_connector("residual(linear+linear)+residual(linear)+linear:dim=8", SPEC, 8)
    weights = [tensor for name, tensor in chain.state_dict().items() if name.endswith("weight")]
    assert len(weights) == 4
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(weights, 2))
    torch.manual_seed(9)
    again = build_connector("residual(linear+linear)+residual(linear)+linear:dim=8", SPEC, 8)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in chain.state_dict().items())


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("", "the connector recipe is empty"),
        ("mlp:depth", "'depth' in recipe 'mlp:depth' is not option=value; 'mlp' has the options depth, activation"),
        ("mlp:=3", "is not option=value"),
        ("mlp:depth=2,depth=3", "option 'depth' stands twice in 'mlp:depth=2,depth=3'; keep one"),
        ("mlp2x_gelu", "no connector 'mlp2x_gelu'; did you mean mlp[?]"),
        ("pixelshuffle+mlp", "no connector 'pixelshuffle'; did you mean pixel_shuffle[?]"),
        ("mlp+", "a link in recipe 'mlp.' has no name; write for example mlp, or residual"),
        ("residual((norm))+mlp", "a link in recipe '.norm.' has no name"),
        ("mlp:hidden=9999999999999999999", "'mlp' cannot be built with .'hidden': 9999999999999999999. for width 8"),
        ("mlp+" * 300 + "mlp", "the connector recipe has 1203 characters; write at most 1000"),
        ("mlp:dept=2", "connector 'mlp' has no option 'dept'; did you mean depth[?]"),
        ("mlp:zzz=2", "connector 'mlp' has no option 'zzz'; known are activation, bias, depth, dim, hidden, norm"),
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
        ("avg_pool:factor=2.0+mlp", "'avg_pool' has factor=2.0; give a whole number"),
        ("avg_pool:grid=4+mlp", "'avg_pool' has grid=4; give a grid such as 8x8"),
        ("avg_pool:grid=0x2+mlp", "'avg_pool' has rows=0; give a whole number of at least 1"),
        ("avg_pool:grid=ab+mlp", "'avg_pool' has grid=ab; give a grid such as 8x8"),
        ("avg_pool:grid=5x4+mlp", "avg_pool:grid=5x4 is finer than the 4x4 grid that comes in; use at most 4x4"),
        ("avg_pool:factor=3+mlp", "4x4 grid does not divide into 3x3 blocks; on_odd=pad gives 2x2 = 4 tokens, "),
        ("pixel_shuffle:factor=3+mlp", "into 3x3 blocks; .*, on_odd=crop gives 1x1 = 1 token, on_odd=resize gives 1x1"),
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
        ("matryoshka:levels=2x2+mlp", "'matryoshka' has levels=2x2; give whole numbers such as 1/2/4"),
        ("matryoshka:levels=1.5+mlp", "'matryoshka' has levels=1.5; give whole numbers such as 1/2/4"),
        ("matryoshka:levels=1/+mlp", "'matryoshka' has levels=1/; give whole numbers such as 1/2/4"),
        ("matryoshka:levels=true+mlp", "'matryoshka' has levels=true; give whole numbers such as 1/2/4"),
        ("matryoshka:levels=1/0+mlp", "'matryoshka' has levels=0; give a whole number of at least 1"),
        ("mlp:hidden=1/2", "'mlp' has hidden=1/2; give a whole number"),
        ("mlp:hidden=16,depth=1", "'mlp' has depth=1, so no hidden layer of width 16; leave hidden out, or use depth"),
        ("avg_pool:grid=2/2+mlp", "'avg_pool' has grid=2/2; give a grid such as 8x8"),
        ("norm:eps=small+mlp", "'norm' has eps=small; give a number"),
        ("norm:eps=true+mlp", "'norm' has eps=true; give a number"),
        ("norm:eps=0+mlp", "'norm' has eps=0; give a small positive number such as 1e-6"),
        ("norm:kind=gem+mlp", "'norm' has no norm 'gem'; did you mean gemma"),
        ("tome:tokens=17+mlp", "'tome' merges to 17 tokens, only 16 come in; use at most tokens=16, or a larger"),
        ("residual+mlp", "'residual' in recipe 'residual.mlp' wraps a recipe: write residual.mlp."),
        ("residual:inner=norm(mlp)", "'residual' takes its recipe in parentheses: write residual.norm."),
        ("mlp(norm)", "'mlp' in recipe 'mlp.norm.' wraps nothing: leave the parentheses out"),
        ("residual()+mlp", "the connector recipe is empty"),
        ("residual(norm)mlp", "'residual.norm.mlp' goes on behind its parentheses; join links by ."),
        (
            "residual(norm",
            "the parentheses in recipe 'residual.norm' do not match; write for example residual.norm.mlp",
        ),
        ("residual(norm))+mlp", "the parentheses in recipe 'residual.norm...mlp' do not match"),
        ("linear)+(mlp", "the parentheses in recipe 'linear...mlp' do not match"),
        ("residual(liner)+mlp", "no connector 'liner'; did you mean linear[?]"),
        ("residual(norm:kind=1)+mlp", "'norm' has kind=1; give a word"),
        ("residual:depth=2(norm)+mlp", "connector 'residual' has no option 'depth'; it takes none"),
        ("residual(linear:dim=4)+mlp", "'residual' adds what its chain gives, 16 tokens on 4x4 of width 4, to what"),
        ("residual(keep_prefix)+mlp", "'residual' adds what its chain gives, 17 tokens without grid of width 8, to"),
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
        lambda: f"gated_mlp:hidden={pick([2, 7])},norm={pick(['none', 'rms'])},dim={pick([3, out_dim])}",
        lambda: f"norm:kind={pick(['layer', 'rms', 'gemma'])}",
        lambda: f"residual(norm+mlp:depth={pick([1, 2])})",
        lambda: f"matryoshka:levels={pick(['1/2', '2', '3/1'])},on_odd={pick(['error', 'pad', 'crop', 'resize'])}",
        lambda: f"tome:tokens={pick([1, 4])}",
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
    names = ("keep_prefix", "linear", "mlp", "gated_mlp", "norm", "matryoshka", "tome", "perceiver", "qformer")
    for name in ("avg_pool", "pixel_shuffle", *names):
        cls: type[Connector] = CONNECTORS.get(name)
        options = dict.fromkeys(connector_options(cls))
        with torch.device("meta"):
            link = cls.build(SPEC, 6, **({"factor": 2} if name == "avg_pool" else {}))
        assert set(link.options()) <= set(options), name


def test_unknown_names_are_key_errors_that_read_as_a_sentence() -> None:
    with pytest.raises(KeyError) as caught:
        build_connector("liner", SPEC, 6)
    assert isinstance(caught.value, UnknownNameError)
    assert str(caught.value) == "no connector 'liner'; did you mean linear?"


def test_weights_are_drawn_once_and_only_where_a_seed_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(Linear, "init_weights", lambda _, draw: drawn.append(f"linear {draw.generator.initial_seed()}"))
    build_connector("norm+linear:dim=4+linear", SPEC, 6, seed=3)
    assert drawn == ["linear 1000006", "linear 2000009"]
    drawn.clear()
    build_connector("linear", SPEC, 6, seed=None)
    assert drawn == []
    Linear(8, 6)
    assert drawn == ["linear 0"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((None, SPEC, 6), "a connector recipe is a text, got NoneType; write for example mlp"),
        (("mlp", 1024, 6), "in_spec is the encoder's TokenSpec.num_tokens, dim, grid., got 1024"),
        (("mlp", SPEC, "6"), "out_dim is the width of the LLM as a whole number, got '6'"),
    ],
)
def test_arguments_of_another_kind_are_refused(arguments: tuple[Any, Any, Any], sentence: str) -> None:
    with pytest.raises(VlmError, match=sentence):
        build_connector(*arguments)
    with pytest.raises(VlmError, match=r"seed=1\.5 draws no weights; give a whole number below"):
        build_connector("mlp", SPEC, 6, seed=cast("Any", 1.5))


def test_a_chain_drawn_again_has_the_weights_of_its_seed() -> None:
    chain = build_connector("norm+mlp+linear", SPEC, 6, seed=5)
    chain.reset_parameters(3)
    expected = build_connector("norm+mlp+linear", SPEC, 6, seed=3).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in chain.state_dict().items())


def test_a_link_that_is_wrapped_in_place_still_counts() -> None:
    chain = build_connector("norm+mlp:dim=8+linear", SPEC, 6)
    visual = VisualTokens(torch.randn(2, 16, 8), (4, 4))
    expected = chain(visual).tokens
    for index, link in enumerate(chain.links):
        chain.links[index] = torch.compile(link, backend="eager")
    assert len(chain.connectors) == 3
    assert torch.equal(chain(visual).tokens, expected)


def test_a_chain_says_what_it_takes() -> None:
    chain = build_connector("mlp", SPEC, 6)
    with pytest.raises(VlmError, match=r"a chain takes VisualTokens\(tokens, grid\), got Tensor; wrap the tokens"):
        chain(torch.zeros(1, 16, 8))
    with pytest.raises(VlmError, match=r"forward_packed takes PackedTokens\(tokens, grids\), got Tensor"):
        chain.forward_packed(cast("Any", torch.zeros(16, 8)))
    with pytest.raises(VlmError, match="a chain is made of connectors, got Linear; subclass Connector for it"):
        Chain(cast("Any", torch.nn.Linear(8, 6)))


def test_an_instruction_reaches_a_resampler_in_a_wrapper() -> None:
    inner = "instruct_qformer:queries=16,dim=8,layers=1,heads=2,ffn=8,vocab=103,positions=4"
    chain = build_connector(
        f"keep_prefix+instruct_qformer:queries=16,dim=8,layers=1,heads=2,ffn=8,vocab=103,positions=4+residual({inner})+linear",
        SPEC,
        6,
    )
    assert chain.extra_inputs == ("instruction", "instruction_mask")
    visual = VisualTokens(torch.randn(2, 16, 8), (4, 4), torch.randn(2, 1, 8))
    heard = []
    wrapped = cast("Any", chain.connectors[2]).inner.connectors[0]
    wrapped.register_forward_pre_hook(lambda _, __, kwargs: heard.append(kwargs.get("instruction")), with_kwargs=True)
    ids = torch.tensor([[5, 6, 7]] * 2)
    chain(visual, instruction=ids)
    assert heard[0] is ids


def test_every_level_of_a_matryoshka_is_checked_when_it_is_built() -> None:
    with pytest.raises(TokenShapeError, match="a 27x27 grid does not divide into 2x2 blocks; on_odd=pad gives 14x14"):
        build_connector("mlp+matryoshka", TokenSpec(729, 8, (27, 27)), 6)
