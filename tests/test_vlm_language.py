"""The last layer at supervised places alone: the loss and gradients are the LLM's own, whatever its family."""

from typing import Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from vlm_encoders.testing import LLM_FAMILIES, tiny_llm
from vlm_encoders.vlm import language, last_layer
from vlm_encoders.vlm.decoder import decoder_layers
from vlm_encoders.vlm.language import predict
from vlm_encoders.vlm.text_packing import rounding

IDS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MIXED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS}
OTHERS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, **IDS)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(alibi=False, **MIXED)),
    "falcon, alibi": lambda: FalconForCausalLM(FalconConfig(alibi=True, **MIXED)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_key_value_heads=2, head_dim=8, **MIXED
        )
    ),
    "llama, eager": lambda: tiny_llm(attn_implementation="eager"),
}
WHOLE = {"gemma2", "llama, eager"}
"""Those that attend by their own function, whose last layer runs in full."""
SUPERVISED = 10


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return OTHERS[name]().eval() if name in OTHERS else tiny_llm(name)


def make_batch(side: Literal["left", "right"] = "right") -> dict[str, Tensor]:
    """Three samples, the second without a supervised token; padding on a side."""
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(3, 30, 32, generator=generator) / 2
    mask, labels = torch.zeros(3, 30, dtype=torch.long), torch.full((3, 30), -100)
    for row, length in enumerate((30, 20, 26)):
        mask[row, :length] = 1
        if row != 1:
            labels[row, length - 4 : length] = torch.randint(3, 60, (4,), generator=generator)
            labels[row, 7] = 9
        if side == "left":
            embeds[row], mask[row], labels[row] = (part[row].roll(30 - length, 0) for part in (embeds, mask, labels))
    return {"inputs_embeds": embeds, "attention_mask": mask, "labels": labels}


def gradients(llm: nn.Module, batch: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    weights = {name: weight for name, weight in llm.named_parameters() if weight.requires_grad}
    inputs = [batch["inputs_embeds"], *weights.values()]
    found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    # What stands at padding reaches no loss, but LLMs may let it see itself.
    return {"": found[0] * batch["attention_mask"][..., None], **dict(zip(weights, found[1:], strict=True))}


def check(llm: nn.Module, batch: dict[str, Tensor], *, seen: int) -> None:
    """Hold loss and gradients to the LLM's own, and the last layer to the tokens that it should see."""
    batch["inputs_embeds"].requires_grad_()
    # The LLM counts positions from the padding, ours from the first real token.
    places = {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    wanted = llm(**batch, **places).loss
    theirs = gradients(llm, batch, wanted)
    # The first step tries whether the layer gives the same at the places; from then on it is known.
    for turn in range(2):
        counts: list[int] = []
        layer = decoder_layers(llm)[-1]
        handle = layer.mlp.register_forward_pre_hook(
            lambda _, args, counts=counts: counts.append(args[0].shape[:2].numel())
        )
        output = predict(llm, *batch.values())
        handle.remove()
        assert counts == [seen] if turn else seen in counts
        torch.testing.assert_close(output.loss, wanted, rtol=0, atol=1e-6)
        ours = gradients(llm, batch, output.loss)
        largest = max(1.0, *(float(gradient.abs().max()) for gradient in theirs.values()))
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-6 * largest, msg=name)
        assert "forward" not in layer.__dict__


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [*LLM_FAMILIES, *OTHERS])
def test_loss_and_gradients_are_those_of_the_llm(name: str, side: Literal["left", "right"]) -> None:
    check(build(name), make_batch(side), seen=90 if name in WHOLE else SUPERVISED)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_adapters_and_gradient_checkpointing_change_nothing(name: str) -> None:
    llm = get_peft_model(build(name), LoraConfig(r=4, target_modules="all-linear"))
    for key, weight in llm.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(weight, std=0.1)
    llm.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    llm.train()
    check(llm, make_batch(), seen=SUPERVISED)
    assert all(layer.gradient_checkpointing for layer in decoder_layers(llm))


def test_more_than_half_supervised_runs_the_layer_in_full() -> None:
    batch = make_batch()
    batch["labels"][0] = 5
    batch["labels"][2, :20] = 6
    check(tiny_llm(), batch, seen=90)


def test_without_gradients_it_is_the_same() -> None:
    llm, batch = tiny_llm(), make_batch()
    wanted = predict(llm, *batch.values())
    with torch.no_grad():
        found = predict(llm, *batch.values())
    assert torch.equal(found.logits, wanted.logits)


def test_a_layer_that_mixes_tokens_behind_its_attention_runs_in_full() -> None:
    llm = tiny_llm()
    # As a convolution over time would.
    llm.model.layers[-1].mlp.register_forward_hook(lambda *given: given[2] + given[2].roll(1, dims=1))
    check(llm, make_batch(), seen=90)


