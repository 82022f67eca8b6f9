"""The doctor: it tells a model that uses its image from one that does not, and leaves no trace."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from connectors import build_connector
from connectors.errors import VlmError
from vlm_encoders.cli.doctor import run_check
from vlm_encoders.encoder import Encoder
from vlm_encoders.training import ConversationDataset, TrainConfig
from vlm_encoders.training.proving.build_report import build_report, typical_sample
from vlm_encoders.training.proving.doctor import Diagnosis, examine
from vlm_encoders.training.proving.flops import TypicalSample, llm_flops, unit_flops
from vlm_encoders.training.proving.image_use import Difference, ImageUse, image_use, sample_losses
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import VLMProcessor
from vlm_encoders.vlm.stages import STAGE_1, STAGE_2, STAGE_3, PartPolicy, StagePolicy, apply_stage

Parts = tuple[VisionLanguageModel, VLMProcessor]
LORA = StagePolicy("lora-4", connector=PartPolicy("train", lr=1e-3), llm=PartPolicy("lora", lr=1e-3, lora_rank=4))


@pytest.fixture
def parts(clip: Encoder, llama: Any, tokenizer: Any) -> Parts:
    torch.manual_seed(5)
    connector = build_connector("mlp", clip.token_spec, 32)
    processor = VLMProcessor(clip, connector, tokenizer, max_length=64)
    return VisionLanguageModel(clip, connector, llama, image_token_id=processor.image_token_id), processor


def write(folder: Path, answers: list[str], *, images: bool = True) -> Path:
    """Write samples whose pictures are all of other colours."""
    records = []
    for index, answer in enumerate(answers):
        shade = index * 255 // len(answers)
        Image.new("RGB", (28, 28), (shade, 255 - shade, 90)).save(folder / f"{index}.png")
        asked = "<image> w40" if images else "w40"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        records.append({"conversations": turns} | ({"image": f"{index}.png"} if images else {}))
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def diagnose(parts: Parts, data: Path, stage: StagePolicy = STAGE_1, **settings: Any) -> Diagnosis:
    model, processor = parts
    fresh = settings.pop("fresh", None)
    config = TrainConfig(
        data=str(data), output=str(data.parent / "out"), stage=stage.name, batch_size=4, cpu=True, **settings
    )
    dataset = ConversationDataset(data, data.parent, processor, check=False)
    return examine(apply_stage(model, stage), processor, dataset, config, fresh=fresh)


def test_a_healthy_run_passes_and_leaves_no_trace(parts: Parts, tmp_path: Path) -> None:
    model = parts[0]
    data = write(tmp_path, [f"w{index % 5}" for index in range(12)])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = diagnose(parts, data, STAGE_2, learning_rate=1e-3, gradient_checkpointing=True)
    assert found.failures == ()
    assert not any("forward" in vars(each) for each in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(each.grad is not None and each.grad.any() for each in model.parameters())
    assert not any(each._forward_hooks for each in model.modules() if isinstance(each, nn.Linear))
    assert not (tmp_path / "out").exists()
    steps = found.steps
    assert steps is not None
    assert len(steps.losses) == 10
    assert all(map(math.isfinite, steps.losses))
    assert steps.moved == {"encoder": False, "connector": True, "llm": True}
    assert steps.grad_norms.keys() == {"connector", "llm"}
    assert all(norm > 0 for norm in steps.grad_norms.values())
    assert steps.change is not None
    assert steps.change.lower
    assert 0 <= steps.waiting <= 1
    assert (found.data.samples, found.data.with_images, found.data.unsupervised) == (12, 12, 0)
    assert found.data.max_length == 64
    assert found.before is not None
    assert "no difference yet" in found.before.verdict() or found.before.used
    json.dumps(found.to_dict())


def test_a_model_that_reads_the_image_is_told_from_one_that_does_not(parts: Parts, tmp_path: Path) -> None:
    model, processor = parts
    data = write(tmp_path, ["w1" if index < 8 else "w2" for index in range(16)])
    dataset = ConversationDataset(data, tmp_path, processor)
    samples = [dataset[index] for index in range(16)]
    apply_stage(model, STAGE_3.with_lr(5e-3)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**processor.collate(samples)).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
    use = image_use(model, processor, samples, batch_size=5)
    assert use.loss < 0.5
    assert use.shuffled is not None
    assert use.shuffled.samples == 16
    # Half of the neighbours have the same answer, so the blank image says it more clearly.
    assert use.blank is not None
    assert use.blank.mean > 0.1
    assert model.training
    deaf = image_use(_Deaf(model), processor, samples, batch_size=5)  # type: ignore[arg-type]
    assert deaf.ignored
    assert not deaf.used
    assert "no difference at all" in deaf.verdict()


class _Deaf(nn.Module):
    """A model that puts no image at the image places."""

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.model = model
        self.device = model.device

    def forward(self, **batch: Any) -> Any:
        pixels = batch.pop("pixel_values")
        return self.model(**batch, pixel_values=torch.zeros_like(pixels))


def test_losses_by_sample_are_those_of_samples_alone(parts: Parts, tmp_path: Path) -> None:
    model, processor = parts
    data = write(tmp_path, ["w1", "w2 w3 w4", "w5 w6"])
    dataset = ConversationDataset(data, tmp_path, processor)
    samples = [dataset[index] for index in range(3)]
    alone = [float(model(**processor.collate([each])).loss) for each in samples]
    assert sample_losses(model, processor, samples, batch_size=2) == pytest.approx(alone, abs=1e-5)


def test_differences_are_paired_with_their_standard_error() -> None:
    found = Difference.of([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])
    assert found == Difference(2.0, 1 / math.sqrt(3), 3, exact=False)
    assert found is not None
    assert found.higher
    assert not found.lower
    assert Difference.of([1.0], [0.5]) is None
    same = Difference.of([1.0, 2.0], [1.0, 2.0])
    assert same is not None
    assert same.exact
    assert not same.higher


@pytest.mark.parametrize(
    ("shuffled", "fresh", "sentence"),
    [
        (
            Difference(0.5, 0.1, 9, exact=False),
            False,
            r"the image is used: .* with the right image, with another sample's \+0.5",
        ),
        (Difference(0.1, 0.1, 9, exact=False), True, "no difference yet: .*; a new connector is ignored at first"),
        (Difference(0.1, 0.1, 9, exact=False), False, "no difference: .*; look for a connector whose weights were not"),
        (Difference(-0.5, 0.1, 9, exact=False), False, "the image misleads: .*images that belong to other samples"),
    ],
)
def test_verdicts_are_sentences_with_causes(shuffled: Difference, *, fresh: bool, sentence: str) -> None:
    use = ImageUse(1.0, shuffled, Difference(0.0, 0.1, 9, exact=False), fresh)
    with pytest.raises(VlmError, match=sentence):
        raise VlmError(use.verdict())


def test_without_images_the_verdict_says_so(parts: Parts, tmp_path: Path) -> None:
    found = diagnose(parts, write(tmp_path, ["w1", "w2", "w3"], images=False))
    assert found.before is not None
    assert found.before.verdict() == "whether the image is used cannot be told: fewer than two samples have one"
    assert "no sample that was looked at has an image" in found.build.warnings[0]
    assert "the connector, which is to be trained, has not moved: no batch held an image" in found.failures[0]


def test_bad_samples_and_long_ones_are_told(parts: Parts, tmp_path: Path) -> None:
    data = write(tmp_path, ["w1", "w2 " * 60, "w3"])
    found = diagnose(parts, data, on_bad_sample="skip")
    assert found.data.samples == 2
    assert "the context takes 64" in found.data.bad[0]
    assert found.data.longest[0] < 64
    assert found.failures == ()
    assert "1 of 3 samples cannot be made and would stop the run" in diagnose(parts, data).failures[0]


def test_the_command_prints_and_gives_an_exit_code(
    parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = parts
    data = write(tmp_path, [f"w{index % 3}" for index in range(6)])
    config = TrainConfig(data=str(data), output=str(tmp_path / "out"), batch_size=3, cpu=True)
    dataset = ConversationDataset(data, tmp_path, processor)
    apply_stage(model, STAGE_1)
    assert run_check(config, model, processor, dataset) == 0
    shown = capsys.readouterr().out
    for piece in (
        "GFLOP/sample",
        "of the tokens supervised",
        "waiting for data",
        "bit-identical: encoder, llm",
        "passed:",
    ):
        assert piece in shown
    model.encoder.requires_grad_(True)
    assert run_check(config, model, processor, dataset, as_json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert "froze the encoder" in told["failures"][0]
    assert told["verdicts"].keys() == {"before"}


def test_the_build_report_adds_costs_and_warns_of_frozen_float32(parts: Parts, tmp_path: Path) -> None:
    model, processor = parts
    data = write(tmp_path, ["w1", "w2 w3"])
    dataset = ConversationDataset(data, tmp_path, processor)
    apply_stage(model, STAGE_1).train()
    typical = typical_sample([dataset[0], dataset[1]], processor.image_token_id)
    assert typical is not None
    assert (typical.images, typical.views, typical.image_tokens) == (1, 1, 16)
    report = build_report(model, typical, mixed_precision="bf16")
    assert sum(row.share or 0 for row in report.rows) == pytest.approx(1)
    assert [row.image_tokens for row in report.rows] == [16, 16, None]
    assert [sentence.split(" holds")[0] for sentence in report.warnings] == ["the encoder", "the llm"]
    printed = str(report)
    assert "tokens/image" in printed
    assert "costs are those of a sample of" in printed
    assert build_report(model).warnings == ()
    assert all(row.flops is None and row.share is None for row in build_report(model).rows)


def test_the_llms_operations_are_those_that_torch_counts(llama: Any) -> None:
    tokens, supervised = 24, 5
    with FlopCounterMode(display=False) as counter:
        hidden = llama.model(torch.ones(1, tokens, dtype=torch.long)).last_hidden_state
        F.linear(hidden[0, :supervised], llama.lm_head.weight)
    # Attention is counted as if nothing were masked, also where the kernel hides it from the counter.
    attention = 4 * tokens**2 * 32 * 2
    counted = counter.get_total_flops()
    found = llm_flops(llama, tokens, supervised)
    assert found in {counted, counted + attention}


@pytest.mark.parametrize(
    ("stage", "passes"),
    [(STAGE_1, (1, 3, 2)), (STAGE_2, (1, 3, 3)), (STAGE_3, (3, 3, 3))],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_step_costs_each_unit_its_passes(parts: Parts, stage: StagePolicy, passes: tuple[int, ...]) -> None:
    model = parts[0]
    sample = TypicalSample(tokens=20, supervised=3, image_tokens=16, images=1, views=1)
    found = unit_flops(apply_stage(model, stage), sample)
    frozen = unit_flops(apply_stage(model, StagePolicy("none")), sample)
    assert [one / other for one, other in zip(found, frozen, strict=True)] == pytest.approx(passes, rel=0.02)


def test_a_tower_that_cannot_be_counted_has_a_dash(parts: Parts) -> None:
    model = parts[0]
    apply_stage(model, STAGE_1)
    model.encoder.spec = dataclasses.replace(model.encoder.spec, windowed=True)
    report = build_report(model, TypicalSample(20, 3, 16, 1, 1))
    assert report.rows[0].flops is None
    assert report.rows[1].flops
    assert [row.share for row in report.rows] == [None, None, None]


def test_pixels_of_several_sizes_are_compared_too(parts: Parts, tmp_path: Path) -> None:
    model, processor = parts
    data = write(tmp_path, ["w1", "w2"])
    dataset = ConversationDataset(data, tmp_path, processor)
    samples = [dataset[index] for index in range(2)]
    listed = [dataclasses.replace(each, pixel_values=list(_views(each.pixel_values))) for each in samples]
    use, whole = (image_use(_Stacking(model), processor, each, batch_size=2) for each in (listed, samples))  # type: ignore[arg-type]
    assert use == whole


def _views(pixels: Tensor | list[Tensor] | None) -> list[Tensor]:
    assert isinstance(pixels, Tensor)
    return list(pixels)


class _Stacking(_Deaf):
    def forward(self, **batch: Any) -> Any:
        return self.model(**batch)
