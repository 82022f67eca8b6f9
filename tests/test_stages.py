"""Stages: what trains, what is held, and that both are so in the tensors."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from connectors import MLP
from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.stages import (
    PARTS,
    STAGE_1,
    STAGE_2,
    STAGE_2_LORA,
    STAGE_3,
    STAGES,
    Part,
    PartPolicy,
    StagePolicy,
    apply_stage,
    trainable_parameters,
)

IMAGE = 70
LORA = StagePolicy("lora-4", connector=PartPolicy("train", lr=1e-3), llm=PartPolicy("lora", lr=1e-3, lora_rank=4))


@pytest.fixture
def model(clip: Encoder, llama: LlamaForCausalLM) -> VisionLanguageModel:
    """A model with a newline vector, and dropout in encoder and LLM."""
    for part in (clip, llama):
        for module in list(part.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and name in {"fc2", "down_proj"}:
                    setattr(module, name, nn.Sequential(child, nn.Dropout(0.5)))
    torch.manual_seed(1)
    layout = TileLayout(unpad=True, newline=True)
    return VisionLanguageModel(clip, MLP(32, 32), llama, image_token_id=IMAGE, layout=layout)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (1, 24), generator=generator)
    ids[0, 1:18] = IMAGE
    labels = torch.full_like(ids, -100)
    labels[0, 19:] = ids[0, 19:]
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}


def snapshot(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def step(model: VisionLanguageModel) -> None:
    trained = [parameter for named in trainable_parameters(model).values() for _, parameter in named]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    loss = model(**batch()).loss
    assert loss is not None
    loss.backward()
    optimizer.step()


def changed(model: VisionLanguageModel, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("stage", [STAGE_1, STAGE_2, STAGE_3], ids=lambda stage: stage.name)
def test_a_stage_trains_whole_parts_and_holds_the_others(model: VisionLanguageModel, stage: StagePolicy) -> None:
    apply_stage(model, stage).train()
    before = snapshot(model)
    for part in PARTS:
        trains = stage.part(part).mode == "train"
        module = model.part_module(part)
        assert {parameter.requires_grad for _, parameter in model.part_parameters(part)} == {trains}
        assert {each.training for each in module.modules()} == {trains}
        assert [name for name, _ in trainable_parameters(model)[part]] == (
            [name for name, _ in model.part_parameters(part)] if trains else []
        )
    step(model)
    moved = changed(model, before)
    expected = {part for part in PARTS if stage.part(part).mode == "train"}
    assert {name.partition(".")[0] for name in moved} == expected
    assert "connector.newline" in moved
    assert model.trained == expected


def test_a_frozen_part_stays_in_eval_through_every_call_of_train(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1)
    for call in (model.train, model.eval, lambda: model.train(mode=True), lambda: nn.Module.train(model, True)):
        call()
    model.train()
    assert not any(module.training for part in (model.encoder, model.llm) for module in part.modules())
    first, second = (model(**batch()).loss for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert model.training
    model.eval()
    assert not any(module.training for module in model.modules())


def test_the_newline_is_the_connectors(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1)
    assert [name for name, _ in trainable_parameters(model)["connector"]][-1] == "connector.newline"
    apply_stage(model, StagePolicy("llm-only", llm=PartPolicy("train", lr=1e-5)))
    assert not model.newline.requires_grad
    assert trainable_parameters(model)["connector"] == []


def test_last_blocks_train_alone_and_in_train_mode(model: VisionLanguageModel) -> None:
    stage = StagePolicy("last", PartPolicy("train", lr=1e-4, last_blocks=2), PartPolicy("train", lr=1e-3))
    apply_stage(model, stage).train()
    blocks = model.encoder.blocks()
    assert len(blocks) == 3
    inside = {id(parameter) for block in blocks[1:] for parameter in block.parameters()}
    for parameter in model.encoder.parameters():
        assert parameter.requires_grad is (id(parameter) in inside)
    assert all(module.training for block in blocks[1:] for module in block.modules())
    held = set(model.encoder.modules()) - {module for block in blocks[1:] for module in block.modules()}
    assert not any(module.training for module in held)
    before = snapshot(model)
    step(model)
    moved = {name for name in changed(model, before) if name.startswith("encoder")}
    assert moved
    assert {name.split("layers.")[1][0] for name in moved} == {"1", "2"}
    with pytest.raises(VlmError, match="trains the last 4 blocks, the encoder has 3"):
        apply_stage(model, StagePolicy("all", PartPolicy("train", lr=1e-4, last_blocks=4)))


def test_lora_adapts_the_llm_alone(model: VisionLanguageModel) -> None:
    names = {name.rpartition(".")[2] for name, _ in model.encoder.named_modules()}
    assert {"q_proj", "k_proj", "v_proj"} <= names
    apply_stage(model, LORA).train()
    trained = trainable_parameters(model)
    assert trained["encoder"] == []
    assert trained["llm"]
    assert all(name.startswith("llm.") and ".lora_" in name for name, _ in trained["llm"])
    assert not any("lora" in name for name, _ in model.encoder.named_parameters())
    assert {parameter.shape[0] for name, parameter in trained["llm"] if "lora_A" in name} == {4}
    before = snapshot(model)
    step(model)
    step(model)
    moved = changed(model, before)
    adapters = {name for name, _ in trained["llm"]}
    assert {name for name in moved if name.startswith("llm.")} == adapters
    assert not any(name.startswith("encoder") for name in moved)
    assert model.trained == {"connector", "adapter"}
    assert STAGE_2_LORA.llm.lora_rank == 128


def test_an_untrained_adapter_changes_no_logit(model: VisionLanguageModel) -> None:
    model.eval()
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    with torch.no_grad():
        before = model(**inputs).logits
        apply_stage(model, LORA)
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("first", [STAGE_1, STAGE_2, STAGE_3, LORA], ids=lambda stage: stage.name)
@pytest.mark.parametrize("second", [STAGE_1, STAGE_2, STAGE_3, LORA], ids=lambda stage: stage.name)
def test_a_stage_after_another_is_as_if_it_came_first(
    model: VisionLanguageModel, first: StagePolicy, second: StagePolicy
) -> None:
    apply_stage(model, first).train()
    apply_stage(model, second).train()
    for part in PARTS:
        mode = second.part(part).mode
        for name, parameter in model.part_parameters(part):
            assert parameter.requires_grad is (mode == "train" or (mode == "lora" and "lora_" in name))
        assert {module.training for module in model.part_module(part).modules()} == {mode != "frozen"}
    before = snapshot(model)
    step(model)
    assert changed(model, before) <= {name for named in trainable_parameters(model).values() for name, _ in named}


def test_training_the_llm_after_lora_merges_the_adapters(model: VisionLanguageModel) -> None:
    apply_stage(model, LORA).train()
    step(model)
    model.eval()
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    with torch.no_grad():
        before = model(**inputs).logits
        apply_stage(model, STAGE_2)
        after = model(**inputs).logits
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert isinstance(model.llm, LlamaForCausalLM)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_adapters_of_another_rank_are_refused(model: VisionLanguageModel) -> None:
    apply_stage(model, LORA)
    with pytest.raises(VlmError, match=r"adapters of rank 4, the stage asks for 128; merge them first"):
        apply_stage(model, STAGE_2_LORA)


def test_no_graph_is_kept_for_a_frozen_encoder_and_one_for_a_trained(model: VisionLanguageModel) -> None:
    pixels = batch()["pixel_values"]
    apply_stage(model, STAGE_1).train()
    assert model.encoder(pixels).tokens.grad_fn is None
    apply_stage(model, STAGE_3).train()
    assert model.encoder(pixels).tokens.grad_fn is not None


def test_a_stage_keeps_the_mode_of_a_model_in_eval(model: VisionLanguageModel) -> None:
    model.eval()
    apply_stage(model, LORA)
    assert not any(module.training for module in model.modules())


def test_describe_says_what_is_so(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    encoder, connector, llm = model.describe()
    size = sum(parameter.numel() for parameter in model.connector.parameters())
    assert size == 2 * (32 * 32 + 32) + 32
    assert (connector.parameters, connector.trainable, connector.lr, connector.mode) == (size, size, 1e-3, "train")
    assert (encoder.trainable, encoder.lr, encoder.mode, encoder.tokens) == (0, None, "frozen", "16 x 32")
    assert encoder.module == "TransformersEncoder (clip-small)"
    assert (llm.module, llm.dtype, llm.tokens) == ("LlamaForCausalLM", "float32", "")
    assert sum(row.parameters for row in model.describe()) == sum(each.numel() for each in model.parameters())
    model.llm.to(torch.bfloat16)
    model.llm.requires_grad_(True)
    llm = model.describe()[2]
    assert (llm.trainable, llm.dtype) == (llm.parameters, "bfloat16")
    printed = str(model.describe()).splitlines()
    assert [line.split()[0] for line in printed] == ["part", "encoder", "connector", "llm"]
    assert "0.001" in printed[2]
    assert "mlp" in printed[2]


def test_the_four_stages_train_what_they_always_did() -> None:
    modes: dict[str, dict[Part, str]] = {
        name: {part: STAGES[name].part(part).mode for part in PARTS} for name in list(STAGES)[:4]
    }
    assert modes == {
        "stage-1": {"encoder": "frozen", "connector": "train", "llm": "frozen"},
        "stage-2": {"encoder": "frozen", "connector": "train", "llm": "train"},
        "stage-2-lora": {"encoder": "frozen", "connector": "train", "llm": "lora"},
        "stage-3": {"encoder": "train", "connector": "train", "llm": "train"},
    }
    assert copy.deepcopy(STAGE_1) == STAGE_1
