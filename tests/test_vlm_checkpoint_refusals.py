"""Checkpoints that are broken, or of other parts, are refused in a sentence."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from connectors.base import Connector
from connectors.errors import VlmError
from connectors.tokens import TokenSpec, VisualTokens
from vlm_encoders.registry import create_encoder
from vlm_encoders.testing import tiny_llm
from vlm_encoders.vlm.build import load_llm
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.stages import STAGE_1, STAGE_2_LORA


def test_an_encoder_of_the_same_shape_with_other_weights_is_refused(kit: Any) -> None:
    kit.train(kit.build(), STAGE_1).save_pretrained(kit.root / "run")
    kit.write_clip("other", seed=1)
    other = create_encoder(f"hf:{kit.root}/other")
    with pytest.raises(VlmError, match=r"the encoder 'hf:.*clip' is not the one that checkpoint .* SHA-256"):
        VisionLanguageModel.from_pretrained(kit.root / "run", encoder=other)
    kit.write_clip("clip", seed=1)
    with pytest.raises(VlmError, match="is not the one that checkpoint"):
        VisionLanguageModel.from_pretrained(kit.root / "run")


def test_an_encoder_of_another_shape_is_refused(kit: Any) -> None:
    kit.build().save_pretrained(kit.root / "run")
    kit.write_clip("other", patch=14)
    other = create_encoder(f"hf:{kit.root}/other")
    with pytest.raises(VlmError, match=r"\(16 tokens of width 32\), the encoder given is 'hf:.*other' \(4 tokens"):
        VisionLanguageModel.from_pretrained(kit.root / "run", encoder=other)


def test_an_llm_with_other_weights_is_refused_and_the_right_one_taken(kit: Any) -> None:
    model = kit.build()
    model.save_pretrained(kit.root / "run")
    with pytest.raises(VlmError, match="the llm 'LlamaForCausalLM' is not the one that checkpoint"):
        VisionLanguageModel.from_pretrained(kit.root / "run", llm=tiny_llm(seed=8))
    (kit.root / "llm").rename(kit.root / "moved")
    with pytest.raises(VlmError, match=r"the LLM '.*/llm' of checkpoint .* cannot be loaded; pass llm="):
        VisionLanguageModel.from_pretrained(kit.root / "run")
    for llm in (str(kit.root / "moved"), load_llm(kit.root / "moved")[0]):
        loaded = VisionLanguageModel.from_pretrained(kit.root / "run", llm=llm)
        assert torch.equal(loaded(**kit.inputs()).logits, model(**kit.inputs()).logits)


def test_a_moved_encoder_is_named_with_what_to_pass(kit: Any) -> None:
    model = kit.build()
    model.save_pretrained(kit.root / "run")
    (kit.root / "clip").rename(kit.root / "moved")
    with pytest.raises(VlmError, match=r"the encoder of checkpoint .* cannot be built: .*; or pass encoder="):
        VisionLanguageModel.from_pretrained(kit.root / "run")
    loaded = VisionLanguageModel.from_pretrained(kit.root / "run", encoder=create_encoder(f"hf:{kit.root}/moved"))
    assert torch.equal(loaded(**kit.inputs()).logits, model(**kit.inputs()).logits)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: tensors.pop("newline"), "does not fit the connector, 1 missing: newline;"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "1 unexpected: extra;"),
        (lambda tensors: tensors.update(newline=torch.zeros(31)), "1 of another shape: newline;"),
    ],
)
def test_other_keys_or_shapes_are_refused_by_name(
    kit: Any, change: Callable[[dict[str, Tensor]], object], sentence: str
) -> None:
    kit.build().save_pretrained(kit.root / "run")
    tensors = load_file(kit.root / "run/connector.safetensors")
    change(tensors)
    save_file(tensors, kit.root / "run/connector.safetensors")
    with pytest.raises(VlmError, match=sentence):
        VisionLanguageModel.from_pretrained(kit.root / "run")


def test_changed_values_are_refused(kit: Any) -> None:
    kit.build().save_pretrained(kit.root / "run")
    tensors = load_file(kit.root / "run/connector.safetensors")
    tensors["newline"][3] += 1e-6
    save_file(tensors, kit.root / "run/connector.safetensors")
    with pytest.raises(VlmError, match=r"the connector 'pixel_shuffle\+mlp' is not the one"):
        VisionLanguageModel.from_pretrained(kit.root / "run")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "is no model checkpoint: it has no model.json"),
        ("{", "is broken: model.json is no JSON"),
        ("[]", "has format None, this version reads 1"),
        ('{"format": 7}', "has format 7, this version reads 1"),
        ('{"format": 1, "layout": {}}', "lacks image_token_id, trained, encoder, connector, llm"),
    ],
)
def test_a_broken_manifest_is_told(tmp_path: Path, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / "model.json").write_text(text)
    with pytest.raises(VlmError, match=sentence):
        VisionLanguageModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_broken_weight_file_is_told(kit: Any, damage: str) -> None:
    kit.build().save_pretrained(kit.root / "run")
    file = kit.root / "run/connector.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    if damage == "gone":
        file.unlink()
    with pytest.raises(VlmError, match=r"connector\.safetensors' cannot be read"):
        VisionLanguageModel.from_pretrained(kit.root / "run")


class Doubling(Connector):
    """A connector of the user's own, without a registered name."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((32,), 2.0))
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, visual: VisualTokens) -> VisualTokens:
        return VisualTokens(visual.tokens * self.scale, visual.grid)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        return TokenSpec(spec.num_tokens, spec.dim, spec.grid)

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, *args: Any, **options: Any) -> "Doubling":
        return cls()

    def options(self) -> dict[str, Any]:
        return {}


