"""Adapters on any unit: on its own layers and no other's, in float32, saved, loaded and merged with the model."""

import dataclasses
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from connectors import MLP, Connector, TokenSpec, VisualTokens
from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.fused import FusedEncoder
from vlm_encoders.encoders.transformers_backend import TransformersEncoder
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.training.optim import parameter_groups
from vlm_encoders.vlm.adapters import merge_adapters
from vlm_encoders.vlm.build import build_model, load_llm
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.stages import PARTS, STAGE_1, STAGE_3, Part, PartPolicy, StagePolicy, apply_stage

MODES = ("lora", "dora", "rslora")
TRAIN = PartPolicy("train", lr=1e-2)
UNITS = {"encoder": "encoder", "connector": "connector", "llm": "llm"}


def adapting(part: Part, mode: Any = "lora", **options: Any) -> StagePolicy:
    return StagePolicy(f"{mode}-{part}", **{part: PartPolicy(mode, lr=1e-2, lora_rank=2, **options)})  # type: ignore[arg-type]


@pytest.fixture
def model(clip: Encoder, llama: LlamaForCausalLM) -> VisionLanguageModel:
    torch.manual_seed(1)
    return VisionLanguageModel(clip, MLP(32, 32), llama, image_token_id=70)


@pytest.fixture
def fused(clip_spec: EncoderSpec, llama: LlamaForCausalLM) -> VisionLanguageModel:
    parts = [
        TransformersEncoder.build(dataclasses.replace(clip_spec, name=name), pretrained=False, dtype=torch.float32)
        for name in ("one", "two")
    ]
    return VisionLanguageModel(FusedEncoder(parts), MLP(64, 32), llama, image_token_id=70).eval()


def adapters(model: VisionLanguageModel) -> list[str]:
    return [name for name, _ in model.named_parameters() if "lora_" in name]


def logits(model: VisionLanguageModel) -> Tensor:
    ids = torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(3))
    ids[0, 1:17] = 70
    pixels = torch.randn(1, *model.encoder.pixel_shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found: Tensor = model.eval()(ids, pixel_values=pixels).logits
    return found


def fill(model: VisionLanguageModel) -> None:
    """Draw adapters that change the output, as training would."""
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator).mul_(0.1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", PARTS)
def test_adapters_stand_on_the_layers_of_their_unit_alone(model: VisionLanguageModel, part: Part, mode: str) -> None:
    names = {name.rpartition(".")[2] for name, each in model.encoder.named_modules() if isinstance(each, nn.Linear)}
    assert names & {name.rpartition(".")[2] for name, _ in model.llm.named_modules()} >= {"q_proj", "k_proj", "v_proj"}
    layers = [each for each in model.part_module(part).modules() if isinstance(each, nn.Linear)]
    count = len(layers) - (part == "llm")
    before = logits(model)
    apply_stage(model, adapting(part, mode)).train()
    assert {name.partition(".")[0] for name in adapters(model)} == {part}
    assert len([name for name in adapters(model) if "lora_A" in name]) == count
    assert bool([name for name in adapters(model) if "magnitude" in name]) is (mode == "dora")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(trained) == sorted(adapters(model))
    groups = parameter_groups(model, learning_rate=None, weight_decay=0.1)
    grouped = sorted(id(parameter) for group in groups for parameter in group["params"])
    assert grouped == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    # The norms of DoRA are taken anew, which rounds.
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6 if mode == "dora" else 0)
    fill(model)
    assert not torch.equal(logits(model), before)
    row = next(row for row in model.describe() if row.part == part)
    assert (row.mode, row.trainable) == (f"{mode} r=2", sum(p.numel() for p in model.parameters() if p.requires_grad))


@pytest.mark.parametrize("mode", ["lora", "rslora"])
def test_the_scale_is_alpha_by_rank_or_by_its_root(model: VisionLanguageModel, mode: str) -> None:
    apply_stage(model, adapting("encoder", mode, lora_alpha=6))
    layer = next(each for each in model.encoder.modules() if hasattr(each, "scaling"))
    assert layer.scaling["default"] == pytest.approx(6 / 2 if mode == "lora" else 6 / 2**0.5)  # type: ignore[index]


