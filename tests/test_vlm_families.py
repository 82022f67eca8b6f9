"""The model over the families of causal LMs: its loss, gradients and text are the LLM's own."""

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from connectors import MLP
from connectors.errors import UnknownNameError
from vlm_encoders.encoder import Encoder
from vlm_encoders.testing import LLM_FAMILIES, tiny_llm
from vlm_encoders.vlm.model import VisionLanguageModel

IMAGE = 70
TOKENS = 16


def build(encoder: Encoder, llm: nn.Module) -> VisionLanguageModel:
    torch.manual_seed(4)
    return VisionLanguageModel(encoder, MLP(32, 32), llm, image_token_id=IMAGE).eval()


def make_batch(length: int = 30) -> dict[str, Tensor]:
    """Two samples of one image, the second padded on the right."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (2, length), generator=generator)
    ids[0, 2 : 2 + TOKENS] = IMAGE
    ids[1, 5 : 5 + TOKENS] = IMAGE
    ids[1, 26:] = 0
    mask = torch.ones_like(ids)
    mask[1, 26:] = 0
    labels = torch.full_like(ids, -100)
    labels[0, 21:30] = ids[0, 21:30]
    labels[1, 22:26] = ids[1, 22:26]
    pixels = torch.randn(2, 3, 28, 28, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def embeddings(model: VisionLanguageModel, batch: dict[str, Tensor]) -> Tensor:
    """Put image embeddings among those of the text, one place after the other."""
    ids = batch["input_ids"]
    text = model.llm.get_input_embeddings()(ids.clamp(max=63)).clone()
    images = torch.cat(model.embed_images(batch["pixel_values"]))
    number = 0
    for row in range(ids.shape[0]):
        for place in range(ids.shape[1]):
            if ids[row, place] == IMAGE:
                text[row, place] = images[number]
                number += 1
    return text


def gradients(model: VisionLanguageModel) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.connector.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("family", LLM_FAMILIES)
def test_loss_and_connector_gradients_are_those_of_the_llm(family: str, clip: Encoder) -> None:
    model, batch = build(clip, tiny_llm(family)), make_batch()
    reference = model.llm(
        inputs_embeds=embeddings(model, batch), attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss
    reference.backward()
    wanted = gradients(model)
    model.zero_grad()
    output = model(**batch)
    assert output.loss is not None
    output.loss.backward()
    assert output.logits.shape == (13, 64)
    torch.testing.assert_close(output.loss, reference, rtol=0, atol=1e-6)
    assert len(wanted) == 4
    for ours, theirs in zip(gradients(model), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", LLM_FAMILIES)
def test_greedy_generate_is_the_argmax_of_forward(family: str, clip: Encoder) -> None:
    model, batch = build(clip, tiny_llm(family)), make_batch()
    ids, pixels = batch["input_ids"][:1, :24], batch["pixel_values"][:1]
    wanted = ids
    with torch.no_grad():
        for _ in range(6):
            following = model(wanted, pixel_values=pixels).logits[:, -1].argmax(-1, keepdim=True)
            wanted = torch.cat([wanted, following], dim=1)
    made = model.generate(ids, pixel_values=pixels, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert made.tolist() == wanted[:, 24:].tolist()


@pytest.mark.parametrize("family", LLM_FAMILIES)
def test_other_pixels_give_other_logits_behind_the_image_alone(family: str, clip: Encoder) -> None:
    model, batch = build(clip, tiny_llm(family)), make_batch()
    ids, pixels = batch["input_ids"][:1], batch["pixel_values"]
    with torch.no_grad():
        first = model(ids, pixel_values=pixels[:1]).logits[0]
        second = model(ids, pixel_values=pixels[1:]).logits[0]
    assert torch.equal(first[:2], second[:2])
    assert (first[2:] - second[2:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("family", LLM_FAMILIES)
def test_left_padding_does_not_change_logits(family: str, clip: Encoder) -> None:
    model, batch = build(clip, tiny_llm(family)), make_batch()
    check_left_padding(model, batch)


def test_positions_are_counted_from_the_first_real_token(clip: Encoder) -> None:
    # GPT-2 learns positions, so an offset of the padding shows; the rotary families hide it.
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    torch.manual_seed(5)
    llm = GPT2LMHeadModel(config).eval()
    nn.init.normal_(llm.transformer.wpe.weight)
    check_left_padding(build(clip, llm), make_batch())


def check_left_padding(model: VisionLanguageModel, batch: dict[str, Tensor]) -> None:
    short = batch["input_ids"][1:, :26]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)
    ids = torch.cat([batch["input_ids"][:1], padded])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        together = model(ids, mask, pixel_values=batch["pixel_values"]).logits
        alone = model(short, pixel_values=batch["pixel_values"][1:]).logits
        torch.testing.assert_close(together[1, 4:], alone[0], rtol=0, atol=1e-5)
        made = model.generate(ids, mask, pixel_values=batch["pixel_values"], max_new_tokens=4, do_sample=False)
        one = model.generate(short, pixel_values=batch["pixel_values"][1:], max_new_tokens=4, do_sample=False)
    assert made[1, : one.shape[1]].tolist() == one[0].tolist()


def test_soft_capped_logits_stay_capped(clip: Encoder) -> None:
    model, batch = build(clip, tiny_llm("gemma2", final_logit_softcapping=0.05)), make_batch()
    output = model(**batch)
    reference = model.llm(
        inputs_embeds=embeddings(model, batch), attention_mask=batch["attention_mask"], labels=batch["labels"]
    )
    assert output.logits.abs().max() > 0.045
    assert output.logits.abs().max() <= 0.05
    torch.testing.assert_close(output.loss, reference.loss, rtol=0, atol=1e-6)


def test_an_llm_that_does_not_call_its_head_gives_the_same_loss(clip: Encoder) -> None:
    llm = tiny_llm()
    model, batch = build(clip, llm), make_batch()
    wanted = model(**batch)
    head = llm.get_output_embeddings()

    class Uncalled(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return nn.functional.linear(hidden, head.weight)

    llm.lm_head = Uncalled()
    llm.get_output_embeddings = lambda: head
    output = model(**batch)
    assert torch.equal(output.logits, wanted.logits)
    assert torch.equal(output.loss, wanted.loss)


def test_the_head_is_as_it_was_after_a_failed_forward(clip: Encoder) -> None:
    model, batch = build(clip, tiny_llm()), make_batch()
    handle = model.llm.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    handle.remove()
    assert model(batch["input_ids"], pixel_values=batch["pixel_values"]).logits.shape == (2, 30, 64)


def test_tiny_llm_is_reproducible_and_leaves_the_random_state(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first, second, other = tiny_llm("phi"), tiny_llm("phi"), tiny_llm("phi", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    weights = [llm.get_input_embeddings().weight for llm in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not first.training
    with pytest.raises(UnknownNameError, match="qwen2"):
        tiny_llm("qwen")
