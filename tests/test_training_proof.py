"""The proof on honest runs: it passes what is right, waits where it must, and names what it saw."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from transformers import LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from connectors import build_connector
from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.training.optim import build_optimizer
from vlm_encoders.training.proving.proof import PROOF_STEPS, Proof, ProofError
from vlm_encoders.vlm.fingerprint import joined_hash, module_hash, tensor_hashes
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.stages import PARTS, STAGE_1, STAGE_2, STAGE_3, PartPolicy, StagePolicy, apply_stage

IMAGE = 70
LORA = StagePolicy("lora-4", connector=PartPolicy("train", lr=1e-3), llm=PartPolicy("lora", lr=1e-3, lora_rank=4))
LAST = StagePolicy("last", PartPolicy("train", lr=1e-4, last_blocks=1), PartPolicy("train", lr=1e-3))
NORMS = StagePolicy("norms", PartPolicy("train", lr=1e-3, norms_only=True), PartPolicy("train", lr=1e-3))


@pytest.fixture
def model(clip: Encoder, llama: LlamaForCausalLM) -> VisionLanguageModel:
    torch.manual_seed(2)
    return VisionLanguageModel(clip, build_connector("mlp", clip.token_spec, 32), llama, image_token_id=IMAGE)


def batch(*, image: bool = True, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (1, 24), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[0, 19:] = ids[0, 19:]
    if not image:
        return {"input_ids": ids, "labels": labels}
    ids[0, 1:17] = IMAGE
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}


def run(
    model: VisionLanguageModel,
    steps: int,
    make: Callable[[int], dict[str, Any]] = lambda step: batch(seed=step),
    optimizer: torch.optim.Optimizer | None = None,
) -> Proof:
    """Take steps with the proof on."""
    optimizer = optimizer or build_optimizer(model)
    proof = Proof(model)
    proof.attach(optimizer)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = model(**make(step)).loss
        if not loss.requires_grad:
            loss = loss + 0.0 * sum(each.sum() for each in model.connector.parameters())
        loss.backward()
        proof.after_backward(step)
        optimizer.step()
        proof.after_step(step)
    return proof


@pytest.mark.parametrize("stage", [STAGE_1, STAGE_2, STAGE_3, LORA, LAST, NORMS], ids=lambda stage: stage.name)
def test_each_stage_passes_without_a_word(model: VisionLanguageModel, stage: StagePolicy) -> None:
    apply_stage(model, stage).train()
    proof = run(model, 11)
    assert proof.warnings == []
    assert proof.check() == {part: stage.part(part).trains for part in PARTS}
    assert proof.check(model) == proof.check()


def test_no_hook_stays_behind(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    hooks = {name: len(each._forward_hooks) for name, each in model.named_modules()}
    run(model, PROOF_STEPS[-1])
    Proof(model).close()
    proof = run(model, 2)
    assert sum(len(each._forward_hooks) for each in model.modules()) > sum(hooks.values())
    proof.check()
    assert {name: len(each._forward_hooks) for name, each in model.named_modules()} == hooks
    assert not model._forward_pre_hooks


def test_the_frozen_hashes_are_of_what_no_policy_trains(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    proof = Proof(model)
    held = model.encoder.state_dict(prefix="encoder.")
    assert proof.frozen["encoder"] == module_hash(held) == joined_hash(tensor_hashes(held))
    assert proof.frozen["connector"] == module_hash({})
    with torch.no_grad():
        model.encoder.get_parameter(next(model.encoder.named_parameters())[0]).add_(1e-3)
    assert Proof(model).frozen["encoder"] != proof.frozen["encoder"]


def test_text_alone_waits_for_an_image(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    proof = run(model, 3, lambda step: batch(image=step == 3))
    assert proof.check()["connector"]
    apply_stage(model, STAGE_2).train()
    proof = run(model, 10, lambda _: batch(image=False))
    assert proof.warnings == ["after step 10 the connector has had no gradient, as no batch held an image so far"]
    with pytest.raises(
        ProofError, match="the connector, which is to be trained, has not moved: no batch held an image"
    ):
        proof.check()


def test_images_that_come_after_step_10_are_proved_as_they_come(model: VisionLanguageModel) -> None:
    nn.init.zeros_([each for each in model.connector.modules() if isinstance(each, nn.Linear)][-1].weight)
    apply_stage(model, STAGE_3).train()
    proof = run(model, 14, lambda step: batch(image=step > 11, seed=step))
    assert not model._forward_hooks
    assert proof.check() == dict.fromkeys(PARTS, True)


def test_an_image_may_close_the_first_samples(model: VisionLanguageModel) -> None:
    behind = batch()
    behind["input_ids"] = behind["input_ids"].roll(7)
    behind["labels"] = torch.full_like(behind["labels"], -100)
    behind["labels"][0, 1:4] = behind["input_ids"][0, 1:4]
    apply_stage(model, STAGE_1).train()
    assert run(model, 4, lambda step: behind if step < 3 else batch(seed=step)).check()["connector"]


@pytest.mark.parametrize("stage", [STAGE_1, LORA], ids=lambda stage: stage.name)
def test_rotary_frequencies_may_follow_the_length_of_the_text(model: VisionLanguageModel, stage: StagePolicy) -> None:
    torch.manual_seed(0)
    config = Phi3Config(
        **{name: getattr(model.llm.config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")},
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        original_max_position_embeddings=20,
        rope_scaling={"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        pad_token_id=0,
    )
    model = VisionLanguageModel(model.encoder, model.connector, Phi3ForCausalLM(config), image_token_id=IMAGE)
    apply_stage(model, stage).train()
    rotary = next(each for name, each in model.llm.named_modules() if name.endswith("rotary_emb"))
    before = rotary.inv_freq.clone()
    assert run(model, 1).check()["connector"]
    assert not torch.equal(rotary.inv_freq, before)


def test_an_adapters_first_matrix_may_begin_without_a_gradient(model: VisionLanguageModel) -> None:
    apply_stage(model, LORA).train()
    model(**batch()).loss.backward()
    first = [each for name, each in model.named_parameters() if "lora_A" in name]
    assert not any(each.grad.any() for each in first)
    assert run(model, 10).warnings == []


def test_a_connector_that_begins_at_zero_may_hold_the_encoder_for_a_step(model: VisionLanguageModel) -> None:
    last = [each for each in model.connector.modules() if isinstance(each, nn.Linear)][-1]
    nn.init.zeros_(last.weight)
    apply_stage(model, STAGE_3).train()
    assert run(model, 2).check()["encoder"]


def test_a_rate_that_begins_at_zero_waits_and_one_that_stays_does_not(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    optimizer = build_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    proof = run(model, 1, optimizer=optimizer)
    with pytest.raises(ProofError, match=r"at the end of the run the connector.*its learning rate was 0 in the first"):
        proof.check()
    sentence = "after step 10 the connector, which is to be trained, has not moved: its learning rate was 0 in all 10 "
    with pytest.raises(ProofError, match=sentence):
        run(model, 10, optimizer=optimizer)


def test_a_warm_up_below_the_resolution_of_float32_is_no_error(model: VisionLanguageModel) -> None:
    apply_stage(model, NORMS).train()
    proof = run(model, 10, optimizer=slow(model, 1e-9))
    assert proof.warnings == ["after step 10 the encoder has not moved yet, at learning rates up to 1e-09"]
    with pytest.raises(ProofError, match="at the end of the run the encoder, which is to be trained, has not moved"):
        proof.check()


def slow(model: VisionLanguageModel, rate: float) -> torch.optim.Optimizer:
    """Slow down the norms of the encoder, which are 1 and 0, by leaving the zeros out."""
    optimizer = build_optimizer(model)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.fill_(1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate if group["unit"] == "encoder" else group["lr"]
    return optimizer


def test_tensors_that_never_had_a_gradient_are_named(model: VisionLanguageModel) -> None:
    layout = TileLayout(unpad=True, newline=True)
    model = VisionLanguageModel(model.encoder, model.connector, model.llm, image_token_id=IMAGE, layout=layout)
    apply_stage(model, STAGE_1).train()
    model.layout = TileLayout(unpad=False, newline=False)
    proof = run(model, 10)
    assert len(proof.warnings) == 1
    assert "1 of 5 trained tensors of the connector have had no gradient, 'connector.newline'" in proof.warnings[0]


def test_a_gradient_that_is_not_finite_is_named_first_of_all(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    name, weight = next(iter(model.connector.named_parameters()))
    weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(
        ProofError, match=rf"at step 1 the gradient of 'connector.{name}' .* not finite.*lower learning"
    ):
        run(model, 1)


def test_what_the_encoder_gave_is_named_where_it_was_not_finite(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    broken = batch() | {"pixel_values": torch.full((1, 3, 28, 28), torch.inf)}
    with pytest.raises(ProofError, match="the output of the encoder, in float32, was not finite already"):
        run(model, 1, lambda _: broken)


def test_the_optimizer_is_held_to_the_policy(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_2).train()
    proof = Proof(model)
    lacking = torch.optim.SGD(list(model.connector.parameters())[:-1], lr=1.0)
    with pytest.raises(ProofError, match="the optimizer lacks 1 of the 4 tensors of the connector that train"):
        proof.attach(lacking)
    extra = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ProofError, match=r"the optimizer holds 'encoder\..*which is frozen and which weight decay"):
        proof.attach(extra)


def test_an_engine_that_hides_gradients_is_proved_by_the_weights(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    proof = Proof(model)
    proof.attach(None)
    with torch.no_grad():
        next(model.connector.parameters()).add_(1.0)
    assert proof.after_step(1) == []
    assert proof.check()["connector"]


def test_an_engine_that_hides_gradients_waits_for_an_image(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    proof = Proof(model)
    proof.attach(None)
    with torch.no_grad():
        model(**batch(image=False))
    assert proof.after_step(1) == []
    with pytest.raises(ProofError, match="the connector, which is to be trained, has not moved: no batch held an ima"):
        proof.check()


def test_weights_in_bfloat16_that_lose_their_updates_are_told(model: VisionLanguageModel) -> None:
    apply_stage(model, StagePolicy("llm", llm=PartPolicy("train", lr=1e-6))).train()
    model.llm.to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.llm.parameters():
            parameter.fill_(0.5).add_(torch.randn_like(parameter).mul(0.1).clamp(-0.2, 0.2))
    sentence = "the llm, which is to be trained, has not moved: it is held in bfloat16, in which an update below 1/256"
    with pytest.raises(ProofError, match=sentence):
        run(model, 1, optimizer=torch.optim.AdamW(model.llm.parameters(), lr=1e-6, weight_decay=0.0))


def on_two(work: Callable[[int], str], folder: Path) -> list[str]:
    """Run something on two processes of gloo and give what each says."""
    context = torch.multiprocessing.get_context("fork")
    told = context.SimpleQueue()

    def start(rank: int) -> None:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=2)
        told.put((rank, work(rank)))
        distributed.destroy_process_group()

    processes = [context.Process(target=start, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(told.get() for _ in processes)
    for process in processes:
        process.join(30)
    return [found[0], found[1]]


def sentence_of(call: Callable[[], object]) -> str:
    try:
        return str(call())
    except ProofError as error:
        return str(error)


def test_what_one_process_sees_all_say(model: VisionLanguageModel, tmp_path: Path) -> None:
    apply_stage(model, STAGE_1).train()
    weight = next(model.encoder.parameters())

    def work(rank: int) -> str:
        proof = Proof(model)
        proof.attach(build_optimizer(model))
        proof.after_backward(1)
        if rank:
            with torch.no_grad():
                weight.mul_(2.0)
        return sentence_of(lambda: proof.after_step(1))

    first, second = on_two(work, tmp_path)
    assert first == second
    assert "after step 1 frozen weights of the encoder had moved, 'encoder." in first


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "sharded"])
def test_a_process_with_text_alone_passes_beside_one_with_images(
    model: VisionLanguageModel, tmp_path: Path, *, shards: bool
) -> None:
    apply_stage(model, STAGE_1).train()
    frozen = Proof(model).frozen

    def work(rank: int) -> str:
        proof = Proof(model)
        assert proof.frozen == frozen
        if shards:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            for part in (model.connector, model.encoder):
                fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
        optimizer = build_optimizer(model)
        proof.attach(optimizer)
        loss = model(**batch(image=shards or not rank)).loss
        if loss.requires_grad:
            loss.backward()
        for each in model.connector.parameters():
            if not shards:
                each.grad = torch.zeros_like(each) if each.grad is None else each.grad
                distributed.all_reduce(each.grad)
        proof.after_backward(1)
        optimizer.step()
        return sentence_of(lambda: (proof.after_step(1), proof.check()))

    passed = "([], {'encoder': False, 'connector': True, 'llm': False})"
    assert on_two(work, tmp_path) == [passed, passed]


def test_a_proof_error_is_an_error_of_ours() -> None:
    assert issubclass(ProofError, VlmError)
