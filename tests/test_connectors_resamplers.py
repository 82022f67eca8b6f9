"""Q-Former, InstructBLIP's, Idefics2's perceiver and Flamingo's: against transformers, packed, halved, in one graph."""

import copy
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from connectors import (
    Chain,
    Connector,
    FlamingoResampler,
    InstructQFormer,
    Linear,
    PackedTokens,
    PerceiverResampler,
    QFormer,
    TokenShapeError,
    TokenSpec,
    VisualTokens,
    VlmError,
    build_connector,
)
from connectors.attention import Attention
from connectors.norms import RMSNorm
from connectors.testing import check_connector

QFORMER_KEYS = {
    r"^layernorm\.": "norm.",
    r"^encoder\.layer\.": "layers.",
    r"\.attention\.attention\.": ".self_attention.",
    r"\.attention\.output\.dense\.": ".self_attention.out_proj.",
    r"\.attention\.output\.LayerNorm\.": ".self_norm.",
    r"\.crossattention\.attention\.": ".cross_attention.",
    r"\.crossattention\.output\.dense\.": ".cross_attention.out_proj.",
    r"\.crossattention\.output\.LayerNorm\.": ".cross_norm.",
    r"\.query\.": ".q_proj.",
    r"\.key\.": ".k_proj.",
    r"\.value\.": ".v_proj.",
    r"\.intermediate_query\.dense\.": ".ffn.0.",
    r"\.output_query\.dense\.": ".ffn.2.",
    r"\.output_query\.LayerNorm\.": ".ffn_norm.",
}
INSTRUCT_KEYS = {
    **QFORMER_KEYS,
    r"^embeddings\.layernorm\.": "norm.",
    r"^embeddings\.word_embeddings\.": "token_embedding.",
    r"^embeddings\.position_embeddings\.": "position_embedding.",
    r"\.intermediate\.dense\.": ".text_ffn.0.",
    r"\.output\.dense\.": ".text_ffn.2.",
    r"\.output\.LayerNorm\.": ".text_ffn_norm.",
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
FLAMINGO_KEYS = {
    r"^latents$": "queries",
    r"^layer_norm\.": "norm.",
    r"\.0\.context_layer_norm\.": ".context_norm.",
    r"\.0\.latents_layer_norm\.": ".query_norm.",
    r"\.0\.output_proj\.": ".attention.out_proj.",
    r"\.0\.([qk])_layer_norm\.": r".attention.\1_norm.",
    r"\.0\.([qkv])_proj\.": r".attention.\1_proj.",
    r"\.1\.ln\.": ".ffn_norm.",
    r"\.1\.fc\.": ".ffn.0.",
    r"\.1\.c_proj\.": ".ffn.2.",
}
BERT = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20, "encoder_hidden_size": 10}
SMALL: dict[str, Any] = {"queries": 3, "dim": 24, "layers": 3, "heads": 4, "ffn": 10}
MAKERS: dict[str, Any] = {
    "qformer": lambda: QFormer(10, **SMALL),
    "qformer, many queries": lambda: QFormer(10, **{**SMALL, "queries": 9}),
    "instruct_qformer": lambda: InstructQFormer(10, **SMALL, vocab=110, positions=8),
    "perceiver": lambda: PerceiverResampler(10, queries=3, depth=2, heads=4, head_dim=6, kv_heads=2),
    "flamingo": lambda: FlamingoResampler(10, queries=3, depth=2, heads=3, head_dim=5),
    "flamingo, norms": lambda: FlamingoResampler(10, 3, 2, 3, 5, "relu", ffn=7, qk_norm=True),
}
SPECS = [TokenSpec(9, 10, (3, 3)), TokenSpec(10, 10, (2, 5), num_prefix=2), TokenSpec(7, 10), TokenSpec(1, 10, (1, 1))]
maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


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


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [3, 5])
@pytest.mark.parametrize(("layers", "cross_every"), [(4, 2), (5, 3), (2, 1)])
def test_qformer_is_blip2s(layers: int, cross_every: int, queries: int) -> None:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    # Heads are 4 wide: 3 queries take the absorbed way, 5 the plain one.
    config = Blip2QFormerConfig(**BERT, num_hidden_layers=layers, cross_attention_frequency=cross_every)
    reference = Blip2QFormerModel(config).eval()
    randomise(reference)
    ours = QFormer(10, queries, 12, layers, 3, cross_every, 20, dropout=0.1).eval()
    first = draw(queries, 12)
    ours.load_state_dict({**rename(reference.state_dict(), QFORMER_KEYS), "queries": first})
    tokens = draw(2, 10, 10)
    expected = reference(query_embeds=first.expand(2, -1, -1), encoder_hidden_states=tokens).last_hidden_state
    close(ours(VisualTokens(tokens, (2, 5))).tokens, expected)


