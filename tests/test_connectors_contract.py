"""The contract over every registered connector, and broken ones that it must catch."""

from collections.abc import Callable
from typing import Any, Self, cast

import pytest
import torch
from torch import Tensor, nn

from connectors import (
    Chain,
    Connector,
    Linear,
    Numbers,
    PackedTokens,
    TokenShapeError,
    TokenSpec,
    VisualTokens,
    VlmError,
    build_connector,
    list_connectors,
)
from connectors.base import CONNECTORS, Option
from connectors.init import Draw
from connectors.testing import check_connector

SQUARE = TokenSpec(16, 8, (4, 4))
OBLONG = TokenSpec(24, 8, (4, 6))
TALL_WITH_CLS = TokenSpec(12, 8, (6, 2), num_prefix=1)
WITH_REGISTERS = TokenSpec(16, 8, (2, 8), num_prefix=5)
QUERIES = TokenSpec(7, 8)
SPECS = [SQUARE, OBLONG, TALL_WITH_CLS, WITH_REGISTERS, QUERIES]

OPTIONS: dict[str, list[dict[str, Option]]] = {
    "avg_pool": [
        {"factor": 2},
        {"factor": 1},
        {"grid": (2, 1)},
        {"grid": (2, 2)},
        *({"factor": 3, "on_odd": way} for way in ("pad", "crop", "resize")),
    ],
    "c_abstractor": [
        {"grid": (2, 2), "hidden": 8, "depth": 1},
        {"grid": (2, 3), "hidden": 4, "depth": 2, "mlp_depth": 1},
        {"grid": (3, 1), "depth": 0, "eos": 2},
    ],
    "conv": [{}, {"kernel": 1, "stride": 1, "bias": True}, {"kernel": 2, "padding": 0, "dim": 5}],
    "flamingo": [
        {"queries": 5, "depth": 2, "heads": 3, "head_dim": 4},
        {"queries": 1, "depth": 1, "heads": 2, "head_dim": 6, "activation": "relu", "ffn": 7, "qk_norm": True},
    ],
    "gated_mlp": [{}, {"hidden": 7, "bias": True}, {"norm": "rms", "activation": "gelu", "dim": 5}],
    "instruct_qformer": [
        {"queries": 5, "dim": 12, "layers": 3, "heads": 3, "ffn": 24, "vocab": 103, "positions": 4},
        {"queries": 1, "dim": 6, "layers": 2, "heads": 1, "ffn": 4, "cross_every": 1, "vocab": 110, "positions": 2},
    ],
    "ldp": [{}, {"dim": 16}],
    "ldp_v2": [{"grid": (2, 2)}, {"grid": (3, 4), "dim": 5}],
    "linear": [{}, {"bias": False}, {"dim": 3}],
    "matryoshka": [
        {"levels": Numbers((1, 2))},
        {"levels": Numbers(2)},
        *({"levels": Numbers((3, 1)), "on_odd": way} for way in ("pad", "crop")),
    ],
    "max_pool": [{"factor": 2}, {"grid": (2, 1)}, *({"factor": 3, "on_odd": way} for way in ("pad", "crop", "resize"))],
    "mlp": [
        {},
        {"depth": 1},
        {"depth": 3, "activation": "quick_gelu", "hidden": 12},
        {"activation": "relu", "norm": "layer", "bias": False, "dim": 5},
    ],
    "norm": [{}, {"kind": "rms"}, {"kind": "gemma", "eps": 1e-5}],
    "patch_merger": [
        {},
        {"factor": 1, "norm": "rms"},
        {"norm_after": True},
        *({"factor": 3, "on_odd": way} for way in ("pad", "crop", "resize")),
    ],
    "perceiver": [{"queries": 5, "depth": 2, "heads": 4, "head_dim": 6, "kv_heads": kv} for kv in (1, 2, 4)],
    "pixel_shuffle": [{}, {"transposed": True}, *({"factor": 3, "on_odd": way} for way in ("pad", "crop", "resize"))],
    "pooled_projector": [{"grid": (2, 2)}, {"grid": (2, 1), "eps": 1e-5, "dim": 5}],
    "position": [{}, {"grid": (3, 5)}],
    "qformer": [
        {"queries": 5, "dim": 12, "layers": 3, "heads": 3, "ffn": 24},
        {"queries": 1, "dim": 6, "layers": 2, "heads": 1, "ffn": 4, "cross_every": 1},
    ],
    "residual": [{"inner": "norm+mlp"}, {"inner": "conv:stride=1"}, {"inner": "residual(linear)"}],
    "resize": [{"factor": 2}, {"grid": (5, 2)}, {"grid": (2, 2), "mode": "bicubic"}, {"factor": 3, "mode": "area"}],
    "sva": [
        {"hidden": 8, "heads": 2, "depth": 1},
        {"widths": Numbers((4, 1)), "folds": Numbers((1, 2)), "hidden": 6, "heads": 3, "depth": 2, "groups": 2},
    ],
    "token_packer": [
        {"hidden": 8, "heads": 2},
        {"levels": 2, "hidden": 6, "dim": 5},
        *({"factor": 3, "hidden": 4, "on_odd": way} for way in ("pad", "crop", "resize")),
    ],
    "tome": [{"tokens": 5}, {"tokens": 1}],
}
CASES = [(name, options) for name in list_connectors() for options in OPTIONS.get(name, [{}])]


