"""Checkpoints: bit-equal in a fresh process, small, whole or not at all, and of no other encoder."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from connectors import MLP, build_connector
from connectors.base import Connector
from connectors.errors import VlmError
from connectors.tokens import TokenSpec, VisualTokens
from vlm_encoders.registry import create_encoder
from vlm_encoders.testing import tiny_llm
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.vlm import part_weights
from vlm_encoders.vlm.atomic import atomic_folder
from vlm_encoders.vlm.build import load_llm
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import VLMProcessor
from vlm_encoders.vlm.stages import STAGE_1, STAGE_2, STAGE_3, PartPolicy, StagePolicy, apply_stage

IMAGE = 70
LORA = StagePolicy("lora-4", connector=PartPolicy("train", lr=1e-2), llm=PartPolicy("lora", lr=1e-2, lora_rank=4))
LOADER = """
import sys
from pathlib import Path
import torch
from vlm_encoders.vlm.model import VisionLanguageModel
torch.set_num_threads(1)
root = Path(sys.argv[1])
inputs = torch.load(root / "inputs.pt", weights_only=True)
logits, modes = {}, {}
for folder in sorted((root / "saved").iterdir()):
    model = VisionLanguageModel.from_pretrained(folder)
    with torch.no_grad():
        logits[folder.name] = model(**inputs).logits
    modes[folder.name] = any(module.training for module in model.modules())
torch.save((logits, modes), root / "outputs.pt")
"""


def write_clip(folder: Path, seed: int = 0, patch: int = 7) -> None:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=patch
    )
    CLIPVisionModel(config).save_pretrained(folder)


def build(root: Path, *, pretrained: bool = True, dtype: str = "float32", newline: bool = True) -> VisionLanguageModel:
    encoder = create_encoder(f"hf:{root}/clip", pretrained=pretrained, dtype=dtype)
    kind = getattr(torch, dtype)
    llm, _ = load_llm(root / "llm", kind)
    torch.manual_seed(2)
    connector = build_connector("pixel_shuffle:factor=2+mlp", encoder.token_spec, 32).to(kind)
    layout = TileLayout(unpad=newline, newline=newline)
    model = VisionLanguageModel(encoder, connector, llm, image_token_id=IMAGE, layout=layout)
    return model.to(kind).eval()


def make_inputs(tokens: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (1, 20), generator=generator)
    ids[0, 1 : 1 + tokens] = IMAGE
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}


def train(model: VisionLanguageModel, *stages: StagePolicy) -> VisionLanguageModel:
    inputs = make_inputs(4 + model.layout.newline)
    for stage in stages:
        apply_stage(model, stage).train()
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.3)
        for _ in range(2):
            loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)).loss
            assert loss is not None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


CASES: dict[str, Callable[[Path], VisionLanguageModel]] = {
    "frozen-encoder": lambda root: train(build(root), STAGE_1),
    "random-encoder": lambda root: train(build(root, pretrained=False), STAGE_1),
    "all-trained": lambda root: train(build(root), STAGE_3),
    "llm-trained": lambda root: train(build(root), STAGE_2),
    "last-block": lambda root: train(
        build(root), StagePolicy("s", PartPolicy("train", lr=1.0, last_blocks=1), PartPolicy("train", lr=1.0))
    ),
    "lora": lambda root: train(build(root), LORA),
    "lora-on-trained": lambda root: train(build(root), STAGE_2, LORA),
    "lora-then-stage-1": lambda root: train(build(root), LORA, STAGE_1),
    "lora-merged": lambda root: train(build(root), LORA, STAGE_2),
    "bf16": lambda root: train(build(root, dtype="bfloat16"), STAGE_3),
    "bf16-lora": lambda root: train(build(root, dtype="bfloat16"), LORA),
}
FILES = {
    "frozen-encoder": {"model.json", "connector.safetensors"},
    "random-encoder": {"model.json", "connector.safetensors", "encoder.safetensors"},
    "all-trained": {"model.json", "connector.safetensors", "encoder.safetensors", "llm"},
    "llm-trained": {"model.json", "connector.safetensors", "llm"},
    "last-block": {"model.json", "connector.safetensors", "encoder.safetensors"},
    "lora": {"model.json", "connector.safetensors", "adapter"},
    "lora-on-trained": {"model.json", "connector.safetensors", "adapter", "llm"},
    "lora-then-stage-1": {"model.json", "connector.safetensors", "adapter"},
    "lora-merged": {"model.json", "connector.safetensors", "llm"},
    "bf16": {"model.json", "connector.safetensors", "encoder.safetensors", "llm"},
    "bf16-lora": {"model.json", "connector.safetensors", "adapter"},
}


def write_parts(root: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    write_clip(root / "clip")
    llm: Any = tiny_llm()
    llm.save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    return root


@pytest.fixture
def root(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with an encoder and an LLM."""
    return write_parts(tmp_path, tokenizer)