def test_the_second_of_two_equal_encoders_is_adapted_alone(fused: VisionLanguageModel) -> None:
    stage = StagePolicy("s", (PartPolicy(), PartPolicy("lora", lr=1e-2, lora_rank=2, lora_dropout=0.5)), TRAIN)
    apply_stage(fused, stage).train()
    assert {name.rpartition(".encoders.")[2][0] for name in adapters(fused)} == {"1"}
    drops = [each for each in fused.modules() if isinstance(each, nn.Dropout) and each.p == 0.5]
    assert drops
    assert all(each.training for each in drops)
    groups = parameter_groups(fused, learning_rate=None, weight_decay=0.0)
    assert {group["unit"] for group in groups} == {"encoder.1", "connector"}


class Packed(Connector):
    """A connector with packed attention, whose `out_proj` is read but never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.out_proj = nn.Linear(32, 32)

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, **options: Any) -> "Packed":
        return cls()

    def options(self) -> dict[str, Any]:
        return {}

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        return spec

    def forward(self, visual: VisualTokens) -> VisualTokens:
        mixed, _ = self.attention(visual.tokens, visual.tokens, visual.tokens)
        return VisualTokens(self.out_proj(mixed), visual.grid)


def test_layers_that_are_never_called_get_no_adapters(clip: Encoder, llama: LlamaForCausalLM) -> None:
    model = VisionLanguageModel(clip, Packed(), llama, image_token_id=70)
    apply_stage(model, adapting("connector"))
    assert {name.partition(".lora")[0] for name in adapters(model)} == {"connector.out_proj"}
    connector = Packed()
    connector.out_proj = nn.Identity()  # type: ignore[assignment]
    bare = VisionLanguageModel(clip, connector, llama, image_token_id=70)
    with pytest.raises(VlmError, match="adapters on the connector, which has no linear layers"):
        apply_stage(bare, adapting("connector"))


class Fused(Packed):
    """An attention of timm, which joins a bias of its own to the weight of its layer."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, visual: VisualTokens) -> VisualTokens:
        return VisualTokens(self.out_proj(self.attention(visual.tokens)), visual.grid)


@pytest.mark.parametrize(
    ("kind", "options"), [("eva.EvaAttention", {"scale_norm": False}), ("beit.Attention", {})], ids=["eva", "beit"]
)
@pytest.mark.parametrize("separate", [False, True])
def test_each_adapter_is_on_a_layer_that_runs(
    clip: Encoder, llama: LlamaForCausalLM, kind: str, options: dict[str, Any], *, separate: bool
) -> None:
    module, _, name = kind.partition(".")
    attention = getattr(importlib.import_module(f"timm.models.{module}"), name)
    made = Fused(attention(32, num_heads=4, qkv_bias=True, qkv_bias_separate=separate, **options))
    model = VisionLanguageModel(clip, made, llama, image_token_id=70)
    apply_stage(model, adapting("connector"))
    assert any(".qkv." in each for each in adapters(model)) is separate
    made(VisualTokens(torch.randn(1, 16, 32), (4, 4))).tokens.square().sum().backward()
    assert all(each.grad is not None for each in made.parameters() if each.requires_grad)


