"""Units: an encoder of several has a policy for each, and what trains less than a unit trains that alone."""

import dataclasses
from collections.abc import Iterator

import pytest
import timm
import timm.optim
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from connectors import MLP, build_connector
from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.fused import FusedEncoder
from vlm_encoders.encoders.transformers_backend import TransformersEncoder
from vlm_encoders.registry import create_encoder
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.testing import tiny_llm
from vlm_encoders.training.optim import build_optimizer, parameter_groups
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.published import STAGES
from vlm_encoders.vlm.stages import PartPolicy, StagePolicy, apply_stage
from vlm_encoders.vlm.units import unit_parameters, units

TRAIN = PartPolicy("train", lr=1e-3)
FROZEN = PartPolicy()


def build(spec: EncoderSpec, seed: int) -> Encoder:
    torch.manual_seed(seed)
    return TransformersEncoder.build(spec, pretrained=False, dtype=torch.float32)


def plug(encoder: Encoder, llm: nn.Module) -> VisionLanguageModel:
    torch.manual_seed(5)
    return VisionLanguageModel(encoder, MLP(encoder.token_spec.dim, 32), llm, image_token_id=70)


@pytest.fixture
def fused(clip_spec: EncoderSpec, llama: LlamaForCausalLM) -> VisionLanguageModel:
    """Two CLIPs, of three and of five kept blocks, as one encoder of 16 tokens."""
    deeper = dataclasses.replace(clip_spec, num_layers=6)
    return plug(FusedEncoder([build(clip_spec, 1), build(deeper, 2)]), llama)