def test_a_fresh_process_gives_the_same_logits_bit_by_bit(root: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        inputs, wanted = make_inputs(), {}
        torch.save(inputs, root / "inputs.pt")
        for name, make in CASES.items():
            model = make(root)
            model.save_pretrained(root / "saved" / name)
            with torch.no_grad():
                wanted[name] = model(**inputs).logits
    finally:
        torch.set_num_threads(threads)
    for name, files in FILES.items():
        assert {path.name for path in (root / "saved" / name).iterdir()} == files
    assert {path.name for path in (root / "saved").iterdir()} == CASES.keys()
    subprocess.run([sys.executable, "-c", LOADER, str(root)], check=True, cwd=Path(__file__).parents[1])
    logits, modes = torch.load(root / "outputs.pt", weights_only=True)
    assert logits.keys() == wanted.keys()
    for name, expected in wanted.items():
        assert torch.equal(logits[name], expected), name
    assert not any(modes.values())
    distinct = {tuple(expected[0, -1, :8].tolist()) for expected in wanted.values()}
    assert len(distinct) == len(wanted)


def test_the_newline_is_saved_and_loaded(root: Path) -> None:
    model = train(build(root), STAGE_1)
    model.save_pretrained(root / "run")
    assert torch.equal(load_file(root / "run/connector.safetensors")["newline"], model.newline)
    loaded = VisionLanguageModel.from_pretrained(root / "run")
    assert torch.equal(loaded.newline, model.newline)


def test_what_was_trained_accumulates_over_stages_and_checkpoints(root: Path) -> None:
    train(build(root), STAGE_2).save_pretrained(root / "first")
    loaded = VisionLanguageModel.from_pretrained(root / "first")
    train(loaded, STAGE_1).save_pretrained(root / "second")
    manifest = json.loads((root / "second/model.json").read_text())
    assert manifest["trained"] == ["connector", "llm"]
    assert manifest["stage"] == "stage-1"
    shutil.rmtree(root / "first")
    again = VisionLanguageModel.from_pretrained(root / "second")
    assert torch.equal(again(**make_inputs()).logits, loaded(**make_inputs()).logits)


def test_a_checkpoint_never_hangs_on_an_earlier_checkpoint(root: Path) -> None:
    # Neither part has a source, and neither trained: the second checkpoint must hold both as the first did.
    model = build(root, pretrained=False)
    model.llm = tiny_llm(seed=5)
    train(model, STAGE_1).save_pretrained(root / "first")
    VisionLanguageModel.from_pretrained(root / "first").save_pretrained(root / "second")
    shutil.rmtree(root / "first")
    again = VisionLanguageModel.from_pretrained(root / "second")
    assert torch.equal(again(**make_inputs()).logits, model(**make_inputs()).logits)


def test_sources_are_found_from_any_working_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    encoder = create_encoder(f"hf:{root}/clip", pretrained="clip")
    llm, _ = load_llm("llm")
    model = VisionLanguageModel(encoder, MLP(32, 32), llm, image_token_id=IMAGE).eval()
    model.save_pretrained("run")
    monkeypatch.chdir("/")
    loaded = VisionLanguageModel.from_pretrained(root / "run")
    assert isinstance(loaded.connector, MLP)
    assert torch.equal(loaded(**make_inputs(16)).logits, model(**make_inputs(16)).logits)


def test_an_encoder_of_the_same_shape_with_other_weights_is_refused(root: Path) -> None:
    train(build(root), STAGE_1).save_pretrained(root / "run")
    write_clip(root / "other", seed=1)
    other = create_encoder(f"hf:{root}/other")
    with pytest.raises(VlmError, match=r"the encoder 'hf:.*clip' is not the one that checkpoint .* SHA-256"):
        VisionLanguageModel.from_pretrained(root / "run", encoder=other)
    write_clip(root / "clip", seed=1)
    with pytest.raises(VlmError, match="is not the one that checkpoint"):
        VisionLanguageModel.from_pretrained(root / "run")


def test_an_encoder_of_another_shape_is_refused(root: Path) -> None:
    build(root).save_pretrained(root / "run")
    write_clip(root / "other", patch=14)
    other = create_encoder(f"hf:{root}/other")
    with pytest.raises(VlmError, match=r"\(16 tokens of width 32\), the encoder given is 'hf:.*other' \(4 tokens"):
        VisionLanguageModel.from_pretrained(root / "run", encoder=other)


def test_an_llm_with_other_weights_is_refused_and_the_right_one_taken(root: Path) -> None:
    model = build(root)
    model.save_pretrained(root / "run")
    with pytest.raises(VlmError, match="the llm 'LlamaForCausalLM' is not the one that checkpoint"):
        VisionLanguageModel.from_pretrained(root / "run", llm=tiny_llm(seed=8))
    (root / "llm").rename(root / "moved")
    with pytest.raises(VlmError, match=r"the LLM '.*/llm' of checkpoint .* cannot be loaded; pass llm="):
        VisionLanguageModel.from_pretrained(root / "run")
    for llm in (str(root / "moved"), load_llm(root / "moved")[0]):
        loaded = VisionLanguageModel.from_pretrained(root / "run", llm=llm)
        assert torch.equal(loaded(**make_inputs()).logits, model(**make_inputs()).logits)


def test_a_moved_encoder_is_named_with_what_to_pass(root: Path) -> None:
    model = build(root)
    model.save_pretrained(root / "run")
    (root / "clip").rename(root / "moved")
    with pytest.raises(VlmError, match=r"the encoder of checkpoint .* cannot be built: .*; or pass encoder="):
        VisionLanguageModel.from_pretrained(root / "run")
    loaded = VisionLanguageModel.from_pretrained(root / "run", encoder=create_encoder(f"hf:{root}/moved"))
    assert torch.equal(loaded(**make_inputs()).logits, model(**make_inputs()).logits)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: tensors.pop("newline"), "does not fit the connector, 1 missing: newline;"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "1 unexpected: extra;"),
        (lambda tensors: tensors.update(newline=torch.zeros(31)), "1 of another shape: newline;"),
    ],
)
def test_other_keys_or_shapes_are_refused_by_name(
    root: Path, change: Callable[[dict[str, Tensor]], object], sentence: str
) -> None:
    build(root).save_pretrained(root / "run")
    tensors = load_file(root / "run/connector.safetensors")
    change(tensors)
    save_file(tensors, root / "run/connector.safetensors")
    with pytest.raises(VlmError, match=sentence):
        VisionLanguageModel.from_pretrained(root / "run")


