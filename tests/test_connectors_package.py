"""The package itself: ours, light to import, on the meta device, in one graph, packed."""

import copy
import pkgutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import connectors
from connectors import (
    KeepPrefix,
    PackedTokens,
    PerceiverResampler,
    TokenShapeError,
    TokenSpec,
    VisualTokens,
    build_connector,
    list_connectors,
)
from vlm_encoders.report.connector_examples import connector_example

SPEC = TokenSpec(16, 8, (4, 4), num_prefix=1)
RECIPES = [
    "linear",
    "mlp:depth=3",
    "avg_pool:factor=2+keep_prefix+mlp",
    "avg_pool:grid=3x3+mlp",
    "pixel_shuffle+mlp",
    "mlp+perceiver:queries=3,depth=2,heads=4,head_dim=4,kv_heads=2",
    "qformer:queries=3,dim=6,layers=2,heads=2,ffn=8+linear",
]


def test_the_imported_package_is_ours() -> None:
    assert connectors.__file__ is not None
    folder = Path(connectors.__file__).parent
    assert folder == Path(__file__).parents[1] / "connectors", (
        f"another distribution named 'connectors' is imported from {folder}; uninstall it"
    )


def test_every_public_name_is_there() -> None:
    assert dir(connectors) == sorted(connectors.__all__)
    for name in connectors.__all__:
        assert getattr(connectors, name) is not None
    with pytest.raises(AttributeError, match="module 'connectors' has no attribute 'nothing'"):
        _ = connectors.nothing


@pytest.mark.parametrize("module", ["connectors", "connectors.tokens", "connectors.registry", "connectors.errors"])
def test_the_light_modules_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_connectors_import_torch_alone() -> None:
    heavy = "{'transformers', 'timm', 'open_clip', 'accelerate', 'peft', 'torchvision', 'vlm_encoders'}"
    modules = ", ".join(module for _, module, _ in pkgutil.walk_packages(connectors.__path__, "connectors."))
    assert "connectors.sva" in modules
    assert "connectors.released.load" in modules
    code = f"import sys, {modules}; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_build_and_run_without_memory(recipe: str) -> None:
    real = build_connector(recipe, SPEC, 10)
    with torch.device("meta"):
        meta = build_connector(recipe, SPEC, 10)
    shapes = {name: parameter.shape for name, parameter in real.named_parameters()}
    assert {name: parameter.shape for name, parameter in meta.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in meta.parameters())
    out = meta(VisualTokens(torch.empty(2, 16, 8, device="meta"), (4, 4), torch.empty(2, 1, 8, device="meta")))
    assert out.spec == real.out_spec(SPEC)


def small(name: str) -> tuple[str, TokenSpec]:
    example = connector_example(name)
    return f"{example.small}+linear", example.small_tokens


def tokens_for(spec: TokenSpec, dtype: torch.dtype = torch.float32) -> VisualTokens:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, spec.num_tokens, spec.dim, generator=generator).to(dtype)
    prefix = torch.randn(2, spec.num_prefix, spec.dim, generator=generator).to(dtype) if spec.num_prefix else None
    return VisualTokens(tokens, spec.grid, prefix)


@pytest.mark.parametrize("name", list_connectors())
def test_every_connector_compiles_to_one_graph(name: str) -> None:
    recipe, spec = small(name)
    chain, visual = build_connector(recipe, spec, 10).eval(), tokens_for(spec)
    torch._dynamo.reset()
    compiled = torch.compile(chain, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(visual).tokens, chain(visual).tokens)


@pytest.mark.parametrize("name", list_connectors())
def test_every_connector_is_exported(name: str) -> None:
    recipe, spec = small(name)
    chain, visual = build_connector(recipe, spec, 10).eval(), tokens_for(spec)
    exported = torch.export.export(chain, (visual,)).module()
    again = tokens_for(spec)
    with torch.no_grad():
        out, wanted = exported(again), chain(again)
    assert out.spec == wanted.spec == chain.out_spec(spec)
    assert torch.equal(out.tokens, wanted.tokens)