def test_a_connector_without_a_name_is_saved_and_passed_at_loading(kit: Any) -> None:
    model = kit.build(newline=False)
    model = VisionLanguageModel(model.encoder, Doubling(), model.llm, image_token_id=kit.image)
    train_inputs = kit.inputs(16)
    nn.init.normal_(model.connector.scale)  # type: ignore[arg-type]
    model.eval().save_pretrained(kit.root / "run")
    with pytest.raises(VlmError, match="is a 'Doubling' without a registered name; build it and pass connector="):
        VisionLanguageModel.from_pretrained(kit.root / "run")
    loaded = VisionLanguageModel.from_pretrained(kit.root / "run", connector=Doubling())
    assert torch.equal(loaded(**train_inputs).logits, model(**train_inputs).logits)


def test_an_encoder_that_makes_other_pixels_is_refused(kit: Any) -> None:
    kit.build().save_pretrained(kit.root / "run")
    other = create_encoder(f"hf:{kit.root}/clip")
    other.spec = dataclasses.replace(other.spec, mean=(0.5, 0.5, 0.5))
    with pytest.raises(VlmError, match=r"was trained on pixels with mean \[0\.48.*has \[0\.5, 0\.5, 0\.5\]"):
        VisionLanguageModel.from_pretrained(kit.root / "run", encoder=other)


def test_a_relative_folder_is_found_from_anywhere(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kit.root)
    model = kit.build()
    model.encoder = create_encoder("hf:clip")
    model.save_pretrained("run")
    monkeypatch.chdir(kit.root.parent)
    loaded = VisionLanguageModel.from_pretrained(kit.root / "run")
    assert loaded.encoder.origin["name"] == f"hf:{kit.root}/clip"


@pytest.mark.parametrize("harm", ["removed", "cut"])
def test_a_broken_adapter_is_told_in_a_sentence(kit: Any, harm: str) -> None:
    kit.train(kit.build(), STAGE_2_LORA).save_pretrained(kit.root / "run")
    weights = kit.root / "run/adapter/adapter_model.safetensors"
    if harm == "removed":
        shutil.rmtree(weights.parent)
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(VlmError, match=r"the adapter of checkpoint .* is missing or broken"):
        VisionLanguageModel.from_pretrained(kit.root / "run")