def test_adapters_are_float32_on_weights_of_half_precision(clip_spec: EncoderSpec, llama: LlamaForCausalLM) -> None:
    clip = TransformersEncoder.build(clip_spec, pretrained=False, dtype=torch.bfloat16)
    model = VisionLanguageModel(clip, MLP(32, 32), llama.to(torch.bfloat16), image_token_id=70)  # type: ignore[arg-type]
    lora = PartPolicy("lora", lr=1.0, lora_rank=2)
    apply_stage(model, StagePolicy("s", lora, PartPolicy(), lora))
    kinds = {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name}
    assert kinds == {torch.float32}
    assert {parameter.dtype for parameter in clip.parameters()} == {torch.float32, torch.bfloat16}
    assert [row.dtype for row in model.describe()] == ["bfloat16/float32", "float32", "bfloat16/float32"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", PARTS)
def test_a_later_stage_that_trains_the_unit_merges_them(model: VisionLanguageModel, part: Part, mode: str) -> None:
    plain = {name: type(each) for name, each in model.named_modules()}
    fill(apply_stage(model, adapting(part, mode)))
    before = logits(model)
    apply_stage(model, STAGE_1) if part != "connector" else apply_stage(model, StagePolicy("none"))
    assert adapters(model)
    assert torch.equal(logits(model), before)
    apply_stage(model, STAGE_3)
    assert {name: type(each) for name, each in model.named_modules()} == plain
    assert all(parameter.requires_grad for parameter in model.part_module(part).parameters())
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", PARTS)
def test_adapters_of_another_kind_are_refused_and_of_the_same_kept(model: VisionLanguageModel, part: Part) -> None:
    fill(apply_stage(model, adapting(part)))
    before = logits(model)
    apply_stage(model, adapting(part))
    assert torch.equal(logits(model), before)
    what = "LLM" if part == "llm" else part
    with pytest.raises(VlmError, match=f"the {what} has adapters with dora False, the stage asks for True; mer"):
        apply_stage(model, adapting(part, "dora"))
    with pytest.raises(VlmError, match=f"the {what} has adapters with alpha 4, the stage asks for 1"):
        apply_stage(model, adapting(part, lora_alpha=1))
    merge_adapters(model, part)
    apply_stage(model, adapting(part, "dora"))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_a_unit_that_is_not_there_has_no_adapters_to_merge(model: VisionLanguageModel) -> None:
    with pytest.raises(VlmError, match=r"no unit 'encoder\.1' to merge adapters of; it has encoder, connector, llm"):
        merge_adapters(model, "encoder.1")


@pytest.mark.parametrize("mode", ["lora", "dora"])
@pytest.mark.parametrize("before", [(), (STAGE_3,)], ids=["fresh", "trained"])
def test_adapters_are_saved_and_loaded_with_the_model(kit: Any, tmp_path: Path, before: Any, mode: Any) -> None:
    model = kit.build()
    every = PartPolicy(mode, lr=1e-2, lora_rank=2)
    for stage in (*before, StagePolicy("all", every, every, every)):
        apply_stage(model, stage)
    fill(model)
    inputs = kit.inputs(5)
    model.eval().save_pretrained(tmp_path / "saved")
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    encoder = {"encoder.safetensors"} if before else {"encoder.adapters.safetensors"}
    assert files - {"llm"} == {"model.json", "connector.safetensors", "adapter"} | encoder
    loaded = VisionLanguageModel.from_pretrained(tmp_path / "saved")
    assert adapters(loaded) == adapters(model)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    apply_stage(loaded, StagePolicy("all", every, every, every))
    merge_adapters(loaded, "encoder")
    loaded.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "encoder.safetensors").is_file()
    again = VisionLanguageModel.from_pretrained(tmp_path / "merged")
    assert {name.partition(".")[0] for name in adapters(again)} == {"connector", "llm"}


def test_qlora_and_its_weights_belong_together(model: VisionLanguageModel) -> None:
    with pytest.raises(VlmError, match=r"by QLoRA, but its weights are not quantised; load it by quantize='nf4'"):
        apply_stage(model, adapting("llm", "qlora"))
    model.llm.is_quantized = True
    for mode in (*MODES, "train"):
        options = {} if mode == "train" else {"lora_rank": 2}
        stage = StagePolicy("s", llm=PartPolicy(mode, lr=1.0, **options))  # type: ignore[arg-type]
        with pytest.raises(VlmError, match=f"mode '{mode}' for the llm, whose weights are quantised; use mode 'qlora'"):
            apply_stage(model, stage)
    assert not adapters(model)


def test_without_bitsandbytes_nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for make in (
        lambda: load_llm(tmp_path / "nowhere", quantize="nf4"),
        lambda: build_model("no-encoder", "mlp", "nowhere", quantize="nf4"),
    ):
        with pytest.raises(VlmError, match="quantize='nf4' needs bitsandbytes, which is not installed"):
            make()
    with pytest.raises(VlmError, match="no quantisation 'int3'"):
        load_llm(tmp_path / "nowhere", quantize="int3")  # type: ignore[arg-type]


def test_a_quantised_llm_trains_by_qlora_and_comes_back(kit: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, _ = build_model(f"hf:{kit.root}/clip", "pixel_shuffle:factor=2+mlp", kit.root / "llm", quantize="nf4")
    model.image_token_id = kit.image
    row = model.describe()[2]
    assert "uint8" in row.dtype
    # Packed two in a byte, the weights are still counted as what they stand for.
    assert row.parameters == sum(parameter.numel() for parameter in load_llm(kit.root / "llm")[0].parameters())
    kit.train(model, StagePolicy("q", llm=PartPolicy("qlora", lr=1e-2, lora_rank=2)))
    inputs = kit.inputs(4)
    model.save_pretrained(tmp_path / "saved")
    loaded = VisionLanguageModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