def trained(model: VisionLanguageModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def step(model: VisionLanguageModel) -> set[str]:
    """Take a step and name what moved."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(3))
    ids[0, 1:17] = 70
    pixels = torch.randn(1, *model.encoder.pixel_shape, generator=torch.Generator().manual_seed(4))
    optimizer = build_optimizer(model, learning_rate=0.1)
    loss = model(ids, labels=ids.masked_fill(ids == 70, -100), pixel_values=pixels).loss
    assert loss is not None
    loss.backward()
    optimizer.step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def test_each_encoder_of_several_follows_its_own_policy(fused: VisionLanguageModel) -> None:
    second = PartPolicy("train", lr=2e-6, last_blocks=2, weight_decay=0.3)
    apply_stage(fused, StagePolicy("s", (FROZEN, second), TRAIN)).train()
    first, other = fused.encoder.parts  # type: ignore[attr-defined]
    inside = [each for block in other.blocks()[-2:] for each in block.parameters()]
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert {id(each) for each in other.parameters() if each.requires_grad} == {id(each) for each in inside}
    fused.eval()
    fused.train()
    assert not any(module.training for module in first.modules())
    assert [block.training for block in other.blocks()] == [False, False, False, True, True]
    groups = parameter_groups(fused, learning_rate=None, weight_decay=0.1)
    seen = {(group["unit"], group["part"], group["lr"], group["weight_decay"]) for group in groups}
    assert seen == {("connector", "connector", 1e-3, 0.1), ("connector", "connector", 1e-3, 0.0)} | {
        ("encoder.1", "encoder", 2e-6, decay) for decay in (0.3, 0.0)
    }
    moved = {name for name in step(fused) if name.startswith("encoder")}
    assert moved
    assert moved <= {name for name, _ in unit_parameters(fused, units(fused)[1])}
    rows = [(row.unit, row.part, row.mode, row.lr, row.tokens) for row in fused.describe()]
    assert rows[:2] == [
        ("encoder.0", "encoder", "frozen", None, "16 x 32"),
        ("encoder.1", "encoder", "last 2 blocks", 2e-6, "16 x 32"),
    ]
    assert sum(row.parameters for row in fused.describe()) == sum(each.numel() for each in fused.parameters())


def test_one_policy_for_several_encoders_is_each_encoders(fused: VisionLanguageModel) -> None:
    apply_stage(fused, StagePolicy("s", PartPolicy("train", lr=1.0, last_blocks=3)))
    for part in fused.encoder.parts:  # type: ignore[attr-defined]
        assert [all(p.requires_grad for p in block.parameters()) for block in part.blocks()][-3:] == [True] * 3
    assert [unit.name for unit in units(fused)] == ["encoder.0", "encoder.1", "connector", "llm"]
    with pytest.raises(VlmError, match=r"trains the last 4 blocks, the encoder\.0 has 3"):
        apply_stage(fused, StagePolicy("s", PartPolicy("train", lr=1.0, last_blocks=4)))


def test_as_many_policies_as_encoders_are_asked_for(fused: VisionLanguageModel, clip: Encoder) -> None:
    with pytest.raises(VlmError, match=r"has 3 encoder policies, the model has 2 encoders \(fused:clip-small"):
        apply_stage(fused, StagePolicy("s", (TRAIN, TRAIN, TRAIN)))
    single = plug(clip, fused.llm)
    with pytest.raises(VlmError, match="has 2 encoder policies, the model has 1 encoder "):
        apply_stage(single, StagePolicy("s", (TRAIN, TRAIN)))
    apply_stage(single, StagePolicy("s", (TRAIN,)))
    assert all(parameter.requires_grad for parameter in single.encoder.parameters())


def test_each_parameter_is_in_exactly_one_unit(fused: VisionLanguageModel) -> None:
    named = [name for unit in units(fused) for name, _ in unit_parameters(fused, unit)]
    assert sorted(named) == sorted(name for name, _ in fused.named_parameters())


def test_a_half_open_tower_counts_the_layers_of_the_whole_network(llama: LlamaForCausalLM) -> None:
    with torch.device("meta"):
        encoder = create_encoder("clip-vit-l-14-336", pretrained=False)
        model = VisionLanguageModel(encoder, build_connector("mlp", encoder.token_spec, 32), llama, image_token_id=70)
    apply_stage(model, STAGES["sharegpt4v-stage-1"])
    # Its authors' rule: of layers 0 to 23, those from the 12th on, by name; layer 23 is behind feature layer -2.
    names = [name for name, _ in encoder.named_parameters() if ".layers." in name]
    later = {f"encoder.{name}" for name in names if int(name.split(".layers.")[1].split(".")[0]) >= 12}
    assert {name for name in trained(model) if name.startswith("encoder")} == later
    assert next(iter(model.describe())).mode == "last 11 blocks"
    assert len(later) == 11 * 16


@pytest.mark.parametrize(("fraction", "kept"), [(0.5, 2), (0.74, 3), (0.75, 4), (0.99, 5)])
def test_a_fraction_is_rounded_down_and_less_by_what_is_not_kept(
    clip_spec: EncoderSpec, llama: LlamaForCausalLM, fraction: float, kept: int
) -> None:
    encoder = build(dataclasses.replace(clip_spec, num_layers=8, feature_layer=-3), 1)
    model = apply_stage(plug(encoder, llama), StagePolicy("s", PartPolicy("train", lr=1.0, last_blocks=fraction)))
    opened = [next(block.parameters()).requires_grad for block in encoder.blocks()]
    assert opened == [False] * (6 - kept) + [True] * kept
    with pytest.raises(VlmError, match=r"last 0\.25 of 8 blocks of the encoder, of which 2 behind .* none is left"):
        apply_stage(model, StagePolicy("s", PartPolicy("train", lr=1.0, last_blocks=0.25)))


@pytest.mark.parametrize("last", [1, 0.5])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_the_last_layers_of_an_llm_train_alone(clip: Encoder, family: str, last: float) -> None:
    model = plug(clip, tiny_llm(family))
    apply_stage(model, StagePolicy("s", llm=PartPolicy("train", lr=1.0, last_blocks=last))).train()
    stem = "llm.gpt_neox.layers" if family == "gpt_neox" else "llm.model.layers"
    assert trained(model) == {name for name, _ in model.named_parameters() if name.startswith(f"{stem}.1.")}
    assert step(model) <= trained(model)
    assert {name.split(".1.")[0] for name in trained(model)} == {stem}
    assert [module.training for module in model.llm.modules()].count(True) < len(list(model.llm.modules())) / 2


def norms(model: VisionLanguageModel, *inside: nn.Module) -> Iterator[int]:
    for root in inside:
        for module in root.modules():
            if isinstance(module, (nn.LayerNorm, LlamaRMSNorm)):
                yield from map(id, module.parameters())


def test_norms_only_trains_norms_and_nothing_else(clip: Encoder, llama: LlamaForCausalLM) -> None:
    model = plug(clip, llama)
    policy = PartPolicy("train", lr=1e-2, norms_only=True)
    apply_stage(model, StagePolicy("s", policy, llm=policy)).train()
    chosen = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert chosen == set(norms(model, clip, llama))
    assert len(chosen) == 2 * (1 + 3 * 2) + 1 + 2 * 2
    assert step(model) <= trained(model)
    assert {id(dict(model.named_parameters())[name]) for name in step(model)} == chosen
    assert not any(module.training for module in model.modules() if isinstance(module, nn.Linear))
    tail = PartPolicy("train", lr=1e-2, norms_only=True, last_blocks=1)
    apply_stage(model, StagePolicy("s", tail))
    assert {id(each) for each in model.parameters() if each.requires_grad} == set(norms(model, clip.blocks()[-1]))
    with pytest.raises(VlmError, match="trains the norms of the connector alone, which has none"):
        apply_stage(model, StagePolicy("s", connector=policy))


def test_layer_decay_is_that_of_beit_and_timm(llama: LlamaForCausalLM) -> None:
    encoder = create_encoder("timm:vit_tiny_patch16_224", pretrained=False)
    model = plug(encoder, llama)
    apply_stage(model, StagePolicy("s", PartPolicy("train", lr=0.5, layer_decay=0.75)))
    names = {id(parameter): name.partition("network.")[2] for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, learning_rate=None, weight_decay=0.1)
    ours = {names[id(each)]: group["lr"] for group in groups for each in group["params"]}
    whole = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    theirs = timm.optim.param_groups_layer_decay(whole, layer_decay=0.75)
    places = {id(parameter): name for name, parameter in whole.named_parameters()}
    wanted = {places[id(each)]: 0.5 * group["lr_scale"] for group in theirs for each in group["params"]}
    # The last norm is with the head in BEiT, as here, and with the last block in timm; our head is the connector.
    assert {ours.pop(name) for name in ("norm.weight", "norm.bias")} == {0.5}
    for name in ("norm.weight", "norm.bias", "head.weight", "head.bias"):
        del wanted[name]
    assert ours == pytest.approx(wanted, rel=1e-12)
    assert min(ours.values()) == pytest.approx(0.5 * 0.75**13)
    rates = [group["lr"] for group in groups if group["unit"] == "encoder"]
    assert rates == sorted(rates)


def test_layer_decay_of_an_llm_falls_from_the_head_to_the_embedding(clip: Encoder, llama: LlamaForCausalLM) -> None:
    model = plug(clip, llama)
    apply_stage(model, StagePolicy("s", llm=PartPolicy("train", lr=1.0, layer_decay=0.5)))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, learning_rate=None, weight_decay=0.0)
    rates = {names[id(each)]: group["lr"] for group in groups for each in group["params"]}
    assert rates["llm.lm_head.weight"] == rates["llm.model.norm.weight"] == 1.0
    assert {rate for name, rate in rates.items() if ".layers.1." in name} == {0.5}
    assert {rate for name, rate in rates.items() if ".layers.0." in name} == {0.25}
    assert rates["llm.model.embed_tokens.weight"] == 0.125
    one = parameter_groups(model, learning_rate=2.0, weight_decay=0.0)
    assert {group["lr"] for group in one} == {2.0, 1.0, 0.5, 0.25}


def test_a_refused_stage_leaves_the_model_as_it_was(fused: VisionLanguageModel) -> None:
    apply_stage(fused, StagePolicy("s", connector=TRAIN)).train()
    before = trained(fused)
    wrong = StagePolicy("t", (PartPolicy("lora", lr=1.0), PartPolicy("train", lr=1.0, last_blocks=9)), llm=TRAIN)
    with pytest.raises(VlmError, match=r"stage 't' does not fit the model: it trains the last 9 blocks"):
        apply_stage(fused, wrong)
    assert trained(fused) == before
    assert fused.stage is not None
    assert fused.stage.name == "s"
    assert not any("lora" in name for name, _ in fused.named_parameters())
