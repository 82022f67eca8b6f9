"""Optimizer groups: each trained parameter once, at the rate of its part."""

from typing import Any

import pytest
import torch
from torch import nn

from connectors import MLP, TokenSpec, build_connector
from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.registry import create_encoder
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.training.optim import (
    _NO_DECAY,
    build_optimizer,
    parameter_groups,
)
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.stages import (
    STAGE_1,
    STAGE_2_LORA,
    STAGE_3,
    PartPolicy,
    StagePolicy,
    apply_stage,
    trainable_parameters,
)


@pytest.fixture
def model(clip: Encoder, llama: Any) -> VisionLanguageModel:
    torch.manual_seed(3)
    return VisionLanguageModel(clip, MLP(32, 32), llama, image_token_id=60, layout=TileLayout(unpad=True, newline=True))


@pytest.mark.parametrize("stage", [STAGE_1, STAGE_2_LORA, STAGE_3])
def test_each_trained_parameter_is_in_one_group_at_the_rate_of_its_part(
    model: VisionLanguageModel, stage: StagePolicy
) -> None:
    apply_stage(model, stage)
    groups = parameter_groups(model, learning_rate=None, weight_decay=0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    wanted = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(wanted)
    for group in groups:
        assert group["lr"] == stage.part(group["part"]).lr
    for part, named in trainable_parameters(model).items():
        ids = {id(parameter) for _, parameter in named}
        assert {group["part"] for group in groups if ids & {id(p) for p in group["params"]}} <= {part}


def test_norms_biases_and_learned_tokens_do_not_decay(model: VisionLanguageModel) -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.zeros(1, 4, 32))
            self.weight = nn.Parameter(torch.zeros(4, 4))

    model.connector.extra = Queries()
    apply_stage(model, STAGE_1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, learning_rate=0.5, weight_decay=0.1)
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert {group["lr"] for group in groups} == {0.5}
    assert decay["connector.newline"] == decay["connector.extra.queries"] == 0.0
    assert decay["connector.extra.weight"] == 0.1
    for name, value in decay.items():
        if name.endswith("bias"):
            assert value == 0.0


TIMM = {"timm:vit_small_patch14_reg4_dinov2", "timm:samvit_base_patch16"}


def test_the_words_for_no_decay_are_those_of_our_parameters() -> None:
    names = {"clip-vit-b-32", "dinov2-vit-s-14-reg", "openclip-vit-b-32-laion2b", "swin-t-224", "sam-vit-b", *TIMM}
    with torch.device("meta"):
        parts = [create_encoder(name, pretrained=False) for name in names]
        connectors = [build_connector(name, TokenSpec(4, 768, (2, 2)), 768) for name in ("perceiver", "qformer")]
    named = [pair for part in (*parts, *connectors) for pair in part.named_parameters()]
    for word in _NO_DECAY:
        assert [name for name, parameter in named if word in name and parameter.ndim > 1], word
    learned = [name for name, parameter in named if parameter.ndim > 1 and not name.endswith("weight")]
    assert not [name for name in learned if not any(word in name for word in _NO_DECAY)]


def test_the_optimizer_holds_no_frozen_weight(model: VisionLanguageModel) -> None:
    optimizer = build_optimizer(apply_stage(model, STAGE_1))
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for _, parameter in model.part_parameters("connector")}


def test_without_a_stage_nothing_says_what_trains(model: VisionLanguageModel) -> None:
    with pytest.raises(VlmError, match="no stage"):
        build_optimizer(model)


def test_a_stage_that_trains_nothing_is_refused(model: VisionLanguageModel) -> None:
    with pytest.raises(VlmError, match="stage 'nothing' trains nothing"):
        build_optimizer(apply_stage(model, StagePolicy("nothing")))


def test_a_frozen_part_that_was_unfrozen_is_caught(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1)
    next(model.llm.parameters()).requires_grad_(True)
    with pytest.raises(VlmError, match="froze the llm, but 1 of its parameters require a gradient"):
        build_optimizer(model)


@pytest.mark.parametrize(
    ("policy", "words", "stray"),
    [
        (PartPolicy("train", lr=1.0, last_blocks=1), "last 1 block", "encoder.network.encoder.layers.0"),
        (PartPolicy("train", lr=1.0, norms_only=True), "norms", "encoder.network.encoder.layers.0.mlp.fc1.weight"),
        (PartPolicy("lora", lr=1.0, lora_rank=2), "lora r=2", "encoder.network.encoder.layers.0.mlp.fc1.base_layer"),
    ],
    ids=["blocks", "norms", "adapters"],
)
def test_what_a_part_holds_frozen_beside_what_trains_is_caught(
    model: VisionLanguageModel, policy: PartPolicy, words: str, stray: str
) -> None:
    apply_stage(model, StagePolicy("s", policy))
    weight = next(parameter for name, parameter in model.named_parameters() if name.startswith(stray))
    weight.requires_grad_(True)
    with pytest.raises(VlmError, match=rf"froze the encoder but for {words}, but 1 of its parameters .*'{stray}"):
        build_optimizer(model)


def test_a_policys_own_decay_stands_over_the_runs(model: VisionLanguageModel) -> None:
    apply_stage(
        model, StagePolicy("s", connector=PartPolicy("train", lr=1.0), llm=PartPolicy("train", 1.0, weight_decay=0))
    )
    groups = parameter_groups(model, learning_rate=None, weight_decay=0.1)
    decays = {(group["unit"], group["part"], group["weight_decay"]) for group in groups}
    assert decays == {("connector", "connector", 0.1), ("connector", "connector", 0.0), ("llm", "llm", 0.0)}


def test_a_trained_part_that_was_frozen_is_caught(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_3)
    model.encoder.requires_grad_(False)
    with pytest.raises(VlmError, match="trains the encoder, but it has no trainable parameter"):
        build_optimizer(model)


def test_a_parameter_outside_the_parts_is_caught(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1)
    model.extra = nn.Linear(2, 2)
    with pytest.raises(VlmError, match=r"2 trained parameters belong to no part, 'extra\.weight' first"):
        build_optimizer(model)


def test_a_parameter_of_two_parts_is_caught(model: VisionLanguageModel) -> None:
    model.connector.shared = model.llm.lm_head
    apply_stage(model, STAGE_3)
    with pytest.raises(VlmError, match="is the same parameter as"):
        build_optimizer(model)


def test_float16_is_not_trained(model: VisionLanguageModel) -> None:
    model.connector.half()
    with pytest.raises(VlmError, match="would train in float16"):
        build_optimizer(apply_stage(model, STAGE_1))