def test_packed_images_through_the_qformer_are_blip2s_masked_ones() -> None:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    reference = Blip2QFormerModel(Blip2QFormerConfig(**BERT, num_hidden_layers=3)).eval()
    randomise(reference)
    ours = QFormer(10, 3, 12, 3, 3, 2, 20).eval()
    first = draw(3, 12)
    ours.load_state_dict({**rename(reference.state_dict(), QFORMER_KEYS), "queries": first})
    packed = PackedTokens(draw(19, 10), [(2, 5), (1, 3), (3, 2)])
    tokens, real = packed.padded()
    expected = reference(
        query_embeds=first.expand(3, -1, -1), encoder_hidden_states=tokens, encoder_attention_mask=real.long()
    ).last_hidden_state
    close(ours.forward_packed(packed).tokens, expected.flatten(0, 1))


def instruct_pair(queries: int = 3) -> tuple[Any, InstructQFormer]:
    from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

    config = InstructBlipQFormerConfig(**BERT, num_hidden_layers=4, vocab_size=110, max_position_embeddings=8)
    reference = InstructBlipQFormerModel(config).eval()
    randomise(reference)
    ours = InstructQFormer(10, queries, 12, 4, 3, 2, 20, vocab=110, positions=8).eval()
    ours.load_state_dict({**rename(reference.state_dict(), INSTRUCT_KEYS), "queries": draw(queries, 12)})
    return reference, ours


