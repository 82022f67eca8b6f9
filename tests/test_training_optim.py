"""Optimizer groups and the learning-rate schedule."""

import math
from itertools import pairwise
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
    build_schedule,
    cosine_with_warmup,
    parameter_groups,
)
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.stages import STAGE_1, STAGE_2_LORA, STAGE_3, StagePolicy, apply_stage, trainable_parameters


@pytest.fixture
def model(clip: Encoder, llama: Any) -> VisionLanguageModel:
    torch.manual_seed(3)
    return VisionLanguageModel(clip, MLP(32, 32), llama, image_token_id=60, layout=TileLayout(unpad=True, newline=True))


def test_the_schedule_has_the_values_of_its_formula() -> None:
    values = [cosine_with_warmup(step, total=14, warmup=4, floor=0.1) for step in range(16)]
    assert values[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert values[9] == pytest.approx(0.1 + 0.9 * 0.5)
    assert values[14] == pytest.approx(0.1)
    assert values[15] == values[14]
    assert all(earlier > later for earlier, later in pairwise(values[4:15]))


def test_after_the_warm_up_it_is_torchs_cosine() -> None:
    weight = nn.Parameter(torch.zeros(1))
    ours = torch.optim.SGD([weight], lr=0.3)
    theirs = torch.optim.SGD([weight], lr=0.3)
    schedule = build_schedule(ours, kind="cosine", total=20, warmup_ratio=0.0, floor=0.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=20)
    for _ in range(20):
        assert schedule.get_last_lr()[0] == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        for optimizer, line in ((ours, schedule), (theirs, reference)):
            optimizer.step()
            line.step()


def test_a_constant_schedule_warms_up_and_stays() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = build_schedule(optimizer, kind="constant", total=10, warmup_ratio=0.1, floor=0.0)
    rates = []
    for _ in range(5):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_a_run_of_one_step_moves() -> None:
    assert cosine_with_warmup(0, total=1, warmup=math.ceil(0.03)) > 0


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
