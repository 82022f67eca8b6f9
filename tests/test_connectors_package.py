"""The package itself: ours, light to import, on the meta device, in one graph, packed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import connectors
from connectors import (
    Connector,
    KeepPrefix,
    PackedTokens,
    PerceiverResampler,
    QFormer,
    TokenShapeError,
    TokenSpec,
    VisualTokens,
    build_connector,
)

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
    modules = "base, recipe, testing, linear, mlp, pooling, pixel_shuffle, keep_prefix, qformer, perceiver"
    code = f"import sys; from connectors import {modules}; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
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


def test_released_sizes_are_counted_without_memory() -> None:
    with torch.device("meta"):
        qformer = QFormer(1408)
        perceiver = PerceiverResampler(4096)
    # 12 layers: self-attention and FFN of BERT-base; 6 cross-attentions that read 1408; queries and their norm.
    attention, norm = 4 * (768 * 768 + 768), 2 * 768
    layer = attention + norm + (768 * 3072 + 3072) + (3072 * 768 + 768) + norm
    cross = 2 * (768 * 768 + 768) + 2 * (1408 * 768 + 768) + norm
    assert count(qformer) == 12 * layer + 6 * cross + 32 * 768 + norm
    block = 2 * 4096 * 16 * 96 + 2 * 4096 * 4 * 96 + 3 * 4096 * 4 * 4096 + 3 * 4096
    assert count(perceiver) == 3 * block + 64 * 4096 + 4096


def count(connector: Connector) -> int:
    return sum(parameter.numel() for parameter in connector.parameters())


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


def test_queries_are_packed_as_one_row_each() -> None:
    resampler = PerceiverResampler(8, queries=3, depth=1, heads=2, head_dim=4, kv_heads=1)
    packed = PackedTokens(torch.randn(10, 8), [(2, 3), (2, 2)])
    out = resampler.forward_packed(packed)
    assert out.grids == [(1, 3), (1, 3)]
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


def test_fresh_queries_differ_and_start_as_published() -> None:
    torch.manual_seed(0)
    qformer = QFormer(8, queries=64, dim=96, layers=2, heads=2, ffn=96)
    perceiver = PerceiverResampler(64, queries=64, depth=1, heads=2, head_dim=8, kv_heads=1)
    assert qformer.queries.std().item() == pytest.approx(0.02, rel=0.05)
    assert perceiver.queries.std().item() == pytest.approx(1.0, rel=0.05)
    for connector in (qformer, perceiver):
        for name, parameter in connector.named_parameters():
            if parameter.ndim == 2 and not name.startswith("queries"):
                assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            elif name.endswith("bias"):
                assert not parameter.any(), name
    spec = TokenSpec(16, 64, (4, 4))
    out = perceiver(VisualTokens(torch.randn(1, 16, spec.dim), spec.grid)).tokens[0]
    assert torch.cdist(out, out).fill_diagonal_(torch.inf).min() > 1


def test_training_is_deterministic_unless_dropout_is_asked_for() -> None:
    visual = VisualTokens(torch.randn(1, 16, 8), (4, 4))
    sizes = {"queries": 3, "dim": 12, "layers": 2, "heads": 2, "ffn": 8}
    plain = QFormer(8, **sizes).train()
    assert torch.equal(plain(visual).tokens, plain(visual).tokens)
    dropping = QFormer(8, **sizes, dropout=0.5).train()
    assert not torch.equal(dropping(visual).tokens, dropping(visual).tokens)
    dropping.eval()
    assert torch.equal(dropping(visual).tokens, dropping(visual).tokens)