@pytest.mark.parametrize("queries", [3, 5])
@pytest.mark.parametrize("padded", [True, False])
def test_instruct_qformer_is_instructblips(queries: int, padded: bool) -> None:  # noqa: FBT001
    reference, ours = instruct_pair(queries)
    tokens, ids = draw(3, 10, 10), torch.tensor([[5, 9, 109, 0, 2], [7, 7, 0, 0, 0], [0, 1, 2, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]) if padded else None
    expected = reference(
        input_ids=ids,
        attention_mask=torch.ones(3, queries + 5).long()
        if mask is None
        else torch.cat([torch.ones(3, queries).long(), mask], 1),
        query_embeds=ours.queries.expand(3, -1, -1),
        encoder_hidden_states=tokens,
    ).last_hidden_state[:, :queries]
    visual = VisualTokens(tokens, (5, 2))
    close(ours(visual, instruction=ids, instruction_mask=None if mask is None else mask.bool()).tokens, expected)
    close(ours(visual, instruction=ids, instruction_mask=mask).tokens, expected)


def test_without_an_instruction_the_empty_one_is_read() -> None:
    reference, ours = instruct_pair()
    visual, ids = VisualTokens(draw(2, 10, 10), (5, 2)), torch.tensor([[101, 102]] * 2)
    expected = reference(
        input_ids=ids, query_embeds=ours.queries.expand(2, -1, -1), encoder_hidden_states=visual.tokens
    ).last_hidden_state[:, :3]
    close(ours(visual).tokens, expected)
    assert torch.equal(ours(visual).tokens, ours(visual, instruction=ids).tokens)
    assert not torch.allclose(ours(visual).tokens, ours(visual, instruction=ids + 1).tokens)


@maker
def test_wrapped_layers_are_called(make: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    connector, visual = make(), VisualTokens(draw(2, 10, 10), (5, 2))
    randomise(connector)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    extra = {"instruction": draw_ids(3), "instruction_mask": mask} if connector.extra_inputs else {}
    expected = connector(visual, **extra).tokens
    stack = connector.layers if hasattr(connector, "layers") else connector.blocks
    called: list[nn.Module] = []
    for index, layer in enumerate(stack):
        layer.register_forward_hook(lambda module, *_: called.append(module))
        stack[index] = torch.compile(layer, backend="eager") if index % 2 else checkpoint_wrapper(layer)
    close(connector(visual, **extra).tokens, expected)
    assert len(called) == len(stack)


def test_the_empty_instruction_passes_the_hooks_of_the_tables() -> None:
    connector, called = InstructQFormer(10, **SMALL, vocab=110, positions=8), []
    for table in (connector.token_embedding, connector.position_embedding):
        table.register_forward_hook(lambda module, *_: called.append(module))
    connector(VisualTokens(draw(1, 4, 10), (2, 2)))
    assert called == [connector.token_embedding, connector.position_embedding]


def test_an_instruction_of_padding_alone_is_as_none_was_said() -> None:
    _, ours = instruct_pair()
    visual = VisualTokens(draw(2, 10, 10), (5, 2))
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    unheard = [ours(visual, instruction=draw_ids(seed), instruction_mask=nothing).tokens for seed in (0, 1)]
    assert unheard[0].isfinite().all()
    close(unheard[0], unheard[1])


def draw_ids(seed: int) -> Tensor:
    return torch.randint(110, (2, 4), generator=torch.Generator().manual_seed(seed))


def test_a_chain_hands_the_instruction_on() -> None:
    _, ours = instruct_pair()
    behind = Linear(12, 6)
    chain, visual, ids = Chain(ours, behind), VisualTokens(draw(2, 10, 10), (5, 2)), draw_ids(0)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    expected = behind(ours(visual, instruction=ids, instruction_mask=mask)).tokens
    assert torch.equal(chain(visual, instruction=ids, instruction_mask=mask).tokens, expected)
    with pytest.raises(VlmError, match="no link takes the input 'question'; this chain takes beside the tokens: instr"):
        chain(visual, question=ids)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"instruction": torch.zeros(3, 4).long()}, r"an instruction is \(2, T\) ids in int64, got shape \(3, 4\)"),
        ({"instruction": torch.zeros(4).long()}, r"got shape \(4,\) in torch.int64; give one row of ids for each view"),
        ({"instruction": torch.zeros(2, 4)}, r"got shape \(2, 4\) in torch.float32"),
        ({"instruction": torch.zeros(2, 9).long()}, "the instruction has 9 ids, and there are 8 positions; cut it"),
        ({"instruction": torch.full((2, 4), 110)}, "has the id 110, and ids go from 0 to 109; use the tokenizer of"),
        ({"instruction": torch.full((2, 4), -1)}, "has the id -1, and ids go from 0 to 109"),
        ({"instruction_mask": torch.ones(2, 4).bool()}, "there is an instruction_mask and no instruction; pass both"),
        (
            {"instruction": torch.zeros(2, 4).long(), "instruction_mask": torch.ones(2, 3).bool()},
            r"an instruction_mask is \(2, 4\) in bool, as the ids, got shape \(2, 3\) in torch.bool",
        ),
        (
            {"instruction": torch.zeros(2, 4).long(), "instruction_mask": torch.ones(2, 4)},
            r"got shape \(2, 4\) in torch.float32",
        ),
        (
            {"question": torch.zeros(2, 4)},
            "'instruct_qformer' takes no input 'question'; it takes beside the tokens: i",
        ),
    ],
)
def test_a_wrong_instruction_is_told(extra: dict[str, Tensor], message: str) -> None:
    with pytest.raises(VlmError, match=message):
        instruct_pair()[1](VisualTokens(draw(2, 10, 10), (5, 2)), **extra)