def test_a_layer_that_is_run_twice_runs_in_full() -> None:
    llm = tiny_llm()
    llm.model.layers[0] = llm.model.layers[1]
    batch = make_batch()
    wanted = llm(**batch, use_cache=False).loss
    for _ in range(2):
        torch.testing.assert_close(predict(llm, *batch.values()).loss, wanted, rtol=0, atol=1e-6)


def test_a_layer_whose_forward_was_replaced_is_left_alone() -> None:
    llm, batch = tiny_llm(), make_batch()
    layer = llm.model.layers[-1]
    own = layer.forward
    layer.forward = replaced = lambda *args, **kwargs: own(*args, **kwargs)  # noqa: PLW0108
    torch.testing.assert_close(predict(llm, *batch.values()).loss, llm(**batch).loss, rtol=0, atol=1e-6)
    assert layer.forward is replaced


def test_the_layer_is_as_it_was_after_a_failed_forward() -> None:
    llm, batch = tiny_llm(), make_batch()
    predict(llm, *batch.values())
    layer = llm.model.layers[-1]
    handle = layer.mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict(llm, *batch.values())
    handle.remove()
    assert "forward" not in layer.__dict__
    assert not layer.self_attn.q_proj._forward_hooks
    assert not layer.self_attn.q_proj._forward_pre_hooks
    check(llm, batch, seen=SUPERVISED)


def test_memory_that_runs_out_says_nothing_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, batch = tiny_llm(), make_batch()

    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(last_layer._PrunedForward, "_at_places", run_out)
        with pytest.raises(torch.OutOfMemoryError):
            predict(llm, *batch.values())
    check(llm, batch, seen=SUPERVISED)


def test_dropout_and_autocast_go_with_it() -> None:
    llm, batch = build("gpt2").train(), make_batch()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = (predict(llm, *batch.values()) for _ in range(2))
    assert first.loss.dtype == torch.float32
    assert first.logits.dtype == torch.bfloat16
    assert not torch.equal(first.loss, second.loss)
    second.loss.backward()
    assert all(bool(weight.grad.isfinite().all()) for weight in llm.parameters())


def test_what_may_be_apart_is_what_autocast_rounds() -> None:
    values = torch.zeros(2)
    assert rounding(values) == torch.finfo(torch.float32).eps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Adapters of float32 give outputs of float32 from sums of bfloat16: the last layer is pruned nevertheless.
        assert rounding(values) == torch.finfo(torch.bfloat16).eps
        llm, batch = get_peft_model(tiny_llm(), LoraConfig(r=4, target_modules="all-linear")), make_batch()
        counts: list[int] = []
        for _ in range(2):
            predict(llm, *batch.values())
            mlp = decoder_layers(llm)[-1].mlp
            mlp.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[:2].numel()))
    assert counts == [SUPERVISED]


@pytest.mark.parametrize("lengths", [None, [45, 45]])
@pytest.mark.parametrize("part", ["whole", "module", "layers"])
def test_a_compiled_llm_gives_its_own_loss(part: str, lengths: list[int] | None) -> None:
    llm, batch = tiny_llm(), make_batch()
    embeds, labels = (
        batch[name] if lengths is None else batch[name].flatten(0, 1)[None] for name in ("inputs_embeds", "labels")
    )
    wanted = predict(llm, embeds, None, labels, lengths).loss
    compiled = torch.compile(llm, backend="eager") if part == "whole" else llm
    for module in {"whole": [], "module": [llm.model], "layers": llm.model.layers}[part]:
        module.compile(backend="eager")
    found = predict(compiled, embeds, None, labels, lengths).loss
    torch._dynamo.reset()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lengths", [None, [45, 45]])
def test_the_balancing_loss_of_experts_is_left_out(lengths: list[int] | None) -> None:
    batch = make_batch("left")
    inputs = list(batch.values())
    if lengths is not None:
        inputs = [part.flatten(0, 1)[None] for part in inputs]
    llms = [build("qwen3_moe"), build("qwen3_moe")]
    llms[1].config.output_router_logits = True
    wanted, found = (predict(llm, *inputs, lengths).loss for llm in llms)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("lengths", [None, [45, 45]])
def test_the_first_step_under_autocast_gives_every_weight_its_gradient(lengths: list[int] | None) -> None:
    llm, batch = tiny_llm().train(), make_batch()
    embeds, labels = (
        batch[name] if lengths is None else batch[name].flatten(0, 1)[None] for name in ("inputs_embeds", "labels")
    )
    found = []
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = predict(llm, embeds, None, labels, lengths).loss
        found.append(torch.autograd.grad(loss, list(llm.model.layers.parameters())))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
        assert bool(first.any())


def test_the_loss_of_many_tokens_is_summed_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "_CHUNK", 8)
    logits = torch.randn(30, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.arange(30)
    wanted = F.cross_entropy(logits, targets)
    found = language._mean_loss(logits, targets)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    gradients_ = [torch.autograd.grad(loss, logits)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients_, rtol=0, atol=1e-8)
