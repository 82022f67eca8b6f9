"""Our connectors against other libraries, with the same random weights."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from connectors import MLP, AvgPool, PerceiverResampler, PixelShuffle, QFormer, VisualTokens
from connectors.attention import RMSNorm


def randomise(module: nn.Module) -> None:
    """Draw every parameter, norms and biases too, so that none hides behind 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


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
def test_mlp_is_llavas_projector(activation: str, theirs: str) -> None:
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    config = SimpleNamespace(
        vision_feature_layer=-2,
        vision_config=SimpleNamespace(hidden_size=6),
        text_config=SimpleNamespace(hidden_size=10),
        multimodal_projector_bias=True,
        projector_hidden_act=theirs,
    )
    reference = LlavaMultiModalProjector(config)
    randomise(reference)
    ours = MLP(6, 10, activation=activation)
    names = {"linear_1": "layers.0", "linear_2": "layers.2"}
    ours.load_state_dict({re.sub(r"linear_\d", lambda m: names[m[0]], k): v for k, v in reference.state_dict().items()})
    tokens = draw(2, 12, 6)
    assert torch.equal(ours(VisualTokens(tokens, (3, 4))).tokens, reference(tokens))


@pytest.mark.parametrize("grid", [(4, 4), (2, 6), (6, 4)])
def test_pixel_shuffle_is_internvls(grid: tuple[int, int]) -> None:
    from transformers.models.internvl.modeling_internvl import InternVLModel

    tokens = draw(2, math.prod(grid), 3)
    expected = InternVLModel.pixel_shuffle(None, tokens.unflatten(1, grid), scale_factor=0.5)
    out = PixelShuffle(2)(VisualTokens(tokens, grid))
    assert out.grid == (grid[0] // 2, grid[1] // 2)
    assert torch.equal(out.tokens, expected.flatten(1, 2))


@pytest.mark.parametrize(("side", "factor"), [(4, 2), (6, 3), (8, 4), (3, 1)])
def test_pixel_shuffle_is_idefics3s(side: int, factor: int) -> None:
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    tokens = draw(2, side * side, 3)
    expected = Idefics3Connector.pixel_shuffle(None, tokens, factor)
    assert torch.equal(PixelShuffle(factor)(VisualTokens(tokens, (side, side))).tokens, expected)


def test_pixel_shuffle_takes_tokens_cut_from_a_longer_sequence() -> None:
    sequence = draw(2, 17, 3)
    cut = PixelShuffle(2)(VisualTokens(sequence[:, 1:], (4, 4))).tokens
    assert torch.equal(cut, PixelShuffle(2)(VisualTokens(sequence[:, 1:].clone(), (4, 4))).tokens)


@pytest.mark.parametrize(
    ("pool", "grid", "out"),
    [
        (AvgPool(factor=2), (4, 6), (2, 3)),
        (AvgPool(factor=3), (3, 6), (1, 2)),
        (AvgPool(grid=(2, 3)), (4, 6), (2, 3)),
        (AvgPool(grid=(3, 4)), (7, 5), (3, 4)),
    ],
)
def test_avg_pool_is_the_mean_of_its_blocks(pool: AvgPool, grid: tuple[int, int], out: tuple[int, int]) -> None:
    tokens = draw(2, math.prod(grid), 3)
    picture = tokens.unflatten(1, grid)

    def span(index: int, size: int, parts: int) -> slice:
        return slice(index * size // parts, math.ceil((index + 1) * size / parts))

    expected = torch.stack(
        [
            picture[:, span(row, grid[0], out[0]), span(column, grid[1], out[1])].mean((1, 2))
            for row in range(out[0])
            for column in range(out[1])
        ],
        dim=1,
    )
    result = pool(VisualTokens(tokens, grid))
    assert result.grid == out
    torch.testing.assert_close(result.tokens, expected, rtol=1e-5, atol=1e-6)


QFORMER_KEYS = {
    r"^layernorm\.": "norm.",
    r"^encoder\.layer\.": "layers.",
    r"\.attention\.attention\.query\.": ".self_attention.q_proj.",
    r"\.attention\.attention\.key\.": ".self_attention.k_proj.",
    r"\.attention\.attention\.value\.": ".self_attention.v_proj.",
    r"\.attention\.output\.dense\.": ".self_attention.out_proj.",
    r"\.attention\.output\.LayerNorm\.": ".self_norm.",
    r"\.crossattention\.attention\.query\.": ".cross_attention.q_proj.",
    r"\.crossattention\.attention\.key\.": ".cross_attention.k_proj.",
    r"\.crossattention\.attention\.value\.": ".cross_attention.v_proj.",
    r"\.crossattention\.output\.dense\.": ".cross_attention.out_proj.",
    r"\.crossattention\.output\.LayerNorm\.": ".cross_norm.",
    r"\.intermediate_query\.dense\.": ".ffn.0.",
    r"\.output_query\.dense\.": ".ffn.2.",
    r"\.output_query\.LayerNorm\.": ".ffn_norm.",
}
PERCEIVER_KEYS = {
    r"^latents$": "queries",
    r"^layers\.": "blocks.",
    r"\.input_latents_norm\.": ".query_norm.",
    r"\.input_context_norm\.": ".context_norm.",
    r"\.self_attn\.o_proj\.": ".attention.out_proj.",
    r"\.self_attn\.": ".attention.",
    r"\.post_attention_layernorm\.": ".ffn_norm.",
    r"\.mlp\.": ".ffn.",
}


def rename(state: dict[str, Tensor], keys: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in keys.items():
            new = re.sub(pattern, replacement, new)
        renamed[new] = tensor
    return renamed


@pytest.mark.parametrize(("layers", "cross_every"), [(4, 2), (5, 3), (2, 1)])
def test_qformer_is_blip2s(layers: int, cross_every: int) -> None:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    config = Blip2QFormerConfig(
        hidden_size=12,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=20,
        encoder_hidden_size=10,
        cross_attention_frequency=cross_every,
    )
    reference = Blip2QFormerModel(config).eval()
    randomise(reference)
    ours = QFormer(10, queries=5, dim=12, layers=layers, heads=3, cross_every=cross_every, ffn=20, dropout=0.1).eval()
    queries = draw(5, 12)
    ours.load_state_dict({**rename(reference.state_dict(), QFORMER_KEYS), "queries": queries})
    tokens = draw(2, 9, 10)
    expected = reference(query_embeds=queries.expand(2, -1, -1), encoder_hidden_states=tokens).last_hidden_state
    torch.testing.assert_close(ours(VisualTokens(tokens, (3, 3))).tokens, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (2, 2)])
def test_perceiver_is_idefics2s(heads: int, kv_heads: int) -> None:
    from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

    config = Idefics2PerceiverConfig(
        hidden_size=10,
        resampler_n_latents=5,
        resampler_depth=2,
        resampler_n_heads=heads,
        resampler_head_dim=6,
        num_key_value_heads=kv_heads,
    )
    reference = Idefics2PerceiverResampler(config).eval()
    randomise(reference)
    ours = PerceiverResampler(10, queries=5, depth=2, heads=heads, head_dim=6, kv_heads=kv_heads).eval()
    ours.load_state_dict(rename(reference.state_dict(), PERCEIVER_KEYS))
    tokens = draw(2, 9, 10)
    expected = reference(context=tokens, attention_mask=torch.ones(2, 9, dtype=torch.long))
    torch.testing.assert_close(ours(VisualTokens(tokens, (3, 3))).tokens, expected, rtol=1e-5, atol=1e-5)


def test_the_published_sizes_are_the_defaults() -> None:
    from transformers import Blip2QFormerConfig
    from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig

    theirs = Blip2QFormerConfig()
    with torch.device("meta"):
        options = QFormer(theirs.encoder_hidden_size).options()
    assert options["dim"] == theirs.hidden_size
    assert options["layers"] == theirs.num_hidden_layers
    assert options["heads"] == theirs.num_attention_heads
    assert options["ffn"] == theirs.intermediate_size
    assert options["cross_every"] == theirs.cross_attention_frequency
    perceiver = Idefics2PerceiverConfig()
    with torch.device("meta"):
        options = PerceiverResampler(perceiver.hidden_size).options()
    assert options == {
        "queries": perceiver.resampler_n_latents,
        "depth": perceiver.resampler_depth,
        "heads": perceiver.resampler_n_heads,
        "head_dim": perceiver.resampler_head_dim,
        "kv_heads": perceiver.num_key_value_heads,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rms_norm_is_idefics2s_also_for_the_largest_half_numbers(dtype: torch.dtype) -> None:
    from transformers.models.idefics2.modeling_idefics2 import Idefics2RMSNorm

    ours, reference = RMSNorm(8).to(dtype), Idefics2RMSNorm(8).to(dtype)
    tokens = torch.linspace(-65000, 65000, 48).reshape(2, 3, 8).to(dtype)
    out = ours(tokens)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert torch.equal(out, reference(tokens))