def test_a_small_vocabulary_needs_an_instruction() -> None:
    ours = InstructQFormer(10, **SMALL, vocab=102, positions=8)
    visual = VisualTokens(draw(2, 10, 10), (5, 2))
    with pytest.raises(VlmError, match=r"empty instruction is the ids 101 and 102, and this .* has vocab=102"):
        ours(visual)
    assert ours(visual, instruction=torch.ones(2, 1).long()).tokens.shape == (2, 3, 24)


def test_other_resamplers_take_no_instruction() -> None:
    with pytest.raises(VlmError, match="'qformer' takes no input 'instruction'; it takes beside the tokens: none"):
        QFormer(10, **SMALL)(VisualTokens(draw(2, 10, 10)), instruction=torch.ones(2, 1).long())


def perceiver_pair(heads: int, kv_heads: int) -> tuple[Any, PerceiverResampler]:
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
    return reference, ours


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (2, 2)])
def test_perceiver_is_idefics2s(heads: int, kv_heads: int) -> None:
    reference, ours = perceiver_pair(heads, kv_heads)
    tokens = draw(2, 10, 10)
    expected = reference(context=tokens, attention_mask=torch.ones(2, 10, dtype=torch.long))
    close(ours(VisualTokens(tokens, (2, 5))).tokens, expected)


def test_packed_images_through_the_perceiver_are_idefics2s_masked_ones() -> None:
    reference, ours = perceiver_pair(4, 2)
    packed = PackedTokens(draw(19, 10), [(2, 5), (1, 3), (3, 2)])
    tokens, real = packed.padded()
    close(ours.forward_packed(packed).tokens, reference(context=tokens, attention_mask=real.long()).flatten(0, 1))


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 6), (3, 5), (1, 10)])
def test_flamingo_is_idefics(heads: int, head_dim: int, norms: bool) -> None:  # noqa: FBT001
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = SimpleNamespace(
        perceiver_config=SimpleNamespace(qk_layer_norms_perceiver=norms), vision_config=SimpleNamespace(embed_dim=10)
    )
    reference = IdeficsPerceiverResampler(config, 10, 3, heads, head_dim, 4).eval()
    randomise(reference)
    ours = FlamingoResampler(10, 4, 3, heads, head_dim, "relu", qk_norm=norms).eval()
    ours.load_state_dict(rename(reference.state_dict(), FLAMINGO_KEYS))
    tokens = draw(2, 10, 10)
    close(ours(VisualTokens(tokens, (5, 2))).tokens, reference(tokens))


