"""From names to a model, and the sentences where a name leads nowhere."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM, PreTrainedTokenizerFast

from connectors import Linear, TokenSpec, build_connector
from connectors.errors import TokenShapeError, UnknownNameError, VlmError
from vlm_encoders.registry import create_encoder
from vlm_encoders.vlm.build import build_model, load_llm
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.stages import STAGE_1, STAGE_2, STAGE_2_LORA, StagePolicy, apply_stage


@pytest.fixture
def folders(tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    """An encoder and an LLM as folders."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=28, patch_size=7
    )
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    llama.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    return tmp_path


def test_a_model_of_names_answers(folders: Path) -> None:
    model, processor = build_model(f"hf:{folders}/clip", "mlp", folders / "llm", tiler="anyres", dtype=torch.bfloat16)
    assert not any(module.training for module in model.modules())
    parts = (model.encoder, model.connector, model.llm)
    dtypes = [{parameter.dtype for parameter in part.parameters()} for part in parts]
    assert dtypes == [{torch.bfloat16}, {torch.float32}, {torch.bfloat16}]
    assert processor.max_length == 512
    assert model.layout == processor.layout
    sample = processor.sample(
        [{"role": "user", "content": "<image> w1"}, {"role": "assistant", "content": "w2"}],
        [Image.new("RGB", (60, 30))],
    )
    loss = model(**processor.collate([sample])).loss
    assert loss is not None
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (STAGE_1, torch.bfloat16),
        (STAGE_2, torch.bfloat16),
        (STAGE_2_LORA, torch.bfloat16),
        (STAGE_1, torch.float16),
        (STAGE_2_LORA, torch.float16),
    ],
)
def test_a_model_of_two_dtypes_trains_and_is_saved(folders: Path, stage: StagePolicy, dtype: torch.dtype) -> None:
    model, processor = build_model(f"hf:{folders}/clip", "mlp", folders / "llm", tiler="anyres", dtype=dtype)
    turns = [{"role": "user", "content": "<image> w1"}, {"role": "assistant", "content": "w2 w3"}]
    batch = processor.collate([processor.sample(turns, [Image.new("RGB", (60, 30), (90, 20, 200))])])
    apply_stage(model, stage).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in model.connector.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    first = model(**batch).loss
    first.backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.connector.parameters(), strict=True))
    model.eval()
    expected = model(**batch).loss
    assert expected < first
    model.save_pretrained(folders / "saved")
    loaded = VisionLanguageModel.from_pretrained(folders / "saved")
    assert [each.dtype for each in loaded.connector.parameters()] == [torch.float32] * len(before)
    assert torch.equal(loaded(**batch).loss, expected)


def test_wrong_names_are_answered(folders: Path) -> None:
    with pytest.raises(UnknownNameError, match="pixel_shuffle"):
        build_model(f"hf:{folders}/clip", "pixel_shufle+mlp", folders / "llm")
    with pytest.raises(UnknownNameError, match="anyres"):
        build_model(f"hf:{folders}/clip", "mlp", folders / "llm", tiler="anyre")


def test_names_are_read_before_the_llm_is(folders: Path) -> None:
    missing = folders / "no-llm"
    with pytest.raises(UnknownNameError, match="no encoder 'clip-vit'"):
        build_model("clip-vit", "mlp", missing)
    with pytest.raises(VlmError, match="is not option=value"):
        build_model(f"hf:{folders}/clip", "pixel_shuffle:2+mlp", missing)
    with pytest.raises(UnknownNameError, match="no tiler 'anyre'"):
        build_model(f"hf:{folders}/clip", "mlp", missing, tiler="anyre")


def test_a_connector_that_is_there_is_cast_to_float32_and_shared(folders: Path) -> None:
    chain = build_connector("mlp", TokenSpec(16, 32, (4, 4), 1), 32).bfloat16()
    first, _ = build_model(f"hf:{folders}/clip", chain, folders / "llm", tiler="anyres", dtype=torch.bfloat16)
    second, _ = build_model(f"hf:{folders}/clip", chain, folders / "llm", tiler="anyres")
    assert {parameter.dtype for parameter in first.connector.parameters()} == {torch.float32}
    assert first.connector is second.connector is chain
    assert first.newline is second.newline


def test_a_connector_that_is_none_or_does_not_fit_is_told_before_the_llm_is_read(folders: Path) -> None:
    missing = folders / "no-llm"
    with pytest.raises(TokenShapeError, match="was built for tokens of width 48, got width 32"):
        build_model(f"hf:{folders}/clip", Linear(48, 32), missing)
    for wrong in ({"proj.weight": torch.ones(32, 32)}, torch.nn.Linear(32, 32), None):
        with pytest.raises(
            VlmError, match=f"got {type(wrong).__name__}; write a recipe such as mlp, or .*load_released"
        ):
            build_model(f"hf:{folders}/clip", wrong, missing)  # type: ignore[arg-type]


def test_an_llm_that_cannot_be_loaded_is_told_in_a_sentence(folders: Path) -> None:
    with pytest.raises(VlmError, match="LLM folder '/no/such/llm' does not exist"):
        load_llm("/no/such/llm")
    with pytest.raises(VlmError, match=r"tokenizer of the LLM 'nobody/nothing' cannot be loaded \(.*set HF_HOME"):
        load_llm("nobody/nothing")
    (folders / "empty").mkdir()
    with pytest.raises(VlmError, match="give a folder with model and tokenizer"):
        load_llm(folders / "empty")
    for file in (folders / "llm").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(VlmError, match="the tokenizer of the LLM"):
        load_llm(folders / "llm")


def test_weights_that_are_missing_or_cut_off_are_refused(folders: Path) -> None:
    file = folders / "llm" / "model.safetensors"
    whole = load_file(file)
    lacking = {name: tensor for name, tensor in whole.items() if "layers.1.mlp" not in name}
    save_file(lacking, file, metadata={"format": "pt"})
    with pytest.raises(VlmError, match=r"lack 3 tensors, such as model\.layers\.1\.mlp\.down_proj\.weight"):
        load_llm(folders / "llm")
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(VlmError, match="the model of the LLM"):
        load_llm(folders / "llm")
    (folders / "llm" / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(VlmError, match="of the LLM"):
        load_llm(folders / "llm")


def test_an_encoder_and_a_connector_that_are_there_are_taken_as_they_are(folders: Path) -> None:
    encoder = create_encoder(f"hf:{folders}/clip")
    width = load_llm(folders / "llm")[0].get_input_embeddings().embedding_dim  # type: ignore[operator]
    connector = build_connector("mlp", encoder.token_spec, width)
    model, processor = build_model(encoder, connector, folders / "llm")
    assert model.encoder is encoder
    assert model.connector is connector
    assert processor.num_image_tokens((28, 28)) == 16
