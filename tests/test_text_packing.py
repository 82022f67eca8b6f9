"""Samples packed in one row: the loss of a padded batch, and no sample sees another."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.models.mistral import modeling_mistral

from connectors import MLP
from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.testing import LLM_FAMILIES, tiny_llm
from vlm_encoders.vlm import text_packing
from vlm_encoders.vlm.language import predict
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import VLMProcessor
from vlm_encoders.vlm.text_packing import SampleMask

LENGTHS = (30, 20, 20, 9)
IDS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **IDS,
}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS}
EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8}
OTHERS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, **IDS)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
            word_embed_proj_dim=32, **IDS,
        )
    ),
    "falcon": lambda: FalconForCausalLM(FalconConfig(alibi=False, **FALCON)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=2, num_experts_per_tok=1, **SHAPE)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=4, **EXPERTS, **SHAPE)),
    "llama, eager": lambda: tiny_llm(attn_implementation="eager"),
    "mistral, longer window": lambda: tiny_llm("mistral", sliding_window=40),
    "mistral, no window": lambda: tiny_llm("mistral", sliding_window=None),
}  # fmt: skip
REFUSED = {
    "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **IDS)),
    "falcon, alibi": lambda: FalconForCausalLM(FalconConfig(alibi=True, **FALCON)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **IDS)),
    "qwen3_next": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            num_experts=2, shared_expert_intermediate_size=16, linear_num_value_heads=2, linear_num_key_heads=2,
            linear_key_head_dim=8, linear_value_head_dim=8, **EXPERTS, **(SHAPE | {"num_hidden_layers": 4}),
        )
    ),
}  # fmt: skip


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return (OTHERS | REFUSED)[name]().eval() if name in OTHERS | REFUSED else tiny_llm(name)


def padded() -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, mask and labels of samples padded on the right."""
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(len(LENGTHS), max(LENGTHS), 32, generator=generator) / 2
    mask = torch.zeros(embeds.shape[:2], dtype=torch.long)
    labels = torch.full_like(mask, -100)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
        labels[row, length - 3 - row : length] = torch.randint(3, 60, (3 + row,), generator=generator)
    return embeds, mask, labels


def in_a_row(values: Tensor) -> Tensor:
    return torch.cat([values[row, :length] for row, length in enumerate(LENGTHS)])[None]