def build(name: str, options: dict[str, Option], spec: TokenSpec) -> Connector:
    given: dict[str, Any] = dict(options)
    if "inner" in given:
        given["inner"] = build_connector(str(options["inner"]), spec, spec.dim)
    return CONNECTORS.get(name).build(spec, 10, **given)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_every_registered_connector_keeps_the_contract(name: str, options: dict[str, Option]) -> None:
    checked = 0
    for spec in SPECS:
        try:
            connector = build(name, options, spec)
            connector.out_spec(spec)
        except TokenShapeError:
            continue
        check_connector(connector, spec)
        checked += 1
    assert checked >= 2


def test_every_registered_connector_has_options_here() -> None:
    assert OPTIONS.keys() | {"keep_prefix"} == set(list_connectors())


@pytest.mark.parametrize(
    "recipe",
    [
        "pixel_shuffle+mlp",
        "avg_pool:factor=2+keep_prefix+mlp",
        "mlp+perceiver:queries=3,depth=1,heads=2,head_dim=4,kv_heads=1",
        "keep_prefix+qformer:queries=3,dim=6,layers=2,heads=2,ffn=8+linear",
    ],
)
def test_chains_keep_the_contract(recipe: str) -> None:
    check_connector(build_connector(recipe, WITH_REGISTERS, 10), WITH_REGISTERS)


def test_connectors_that_keep_the_width_hand_the_prefix_on() -> None:
    keep = {"avg_pool", "flamingo", "matryoshka", "max_pool", "norm", "perceiver", "position", "residual"}
    for name, options in CASES:
        if name == "keep_prefix":
            continue
        spec = TokenSpec(36, 8, (6, 6), num_prefix=5)
        out = build(name, options, spec).out_spec(spec)
        assert out.num_prefix == (spec.num_prefix if name in keep | {"resize", "tome"} else 0), name


def test_the_checked_connector_itself_is_left_alone() -> None:
    connector = Linear(8, 10).to(torch.bfloat16).train()
    before = connector.proj.weight.clone()
    check_connector(connector, SQUARE)
    assert connector.training
    assert connector.proj.weight.dtype == torch.bfloat16
    assert connector.proj.weight.grad is None
    assert torch.equal(connector.proj.weight, before)


class Sound(Connector):
    """A plugin that keeps the contract; each class below breaks one clause of it."""

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, 4)

    def change(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.proj(tokens)
        return out

    def forward(self, visual: VisualTokens) -> VisualTokens:
        return VisualTokens(self.change(visual.tokens), visual.grid)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        self.require_dim(spec, self.proj.in_features)
        return TokenSpec(spec.num_tokens, 4, spec.grid)

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int) -> Self:
        return cls(in_spec.dim)

    def options(self) -> dict[str, Option]:
        return {}


class LosesTheGrid(Sound):
    def forward(self, visual: VisualTokens) -> VisualTokens:
        return VisualTokens(self.change(visual.tokens))


class TakesAnyWidth(Sound):
    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        return TokenSpec(spec.num_tokens, 4, spec.grid)


class GivesFloat(Sound):
    def change(self, tokens: Tensor) -> Tensor:
        return super().change(tokens).float()


class DropsAView(Sound):
    def change(self, tokens: Tensor) -> Tensor:
        return super().change(tokens)[:1]


class GivesNan(Sound):
    def change(self, tokens: Tensor) -> Tensor:
        return super().change(tokens).sqrt()


class WritesItsInput(Sound):
    def change(self, tokens: Tensor) -> Tensor:
        return super().change(tokens.detach().mul_(2))


class MixesViews(Sound):
    def change(self, tokens: Tensor) -> Tensor:
        return super().change(tokens - tokens.mean(0, keepdim=True))


class MixesViewsInTraining(Sound):
    def change(self, tokens: Tensor) -> Tensor:
        return super().change(tokens - tokens.mean(0, keepdim=True) if self.training else tokens)


class IsRandom(Sound):
    def change(self, tokens: Tensor) -> Tensor:
        return super().change(nn.functional.dropout(tokens, 0.5))


class DetachesTokens(Sound):
    def change(self, tokens: Tensor) -> Tensor:
        return super().change(tokens.detach())