@pytest.mark.parametrize("name", list_connectors())
def test_every_connector_starts_from_a_seed_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # build_connector sets the global generator back behind a plugin; ours do not need it.
    monkeypatch.setattr(torch.random, "fork_rng", lambda **_: nullcontext())
    recipe, spec = small(name)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(build_connector(recipe, spec, 10, seed=3).state_dict())
        assert torch.equal(torch.get_rng_state(), before), "building drew from the global generator"
    other = build_connector(recipe, spec, 10, seed=4).state_dict()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert not all(torch.equal(found[0][key], other[key]) for key in other)


class Watch(TorchDispatchMode):
    """Notes which operations see a tensor of half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.halved: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(each, torch.Tensor) and each.dtype in {torch.bfloat16, torch.float16} for each in args):
            self.halved.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# Fused norms and attention kernels take half precision and work in fp32 inside; these are what a norm or a
# softmax written out is made of.
IN_FP32 = {"_softmax", "_log_softmax", "exp", "rsqrt", "sqrt", "pow", "var", "var_mean", "std", "linalg_vector_norm"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list_connectors())
def test_norms_and_softmax_are_taken_in_fp32(name: str, dtype: torch.dtype) -> None:
    recipe, spec = small(name)
    half = build_connector(recipe, spec, 10).to(dtype).eval()
    wide = copy.deepcopy(half).float()
    visual = tokens_for(spec, dtype)
    prefix = None if visual.prefix is None else visual.prefix.float()
    with torch.no_grad():
        with Watch() as watch:
            found = half(visual).tokens
        wanted = wide(VisualTokens(visual.tokens.float(), visual.grid, prefix)).tokens
    assert not watch.halved & IN_FP32
    assert found.dtype == dtype
    # A dozen roundings of 2**-9 or 2**-12 of a value each.
    assert (found.float() - wanted).norm() < 12 * torch.finfo(dtype).eps / 2 * wanted.norm()


def test_a_norm_in_half_precision_would_be_seen() -> None:
    with Watch() as watch:
        torch.randn(4, dtype=torch.bfloat16).pow(2).mean().rsqrt()
    assert {"pow", "rsqrt"} <= watch.halved & IN_FP32


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_chain_compiles_to_one_graph(recipe: str) -> None:
    chain = build_connector(recipe, SPEC, 10).eval()
    visual = VisualTokens(torch.randn(2, 16, 8), (4, 4), torch.randn(2, 1, 8))
    compiled = torch.compile(chain, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(visual).tokens, chain(visual).tokens)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_batch_without_an_image_passes(recipe: str) -> None:
    chain = build_connector(recipe, SPEC, 10)
    out = chain(VisualTokens(torch.zeros(0, 16, 8), (4, 4), torch.zeros(0, 1, 8)))
    assert out.tokens.shape == (0, chain.out_spec(SPEC).num_tokens, 10)


def test_a_chain_maps_packed_images_of_different_grids() -> None:
    chain = build_connector("pixel_shuffle+mlp", TokenSpec(16, 8, (4, 4)), 10)
    grids = [(4, 4), (2, 6), (4, 4)]
    packed = PackedTokens(torch.randn(44, 8), grids)
    out = chain.forward_packed(packed)
    assert out.grids == [(2, 2), (1, 3), (2, 2)]
    for image, result in zip(packed.split(), out.split(), strict=True):
        torch.testing.assert_close(result.tokens, chain(image).tokens)


def test_queries_are_packed_without_a_grid() -> None:
    resampler = PerceiverResampler(8, queries=3, depth=1, heads=2, head_dim=4, kv_heads=1)
    packed = PackedTokens(torch.randn(10, 8), [(2, 3), (2, 2)])
    out = resampler.forward_packed(packed)
    assert (out.grids, out.lengths) == ([None, None], [3, 3])
    for image, result in zip(packed.split(), out.split(), strict=True):
        torch.testing.assert_close(result.tokens, resampler(image).tokens)


def test_packed_tokens_have_no_prefix_to_keep() -> None:
    with pytest.raises(TokenShapeError, match="'keep_prefix' needs prefix tokens"):
        KeepPrefix().forward_packed(PackedTokens(torch.zeros(4, 8), [(2, 2)]))


def test_keep_prefix_puts_the_prefix_in_front() -> None:
    tokens, prefix = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    out = KeepPrefix()(VisualTokens(tokens, (2, 2), prefix))
    assert (out.grid, out.prefix) == (None, None)
    assert torch.equal(out.tokens[:, :3], prefix)
    assert torch.equal(out.tokens[:, 3:], tokens)