def slow_flamingo(weights: dict[str, Tensor], image: Tensor, depth: int, heads: int, head_dim: int) -> Tensor:
    """Flamingo's figure 5, one image, query by query and head by head; keys and values by one map, as open_flamingo."""

    def norm(row: Tensor, name: str) -> Tensor:
        centred = row - row.mean()
        return centred / (centred.pow(2).mean() + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(value: Tensor) -> Tensor:
        return 0.5 * value * (1 + torch.erf(value / math.sqrt(2)))

    inner = heads * head_dim
    latents = list(weights["queries"])
    for index in range(depth):
        at = f"blocks.{index}"
        asking = [norm(row, f"{at}.query_norm") for row in latents]
        read = [norm(row, f"{at}.context_norm") for row in image] + asking
        to_kv = torch.cat([weights[f"{at}.attention.k_proj.weight"], weights[f"{at}.attention.v_proj.weight"]])
        both = [to_kv @ row for row in read]
        for number, row in enumerate(asking):
            query, found = weights[f"{at}.attention.q_proj.weight"] @ row, []
            for head in range(heads):
                own = slice(head * head_dim, (head + 1) * head_dim)
                scores = [math.exp(query[own] @ kv[:inner][own] / math.sqrt(head_dim)) for kv in both]
                parts = [score * kv[inner:][own] for score, kv in zip(scores, both, strict=True)]
                found.append(sum(parts, torch.zeros(head_dim)) / sum(scores))
            latents[number] = latents[number] + weights[f"{at}.attention.out_proj.weight"] @ torch.cat(found)
        for number, row in enumerate(latents):
            hidden = gelu(weights[f"{at}.ffn.0.weight"] @ norm(row, f"{at}.ffn_norm"))
            latents[number] = row + weights[f"{at}.ffn.2.weight"] @ hidden
    return torch.stack([norm(row, "norm") for row in latents])


def test_flamingo_is_the_papers_figure() -> None:
    ours = FlamingoResampler(6, queries=3, depth=2, heads=2, head_dim=4).eval()
    randomise(ours)
    image = draw(8, 6)
    expected = slow_flamingo({k: v.detach() for k, v in ours.named_parameters()}, image, 2, 2, 4)
    close(ours(VisualTokens(image[None], (2, 4))).tokens[0], expected)


def test_the_published_sizes_are_the_defaults() -> None:
    from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig
    from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig

    theirs, instructed, perceiver = Blip2QFormerConfig(), InstructBlipQFormerConfig(), Idefics2PerceiverConfig()
    with torch.device("meta"):
        qformer = QFormer(theirs.encoder_hidden_size).options()
        instruct = InstructQFormer(instructed.encoder_hidden_size).options()
        resampler = PerceiverResampler(perceiver.hidden_size).options()
    for options, config in ((qformer, theirs), (instruct, instructed)):
        assert options["dim"] == config.hidden_size
        assert options["layers"] == config.num_hidden_layers
        assert options["heads"] == config.num_attention_heads
        assert options["ffn"] == config.intermediate_size
        assert options["cross_every"] == config.cross_attention_frequency
    assert instruct["positions"] == instructed.max_position_embeddings
    assert resampler == {
        "queries": perceiver.resampler_n_latents,
        "depth": perceiver.resampler_depth,
        "heads": perceiver.resampler_n_heads,
        "head_dim": perceiver.resampler_head_dim,
        "kv_heads": perceiver.num_key_value_heads,
    }


def test_released_sizes_are_counted_without_memory() -> None:
    with torch.device("meta"):
        qformer, instruct = QFormer(1408), InstructQFormer(1408)
        perceiver, flamingo = PerceiverResampler(4096), FlamingoResampler(1024)
    # 12 layers: self-attention and FFN of BERT-base; 6 cross-attentions that read 1408; queries and their norm.
    attention, norm = 4 * (768 * 768 + 768), 2 * 768
    ffn = (768 * 3072 + 3072) + (3072 * 768 + 768) + norm
    cross = 2 * (768 * 768 + 768) + 2 * (1408 * 768 + 768) + norm
    assert count(qformer) == 12 * (attention + norm + ffn) + 6 * cross + 32 * 768 + norm
    assert count(instruct) == count(qformer) + 12 * ffn + (30523 + 512) * 768
    block = 2 * 4096 * 16 * 96 + 2 * 4096 * 4 * 96 + 3 * 4096 * 4 * 4096 + 3 * 4096
    assert count(perceiver) == 3 * block + 64 * 4096 + 4096
    assert count(flamingo) == 6 * (4 * 1024 * 512 + 2 * 1024 * 4096 + 3 * 2048) + 64 * 1024 + 2048


def count(connector: Connector) -> int:
    return sum(parameter.numel() for parameter in connector.parameters())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@maker
def test_the_contract_is_kept(make: Any, spec: TokenSpec) -> None:
    check_connector(make(), spec)


@maker
def test_packed_images_are_each_alone_whatever_fills_up(make: Any) -> None:
    connector = make().eval()
    randomise(connector)
    packed = PackedTokens(draw(23, 10) * 5, [(3, 4), (1, 1), (2, 3), (4, 1)])
    out = connector.forward_packed(packed)
    assert (out.grids, out.lengths) == ([None] * 4, [connector.num_queries] * 4)
    for image, result in zip(packed.split(), out.split(), strict=True):
        close(result.tokens, connector(image).tokens)


@maker
def test_a_batch_without_an_image_passes(make: Any) -> None:
    connector = make()
    out = connector(VisualTokens(torch.zeros(0, 9, 10), (3, 3)))
    assert out.tokens.shape == (0, connector.num_queries, connector.out_dim)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("queries", [1, 3, 7])
def test_attention_without_keys_is_attention(queries: int, masked: bool, bias: bool) -> None:  # noqa: FBT001
    attention = Attention(24, 3, context_dim=10, bias=bias).eval()
    randomise(attention)
    tokens, context = draw(2, queries, 24), draw(2, 11, 10, seed=2).requires_grad_()
    real = torch.arange(11) < torch.tensor([[11], [4]]) if masked else None
    wanted = direct(attention, tokens, context, real)
    found = attention(tokens, context, real)
    close(found, wanted)
    mine, theirs = (
        torch.autograd.grad(out.pow(2).sum(), [context, *attention.parameters()]) for out in (found, wanted)
    )
    for new, old in zip(mine, theirs, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-3)


def test_adapters_and_hooks_of_keys_and_values_count() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    visual = VisualTokens(draw(2, 9, 10), (3, 3))
    plain = QFormer(10, **SMALL)
    randomise(plain)
    before = plain(visual).tokens
    for target in ("k_proj", "v_proj"):
        adapted = copy.deepcopy(plain)
        config = LoraConfig(r=2, target_modules=rf".*cross_attention\.{target}", init_lora_weights=False)
        inject_adapter_in_model(config, adapted)
        after = adapted(visual).tokens
        assert not torch.allclose(after, before, atol=1e-3)
        (after * draw(*after.shape)).sum().backward()
        grads = [parameter.grad for name, parameter in adapted.named_parameters() if "lora_" in name]
        assert len(grads) == 4
        assert all(grad is not None and grad.any() for grad in grads)
    attention, called = plain.layers[0].cross_attention, []
    for proj in (attention.k_proj, attention.v_proj):
        proj.register_forward_hook(lambda module, *_: called.append(module))
    close(plain(visual).tokens, before)
    assert called == [attention.k_proj, attention.v_proj]
    attention.v_proj.register_full_backward_hook(lambda module, *_: called.append(module))
    plain(VisualTokens(draw(2, 9, 10).requires_grad_(), (3, 3))).tokens.sum().backward()
    assert called[-1] is attention.v_proj


def test_weights_that_wrap_other_tensors_are_not_read() -> None:
    attention = Attention(24, 4, context_dim=10)
    assert attention._absorbs(draw(1, 3, 24))
    # What quantised and sharded tensors have.
    attention.v_proj.weight.__tensor_flatten__ = None
    assert not attention._absorbs(draw(1, 3, 24))


def direct(attention: Attention, tokens: Tensor, context: Tensor, real: Tensor | None) -> Tensor:
    """Attend by keys and values, in the plainest way."""
    batch, width = len(tokens), attention.head_dim
    query, key, value = (
        proj(each).view(batch, -1, 3, width).transpose(1, 2)
        for proj, each in ((attention.q_proj, tokens), (attention.k_proj, context), (attention.v_proj, context))
    )
    scores = query @ key.mT / math.sqrt(width)
    if real is not None:
        scores = scores.masked_fill(~real[:, None, None], -torch.inf)
    out: Tensor = attention.out_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    return out


@pytest.mark.parametrize("queries", [3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_real_to_read_gives_no_nan(queries: int, dtype: torch.dtype) -> None:
    attention = Attention(24, 3, context_dim=10).eval()
    randomise(attention)
    attention.to(dtype)
    tokens, context = draw(2, queries, 24).to(dtype), draw(2, 5, 10).to(dtype)
    assert attention(tokens, context, torch.zeros(2, 5, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize("queries", [3, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halved_attention_is_near_the_whole_one(queries: int, dtype: torch.dtype) -> None:
    attention = Attention(24, 3, context_dim=10).eval()
    randomise(attention)
    halved = copy.deepcopy(attention).to(dtype)
    tokens, context = draw(2, queries, 24), draw(2, 11, 10)
    out = halved(tokens.to(dtype), context.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), attention(tokens, context), rtol=0.1, atol=0.1)


def test_autocast_keeps_to_its_dtype() -> None:
    connector, visual = QFormer(10, **SMALL).eval(), VisualTokens(draw(2, 9, 10), (3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        out = connector(visual).tokens
    torch.testing.assert_close(out.float(), connector(visual).tokens, rtol=0.1, atol=0.1)


@maker
def test_one_graph_gives_the_same_numbers(make: Any) -> None:
    connector, visual = make().eval(), VisualTokens(draw(2, 10, 10), (2, 5))
    compiled = torch.compile(connector, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(visual).tokens, connector(visual).tokens)


@maker
def test_an_exported_program_gives_the_same_numbers_for_any_batch(make: Any) -> None:
    connector = make().eval()
    batch = torch.export.Dim("batch", min=2, max=8)
    given = VisualTokens(draw(3, 10, 10), (2, 5))
    program = torch.export.export(connector, (given,), dynamic_shapes=([{0: batch}, None],)).module()
    visual = VisualTokens(draw(5, 10, 10), (2, 5))
    close(program(visual).tokens, connector(visual).tokens)


def test_an_instruction_is_part_of_the_graph() -> None:
    _, ours = instruct_pair()
    extra = {"instruction": draw_ids(0), "instruction_mask": torch.tensor([[True] * 4, [True, False, False, False]])}
    visual = VisualTokens(draw(2, 10, 10), (5, 2))
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(visual, **extra).tokens, ours(visual, **extra).tokens)
    program = torch.export.export(ours, (visual,), extra).module()
    close(program(visual, **extra).tokens, ours(visual, **extra).tokens)


@maker
def test_masked_images_pass_one_graph(make: Any) -> None:
    connector, tokens = make().eval(), draw(2, 10, 10)
    real = torch.arange(10) < torch.tensor([[10], [4]])
    compiled = torch.compile(connector.read, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(tokens, real), connector.read(tokens, real))


def test_fresh_queries_differ_and_start_as_published() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"queries": 64, "dim": 96, "layers": 2, "heads": 2, "ffn": 96}
    qformer, instruct = QFormer(8, **sizes), InstructQFormer(8, **sizes, vocab=110)
    perceiver = PerceiverResampler(64, queries=64, depth=1, heads=2, head_dim=8, kv_heads=1)
    flamingo = FlamingoResampler(64, depth=1)
    assert qformer.queries.std().item() == pytest.approx(0.02, rel=0.05)
    assert instruct.queries.std().item() == pytest.approx(0.02, rel=0.05)
    assert perceiver.queries.std().item() == pytest.approx(1.0, rel=0.05)
    assert flamingo.queries.std().item() == pytest.approx(1.0, rel=0.05)
    for connector in (qformer, instruct, perceiver):
        for name, parameter in connector.named_parameters():
            if parameter.ndim == 2 and not name.startswith("queries"):
                assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            elif name.endswith("bias"):
                assert not parameter.any(), name
    for name, parameter in flamingo.named_parameters():
        if parameter.ndim == 2 and not name.startswith("queries"):
            assert parameter.abs().max().item() == pytest.approx(1 / math.sqrt(parameter.shape[1]), rel=0.01), name
    spec = TokenSpec(16, 64, (4, 4))
    for connector in (perceiver, flamingo):
        out = connector(VisualTokens(torch.randn(1, 16, spec.dim), spec.grid)).tokens[0]
        assert torch.cdist(out, out).fill_diagonal_(torch.inf).min() > 1


@pytest.mark.parametrize("kind", [QFormer, InstructQFormer])
def test_training_is_deterministic_unless_dropout_is_asked_for(kind: Any) -> None:
    visual = VisualTokens(torch.randn(1, 16, 8), (4, 4))
    sizes: dict[str, Any] = {"queries": 3, "dim": 12, "layers": 2, "heads": 2, "ffn": 8}
    sizes |= {"vocab": 110} if kind is InstructQFormer else {}
    plain = kind(8, **sizes).train()
    assert torch.equal(plain(visual).tokens, plain(visual).tokens)
    dropping = kind(8, **sizes, dropout=0.5).train()
    assert not torch.equal(dropping(visual).tokens, dropping(visual).tokens)
    dropping.eval()
    assert torch.equal(dropping(visual).tokens, dropping(visual).tokens)


def test_dropped_attention_weights_take_the_bias_of_the_values_along() -> None:
    attention = Attention(24, 3, context_dim=10, dropout=0.999999).train()
    randomise(attention)
    with torch.no_grad():
        attention.out_proj.bias.zero_()
    # Published: all weights are dropped, so nothing is left to sum.
    assert not attention(draw(1, 3, 24), draw(1, 5, 10)).any()


@pytest.mark.parametrize("dropout", ["a", None, True, math.nan])
def test_a_dropout_that_is_no_number_is_told(dropout: Any) -> None:
    for make in (QFormer, InstructQFormer):
        with pytest.raises(VlmError, match=f"has dropout={dropout}; give a probability"):
            make(8, **SMALL, dropout=dropout)


def test_the_perceivers_gate_stays_finite_in_fp16() -> None:
    block = PerceiverResampler(8, queries=2, depth=1, heads=2, head_dim=4, kv_heads=1).blocks[0].ffn.half()
    with torch.no_grad():
        for proj in (block.gate_proj, block.up_proj):
            proj.weight.fill_(0.5)
        block.down_proj.weight.copy_(torch.eye(8, 32))
        assert torch.equal(block(torch.full((1, 1, 8), 1000.0).half()), torch.full((1, 1, 8), 65504.0).half())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "perceiver:heads=1000000007,kv_heads=1000000006+linear",
            "1000000006 kv_heads do not divide 1000000007 heads; use a divisor of 1000000007, for example 1",
        ),
        ("flamingo:heads=0+linear", "'flamingo' has heads=0; give a whole number of at least 1"),
        ("flamingo:ffn=0+linear", "'flamingo' has ffn=0; give a whole number of at least 1"),
        ("flamingo:ffn_ratio=0+linear", "'flamingo' has ffn_ratio=0; give a whole number of at least 1"),
        ("flamingo:activation=geluu+linear", "'flamingo' has no activation 'geluu'"),
        ("instruct_qformer:vocab=0+linear", "'instruct_qformer' has vocab=0; give a whole number of at least 1"),
        ("instruct_qformer:dropout=1+linear", "'instruct_qformer' has dropout=1; give a probability from 0 to below 1"),
        (
            "instruct_qformer:dim=10,heads=4+linear",
            "4 heads do not divide width 10; use a divisor of 10, for example 2",
        ),
        (
            "flamingo:depth=1+pixel_shuffle+mlp",
            "query tokens have no grid; put spatial connectors before the resampler",
        ),
    ],
)
def test_wrong_options_are_told(recipe: str, message: str) -> None:
    with pytest.raises(VlmError, match=message), torch.device("meta"):
        build_connector(recipe, TokenSpec(16, 8, (4, 4)), 10)


@maker
def test_tokens_of_another_width_and_empty_packs_are_told(make: Any) -> None:
    connector = make()
    with pytest.raises(TokenShapeError, match="was built for tokens of width 10, got width 11"):
        connector(VisualTokens(torch.zeros(1, 4, 11)))
    with pytest.raises(TokenShapeError, match="was built for tokens of width 10, got width 11"):
        connector.forward_packed(PackedTokens(torch.zeros(4, 11), [(2, 2)]))
    with pytest.raises(TokenShapeError, match="there is no image among the packed tokens; leave empty packs out"):
        connector.forward_packed(PackedTokens(torch.zeros(0, 10), []))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rms_norm_is_idefics2s_also_for_the_largest_half_numbers(dtype: torch.dtype) -> None:
    from transformers.models.idefics2.modeling_idefics2 import Idefics2RMSNorm

    ours, reference = RMSNorm(8).to(dtype), Idefics2RMSNorm(8).to(dtype)
    tokens = torch.linspace(-65000, 65000, 48).reshape(2, 3, 8).to(dtype)
    out = ours(tokens)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert torch.equal(out, reference(tokens))