class TracksNoGradient(Sound):
    def change(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return super().change(tokens)


class HasAnUnusedPart(Sound):
    def __init__(self, in_dim: int) -> None:
        super().__init__(in_dim)
        self.unused = nn.Linear(2, 2)


class HidesState(Sound):
    def __init__(self, in_dim: int) -> None:
        super().__init__(in_dim)
        self.register_buffer("noise", torch.randn(4), persistent=False)

    def change(self, tokens: Tensor) -> Tensor:
        return super().change(tokens) + self.get_buffer("noise")


class HidesAnOption(Sound):
    def options(self) -> dict[str, Option]:
        return {"width": 4}


class OverflowsInHalf(Sound):
    def change(self, tokens: Tensor) -> Tensor:
        return super().change(tokens * tokens)


class ForgetsAParameter(Sound):
    def __init__(self, in_dim: int) -> None:
        super().__init__(in_dim)
        self.scale = nn.Parameter(torch.ones(4))

    def change(self, tokens: Tensor) -> Tensor:
        return super().change(tokens) * self.scale


class DrawsFromTheGlobalSeed(Sound):
    def init_weights(self, draw: Draw) -> None:
        draw.modules(self)
        nn.init.normal_(self.proj.weight)


class MovesTheGlobalGenerator(Sound):
    def init_weights(self, draw: Draw) -> None:
        torch.rand(1)
        draw.modules(self)


class IgnoresItsSeed(Sound):
    def init_weights(self, draw: Draw) -> None:
        Draw(0).modules(self)


class GivesGradientsWithoutEnd(Sound):
    def change(self, tokens: Tensor) -> Tensor:
        out = super().change(tokens)
        return out + torch.where(out.isfinite(), 0.0, self.proj.bias.sum() / 0)


class PacksWrongly(Sound):
    def forward_packed(self, packed: Any) -> Any:
        return type(packed)(self.proj(packed.tokens.flip(0)), packed.grids)


class HandsThePrefixOn(Sound):
    def __init__(self, in_dim: int) -> None:
        super().__init__(in_dim)
        self.proj = nn.Linear(in_dim, in_dim)

    def forward(self, visual: VisualTokens) -> VisualTokens:
        return VisualTokens(self.change(visual.tokens), visual.grid, visual.prefix)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        self.require_dim(spec, self.proj.in_features)
        return spec


class PacksThePrefixAway(HandsThePrefixOn):
    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        return packed.with_tokens(self.change(packed.tokens))


class PacksThePrefixOfOthers(HandsThePrefixOn):
    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        prefix = None if packed.prefix is None else packed.prefix.flip(0)
        return packed.with_tokens(self.change(packed.tokens), prefix)


BROKEN: list[tuple[Callable[[int], Connector], str]] = [
    (LosesTheGrid, "out_spec states what forward gives"),
    (TakesAnyWidth, "forward takes what out_spec takes"),
    (GivesFloat, "the dtype is kept"),
    (DropsAView, "views stay apart"),
    (GivesNan, "numbers are finite"),
    (WritesItsInput, "the input is left unchanged"),
    (MixesViews, "each view counts alone"),
    (MixesViewsInTraining, "in training"),
    (IsRandom, "eval is deterministic"),
    (DetachesTokens, "gradients reach the tokens"),
    (TracksNoGradient, "gradients reach the tokens"),
    (HasAnUnusedPart, "'unused.weight' got none"),
    (HidesState, "the rebuilt one gives other numbers"),
    (HidesAnOption, "unexpected keyword argument 'width'"),
    (OverflowsInHalf, "fp16 tokens around 1000 gave NaN or infinity"),
    (ForgetsAParameter, "'scale' is not drawn; write init_weights"),
    (DrawsFromTheGlobalSeed, "'proj.weight' differs between two draws of one seed"),
    (MovesTheGlobalGenerator, "the global generator was used"),
    (IgnoresItsSeed, "another seed gives the same weights"),
    (GivesGradientsWithoutEnd, "one that is not finite"),
    (PacksWrongly, "packed equals one at a time"),
    (PacksThePrefixAway, "packed equals one at a time"),
    (PacksThePrefixOfOthers, "packed equals one at a time': outputs differ"),
]


def test_what_is_checked_is_a_connector_that_is_built() -> None:
    for wrong, what in ((None, "NoneType"), (Sound, "Sound"), (nn.Linear(2, 2), "Linear")):
        with pytest.raises(VlmError, match=f"takes a connector that is built, got {what}; build it for the spec first"):
            check_connector(cast("Any", wrong), OBLONG)


def test_the_links_of_a_broken_chain_are_named() -> None:
    with pytest.raises(VlmError, match=r"^'TakesAnyWidth\+Sound' breaks .*another width by self.require_dim"):
        check_connector(Chain(TakesAnyWidth(8), Sound(4)), OBLONG)


def test_a_sound_plugin_passes() -> None:
    check_connector(Sound(8), OBLONG)
    check_connector(Chain(Sound(8), Sound(4)), OBLONG)
    check_connector(HandsThePrefixOn(8), OBLONG)


@pytest.mark.parametrize(("make", "clause"), BROKEN, ids=[clause for _, clause in BROKEN])
def test_a_broken_clause_is_named(make: Callable[[int], Connector], clause: str) -> None:
    with pytest.raises(VlmError, match="breaks the clause") as caught:
        check_connector(make(8), OBLONG)
    assert clause in str(caught.value)