def gradients(llm: nn.Module, embeds: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of the embeddings at real tokens, and of all weights."""
    weights = dict(llm.named_parameters())
    found = torch.autograd.grad(loss, [embeds, *weights.values()], allow_unused=True, materialize_grads=True)
    return {"": in_a_row(found[0]), **dict(zip(weights, found[1:], strict=True))}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * max(largest, 1.0), msg=name)


@pytest.mark.parametrize("name", [*LLM_FAMILIES, *OTHERS])
def test_packed_loss_and_gradients_are_those_of_the_llm_on_a_padded_batch(name: str) -> None:
    llm, (embeds, mask, labels) = build(name), padded()
    embeds.requires_grad_()
    wanted = llm(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
    made = predict(llm, in_a_row(embeds), None, in_a_row(labels), LENGTHS)
    assert made.num_supervised == 18
    torch.testing.assert_close(made.loss, wanted, rtol=0, atol=1e-6)
    assert_equal(gradients(llm, embeds, made.loss), gradients(llm, embeds, wanted))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "mixtral"])
def test_a_changed_sample_leaves_the_logits_of_the_others_equal_to_the_bit(name: str) -> None:
    llm, (embeds, _, _) = build(name), padded()
    row = in_a_row(embeds)
    first = predict(llm, row, None, None, LENGTHS).logits.split(LENGTHS, dim=1)
    changed = row.clone()
    changed[:, 30:50] += 1
    second = predict(llm, changed, None, None, LENGTHS).logits.split(LENGTHS, dim=1)
    # Experts are run on groups of tokens, whose size rounds.
    allowed = 1e-6 if name == "mixtral" else 0.0
    for number, (before, after) in enumerate(zip(first, second, strict=True)):
        if number == 1:
            assert (before - after).abs().max() > 1e-2
        else:
            torch.testing.assert_close(after, before, rtol=0, atol=allowed)


def test_a_label_at_the_start_of_a_sample_is_not_predicted_from_the_one_before() -> None:
    llm, (embeds, _, labels) = tiny_llm(), padded()
    row, wanted = in_a_row(embeds), in_a_row(labels)
    starts = torch.tensor(LENGTHS).cumsum(0)[:-1]
    marked = wanted.index_fill(1, starts, 5)
    assert torch.equal(predict(llm, row, None, marked, LENGTHS).loss, predict(llm, row, None, wanted, LENGTHS).loss)


@pytest.mark.parametrize("name", ["llama", "mistral", "opt"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    llm, (embeds, _, labels) = build(name), padded()
    for module in llm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if name == "opt":
        llm.model.decoder.dropout = 0.0
        for layer in llm.model.decoder.layers:
            layer.dropout = 0.0
    llm.train()
    embeds.requires_grad_()
    found = []
    for _ in range(2):
        loss = predict(llm, in_a_row(embeds), None, in_a_row(labels), LENGTHS).loss
        found.append((loss, gradients(llm, embeds, loss)))
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(found[0][0], found[1][0])
    for name_, gradient in found[0][1].items():
        assert torch.equal(found[1][1][name_], gradient), name_


@pytest.mark.parametrize("name", REFUSED)
def test_an_llm_that_does_not_keep_samples_apart_is_refused(name: str) -> None:
    llm, (embeds, _, labels) = build(name), padded()
    with pytest.raises(VlmError, match="pack_tokens = None"):
        predict(llm, in_a_row(embeds), None, in_a_row(labels), LENGTHS)


def test_a_network_that_looks_past_the_mask_is_refused() -> None:
    llm, (embeds, _, labels) = tiny_llm(), padded()
    llm.model.layers[0].register_forward_hook(lambda *given: given[2] + given[2].roll(1, dims=1) / 8)
    llm.train()
    with pytest.raises(VlmError, match="carries what it has read"):
        predict(llm, in_a_row(embeds), None, in_a_row(labels), LENGTHS)
    assert all(module.training for module in llm.modules())


def test_a_network_that_counts_places_in_the_row_is_refused() -> None:
    llm, (embeds, _, labels) = tiny_llm(), padded()
    places = torch.linspace(-1, 1, 79)[:, None]
    # As a position of its own would, beside those that it is given: no sample changes with another.
    llm.model.layers[0].register_forward_hook(lambda *given: given[2] + places[: given[2].shape[1]])
    with pytest.raises(VlmError, match="counts places in the row"):
        predict(llm, in_a_row(embeds), None, in_a_row(labels), LENGTHS)


def test_masks_that_transformers_makes_are_tried_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, (embeds, _, labels) = tiny_llm("mistral", sliding_window=25), padded()
    row, wanted = in_a_row(embeds), in_a_row(labels)
    predict(llm, row[:, -29:], None, wanted[:, -29:], LENGTHS[-2:])
    # A model that forgets the positions as it makes its masks.
    own = modeling_mistral.create_sliding_window_causal_mask
    forgetful = lambda **given: own(**given | {"position_ids": None})  # noqa: E731
    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", forgetful)
    with pytest.raises(VlmError, match="carries what it has read"):
        predict(llm, row, None, wanted, LENGTHS)


def test_lengths_that_do_not_add_up_are_refused() -> None:
    llm, (embeds, _, _) = tiny_llm(), padded()
    for row, lengths in ((in_a_row(embeds), (30, 20)), (embeds, LENGTHS), (in_a_row(embeds), (79, 0))):
        with pytest.raises(VlmError, match="packed=True"):
            predict(llm, row, None, None, lengths)


def test_no_mask_of_all_tokens_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(value: object) -> object:
        assert not isinstance(value, SampleMask)
        return value

    monkeypatch.setattr(text_packing, "_dense", kept)
    llm, (embeds, _, labels) = tiny_llm(), padded()
    predict(llm, in_a_row(embeds), None, in_a_row(labels), LENGTHS)


def test_the_mask_stands_for_what_it_says() -> None:
    mask = SampleMask.of((3, 2), torch.device("cpu"))
    assert mask.shape == (1, 1, 5, 5)
    wanted = torch.block_diag(torch.ones(3, 3).tril(), torch.ones(2, 2).tril()).bool()
    assert torch.equal(mask & True, wanted[None, None])
    query, key, value = torch.randn(3, 1, 4, 5, 8).unbind()
    found = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=wanted, scale=0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(VlmError, match="within one row"):
        scaled_dot_product_attention(query[:, :, :2], key, value, attn_mask=mask)


def test_a_packed_collate_gives_the_loss_of_the_padded_one(clip: Encoder, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(4)
    connector, llm = MLP(32, 32), tiny_llm()
    processor = VLMProcessor(clip, connector, tokenizer)
    pixels = torch.randint(0, 255, (2, 40, 40, 3), dtype=torch.uint8).numpy()
    samples = [
        processor.sample(
            [{"role": "user", "content": "<image>\nw1 w2"}, {"role": "assistant", "content": text}], [image]
        )
        for text, image in zip(("w3 w4", "w5 w6 w7 w8"), pixels, strict=True)
    ]
    samples.append(processor.sample([{"role": "user", "content": "w9"}, {"role": "assistant", "content": "w10"}]))
    model = VisionLanguageModel(clip, connector, llm, image_token_id=processor.image_token_id).eval()
    apart, packed = processor.collate(samples), processor.collate(samples, packed=True)
    assert packed["lengths"] == [len(sample.input_ids) for sample in samples]
    assert packed["input_ids"].shape == packed["labels"].shape == (1, sum(packed["lengths"]))
    assert int(packed["attention_mask"].sum()) == int(apart["attention_mask"].sum())
    all_supervised = replace(samples[2], labels=samples[2].input_ids)
    assert processor.collate([samples[2], all_supervised], packed=True)["labels"][0, len(all_supervised.labels)] == -100
    wanted, found = model(**apart), model(**packed)
    assert found.num_supervised == wanted.num_supervised
    torch.testing.assert_close(found.loss, wanted.loss, rtol=0, atol=1e-6)
