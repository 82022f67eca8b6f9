"""Each kind of policy through the loop: what it trains moves, the rest stays, and a resume goes on to the bit."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from connectors import build_connector
from vlm_encoders.encoders.fused import FusedEncoder
from vlm_encoders.encoders.transformers_backend import TransformersEncoder
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.training import ConversationDataset, TrainConfig, Trainer
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import VLMProcessor
from vlm_encoders.vlm.stages import PartPolicy, StagePolicy, apply_stage
from vlm_encoders.vlm.units import unit_parameters, units

FROZEN, TRAIN = PartPolicy(), PartPolicy("train", lr=1e-3)
DORA = PartPolicy("dora", lr=1e-3, lora_rank=2, lora_dropout=0.2)
STAGES = [
    StagePolicy("adapters", (FROZEN, DORA), DORA, dataclasses.replace(DORA, mode="rslora")),
    StagePolicy(
        "partial",
        (
            PartPolicy("train", lr=1e-3, norms_only=True),
            PartPolicy("train", lr=1e-3, layer_decay=0.8, weight_decay=0.1),
        ),
        TRAIN,
        PartPolicy("train", lr=1e-3, last_blocks=0.5, layer_decay=0.5),
    ),
]
UNITS = {
    "adapters": {"encoder.1", "connector", "llm"},
    "partial": {"encoder.0", "encoder.1", "connector", "llm"},
}


@pytest.fixture
def parts(
    clip_spec: EncoderSpec, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> tuple[VisionLanguageModel, VLMProcessor]:
    torch.manual_seed(4)
    kind = {"pretrained": False, "dtype": torch.float32}
    encoder = FusedEncoder([TransformersEncoder.build(clip_spec, **kind) for _ in range(2)])  # type: ignore[arg-type]
    connector = build_connector("mlp", encoder.token_spec, 32)
    processor = VLMProcessor(encoder, connector, tokenizer)
    return VisionLanguageModel(encoder, connector, llama, image_token_id=processor.image_token_id), processor


@pytest.fixture
def data(tmp_path: Path) -> Path:
    records = []
    for index in range(6):
        Image.new("RGB", (28, 28), (40 * index, 200 - 40 * index, 90)).save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": "<image> w40"}, {"from": "gpt", "value": f"w{index} w{index + 1}"}]
        records.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_policy_trains_what_it_says_and_goes_on_where_it_was(parts: Any, data: Path, stage: StagePolicy) -> None:
    model, processor = parts
    samples = ConversationDataset(data, data.parent, processor)

    def trainer(output: str) -> Trainer:
        config = TrainConfig(
            data=str(data),
            output=str(data.parent / output),
            stage=stage.name,
            steps=4,
            batch_size=2,
            save_every=2,
            cpu=True,
            progress=False,
            tracker="none",
        )
        torch.manual_seed(0)
        return Trainer(apply_stage(copy.deepcopy(model), stage), processor, samples, config)

    whole = trainer("whole")
    before = {name: parameter.detach().clone() for name, parameter in whole.model.named_parameters()}
    result = whole.fit()
    moved = {name for name, each in whole.model.named_parameters() if not torch.equal(each, before[name])}
    assert moved <= {name for name, each in whole.model.named_parameters() if each.requires_grad}
    named = {unit.name: {name for name, _ in unit_parameters(whole.model, unit)} for unit in units(whole.model)}
    assert {unit for unit, names in named.items() if names & moved} == UNITS[stage.name]
    assert result.moved == {"encoder": True, "connector": True, "llm": True}
    again = trainer("again")
    resumed = again.fit(resume=data.parent / "whole" / "step-000002")
    assert resumed.losses == result.losses
    for name, each in again.model.named_parameters():
        assert torch.equal(each, dict(whole.model.named_parameters())[name]), name