def test_changed_values_are_refused(root: Path) -> None:
    build(root).save_pretrained(root / "run")
    tensors = load_file(root / "run/connector.safetensors")
    tensors["newline"][3] += 1e-6
    save_file(tensors, root / "run/connector.safetensors")
    with pytest.raises(VlmError, match=r"the connector 'pixel_shuffle\+mlp' is not the one"):
        VisionLanguageModel.from_pretrained(root / "run")


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
def test_a_broken_weight_file_is_told(root: Path, damage: str) -> None:
    build(root).save_pretrained(root / "run")
    file = root / "run/connector.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    if damage == "gone":
        file.unlink()
    with pytest.raises(VlmError, match=r"connector\.safetensors' cannot be read"):
        VisionLanguageModel.from_pretrained(root / "run")


def fill_the_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_last_good_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = train(build(root), STAGE_1)
    model.save_pretrained(root / "runs/model")
    wanted = model(**make_inputs()).logits
    train(model, STAGE_3)
    for place in ("safetensors.torch.save_file", "vlm_encoders.vlm.checkpoint.save_llm", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(place, fill_the_disk)
            with pytest.raises(VlmError, match=r"No space left on device; what was there is untouched, free some space"):
                model.save_pretrained(root / "runs/model")
            with pytest.raises(VlmError, match="nothing was left behind"):
                model.save_pretrained(root / "runs/new")
        assert [path.name for path in (root / "runs").iterdir()] == ["model"]
    loaded = VisionLanguageModel.from_pretrained(root / "runs/model")
    assert torch.equal(loaded(**make_inputs()).logits, wanted)
    model.save_pretrained(root / "runs/model")
    loaded = VisionLanguageModel.from_pretrained(root / "runs/model")
    assert torch.equal(loaded(**make_inputs()).logits, model(**make_inputs()).logits)


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_save_that_is_killed_at_any_rename_leaves_a_checkpoint(
    root: Path, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(root)
    model.save_pretrained(root / "runs/model")
    wanted = model(**make_inputs()).logits
    train(model, STAGE_1)
    done: list[Path] = []
    rename = Path.rename

    def killed_rename(self: Path, target: Path) -> Path:
        if len(done) == renames:
            raise KilledError
        done.append(target)
        return rename(self, target)

    def killed_rmtree(folder: Path, **_: object) -> None:
        # A killed process cleans nothing up.
        if len(done) == 2 and folder.name.endswith(".old"):
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_rename)
        patch.setattr(shutil, "rmtree", killed_rmtree)
        patch.setattr("vlm_encoders.vlm.atomic.recover", lambda _: None)
        with pytest.raises(KilledError):
            model.save_pretrained(root / "runs/model")
    assert len(list((root / "runs").iterdir())) == 2
    new = model(**make_inputs()).logits
    loaded = VisionLanguageModel.from_pretrained(root / "runs/model")
    assert torch.equal(loaded(**make_inputs()).logits, new if renames == 2 else wanted)
    model.save_pretrained(root / "runs/model")
    assert [path.name for path in (root / "runs").iterdir()] == ["model"]
    assert torch.equal(VisionLanguageModel.from_pretrained(root / "runs/model")(**make_inputs()).logits, new)


def test_an_error_of_another_kind_is_handed_on(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "run") as inside:
        (inside / "file").write_text("half")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not list((tmp_path / "run").iterdir())


def test_saving_never_replaces_a_folder_that_holds_other_things(root: Path) -> None:
    model = build(root)
    (root / "home").mkdir()
    (root / "home/thesis.txt").write_text("years of work")
    with pytest.raises(VlmError, match=r"holds 1 things .* such as 'thesis.txt'"):
        model.save_pretrained(root / "home")
    assert (root / "home/thesis.txt").read_text() == "years of work"


def test_the_processor_of_a_checkpoint_stays_when_the_model_is_saved_again(
    root: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build(root, newline=False)
    processor = VLMProcessor(model.encoder, model.connector, tokenizer)  # type: ignore[arg-type]
    processor.save_pretrained(root / "run")
    for _ in range(2):
        model.save_pretrained(root / "run")
    loaded = VLMProcessor.from_pretrained(root / "run", model)
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()


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


def test_a_connector_without_a_name_is_saved_and_passed_at_loading(root: Path) -> None:
    model = build(root, newline=False)
    model = VisionLanguageModel(model.encoder, Doubling(), model.llm, image_token_id=IMAGE)
    train_inputs = make_inputs(16)
    nn.init.normal_(model.connector.scale)  # type: ignore[arg-type]
    model.eval().save_pretrained(root / "run")
    with pytest.raises(VlmError, match="is a 'Doubling' without a registered name; build it and pass connector="):
        VisionLanguageModel.from_pretrained(root / "run")
    loaded = VisionLanguageModel.from_pretrained(root / "run", connector=Doubling())
    assert torch.equal(loaded(**train_inputs).logits, model(**train_inputs).logits)


def test_tied_weights_stay_tied(root: Path) -> None:
    llm: Any = tiny_llm("gemma")
    model = build(root)
    model = VisionLanguageModel(model.encoder, model.connector, llm, image_token_id=IMAGE).eval()  # type: ignore[arg-type]
    first, second = (module for module in model.connector.modules() if isinstance(module, nn.Linear))
    assert first.weight.shape != second.weight.shape
    second.bias = first.bias
    model.save_pretrained(root / "run")
    saved = load_file(root / "run/connector.safetensors")
    assert sum(name.endswith("bias") for name in saved) == 2
    loaded = VisionLanguageModel.from_pretrained(root / "run")
    assert loaded.llm.lm_head.weight is loaded.llm.model.embed_tokens.weight  # type: ignore[union-attr]
    assert torch.equal(loaded(**make_inputs(4)).logits, model(**make_inputs(4)).logits)


def test_a_part_of_several_dtypes_keeps_each(root: Path) -> None:
    model = train(build(root, dtype="bfloat16"), STAGE_3)
    for module in model.encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    model.save_pretrained(root / "run")
    loaded = VisionLanguageModel.from_pretrained(root / "run")
    for name, parameter in model.encoder.named_parameters():
        assert torch.equal(loaded.encoder.get_parameter(name), parameter)
        assert loaded.encoder.get_parameter(name).dtype == parameter.dtype


def test_the_hash_sees_names_dtypes_shapes_and_every_byte() -> None:
    base = {"a": torch.arange(6.0), "b": torch.tensor(1, dtype=torch.int64)}
    others = [
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"].reshape(2, 3), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": base["a"], "b": base["b"] + 1},
        {"a": base["a"], "b": base["b"], "c": torch.empty(0)},
        {"a": -base["a"] * 0 + base["a"].clone().index_fill(0, torch.tensor(0), -0.0), "b": base["b"]},
    ]
    digest = part_weights.module_hash
    assert digest(base) == digest({"b": base["b"].clone(), "a": torch.arange(12.0)[::2] / 2})
    assert len({digest(base), *(digest(other) for other in others)}) == len(others) + 1
