"""Checkpoints: small, and bit-equal in a fresh process."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from connectors import MLP, VlmError
from vlm_encoders.registry import create_encoder
from vlm_encoders.testing import tiny_llm
from vlm_encoders.training.masters import hold_masters
from vlm_encoders.vlm import part_weights
from vlm_encoders.vlm.build import load_llm
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.stages import STAGE_1, STAGE_2, STAGE_3, PartPolicy, StagePolicy

LORA = StagePolicy("lora-4", connector=PartPolicy("train", lr=1e-2), llm=PartPolicy("lora", lr=1e-2, lora_rank=4))
LAST_BLOCK = StagePolicy("block", PartPolicy("train", lr=1.0, last_blocks=1), PartPolicy("train", lr=1.0))
NORMS = StagePolicy("norms", connector=PartPolicy("train", lr=1.0), llm=PartPolicy("train", lr=1.0, norms_only=True))
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


CASES: dict[str, Callable[[Path], VisionLanguageModel]] = {
    "frozen-encoder": lambda kit: kit.train(kit.build(), STAGE_1),
    "random-encoder": lambda kit: kit.train(kit.build(pretrained=False), STAGE_1),
    "all-trained": lambda kit: kit.train(kit.build(), STAGE_3),
    "llm-trained": lambda kit: kit.train(kit.build(), STAGE_2),
    "last-block": lambda kit: kit.train(
        kit.build(), StagePolicy("s", PartPolicy("train", lr=1.0, last_blocks=1), PartPolicy("train", lr=1.0))
    ),
    "lora": lambda kit: kit.train(kit.build(), LORA),
    "lora-on-trained": lambda kit: kit.train(kit.build(), STAGE_2, LORA),
    "lora-then-stage-1": lambda kit: kit.train(kit.build(), LORA, STAGE_1),
    "lora-merged": lambda kit: kit.train(kit.build(), LORA, STAGE_2),
    "bf16": lambda kit: kit.train(kit.build(dtype="bfloat16"), STAGE_3),
    "bf16-lora": lambda kit: kit.train(kit.build(dtype="bfloat16"), LORA),
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


def test_a_fresh_process_gives_the_same_logits_bit_by_bit(kit: Any) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        inputs, wanted = kit.inputs(), {}
        torch.save(inputs, kit.root / "inputs.pt")
        for name, make in CASES.items():
            model = make(kit)
            model.save_pretrained(kit.root / "saved" / name)
            with torch.no_grad():
                wanted[name] = model(**inputs).logits
    finally:
        torch.set_num_threads(threads)
    for name, files in FILES.items():
        assert {path.name for path in (kit.root / "saved" / name).iterdir()} == files
    assert {path.name for path in (kit.root / "saved").iterdir()} == CASES.keys()
    subprocess.run([sys.executable, "-c", LOADER, str(kit.root)], check=True, cwd=Path(__file__).parents[1])
    logits, modes = torch.load(kit.root / "outputs.pt", weights_only=True)
    assert logits.keys() == wanted.keys()
    for name, expected in wanted.items():
        assert torch.equal(logits[name], expected), name
    assert not any(modes.values())
    distinct = {tuple(expected[0, -1, :8].tolist()) for expected in wanted.values()}
    assert len(distinct) == len(wanted)


def test_the_newline_is_saved_and_loaded(kit: Any) -> None:
    model = kit.train(kit.build(), STAGE_1)
    model.save_pretrained(kit.root / "run")
    assert torch.equal(load_file(kit.root / "run/connector.safetensors")["newline"], model.newline)
    loaded = VisionLanguageModel.from_pretrained(kit.root / "run")
    assert torch.equal(loaded.newline, model.newline)


def test_what_was_trained_accumulates_over_stages_and_checkpoints(kit: Any) -> None:
    kit.train(kit.build(), STAGE_2).save_pretrained(kit.root / "first")
    loaded = VisionLanguageModel.from_pretrained(kit.root / "first")
    kit.train(loaded, STAGE_1).save_pretrained(kit.root / "second")
    manifest = json.loads((kit.root / "second/model.json").read_text())
    assert manifest["trained"] == ["connector", "llm"]
    assert manifest["stage"] == "stage-1"
    shutil.rmtree(kit.root / "first")
    again = VisionLanguageModel.from_pretrained(kit.root / "second")
    assert torch.equal(again(**kit.inputs()).logits, loaded(**kit.inputs()).logits)


def test_a_checkpoint_never_hangs_on_an_earlier_checkpoint(kit: Any) -> None:
    # Neither part has a source, and neither trained: the second checkpoint must hold both as the first did.
    model = kit.build(pretrained=False)
    model.llm = tiny_llm(seed=5)
    kit.train(model, STAGE_1).save_pretrained(kit.root / "first")
    VisionLanguageModel.from_pretrained(kit.root / "first").save_pretrained(kit.root / "second")
    shutil.rmtree(kit.root / "first")
    again = VisionLanguageModel.from_pretrained(kit.root / "second")
    assert torch.equal(again(**kit.inputs()).logits, model(**kit.inputs()).logits)


def test_sources_are_found_from_any_working_folder(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kit.root)
    encoder = create_encoder(f"hf:{kit.root}/clip", pretrained="clip")
    llm, _ = load_llm("llm")
    model = VisionLanguageModel(encoder, MLP(32, 32), llm, image_token_id=kit.image).eval()
    model.save_pretrained("run")
    monkeypatch.chdir("/")
    loaded = VisionLanguageModel.from_pretrained(kit.root / "run")
    assert isinstance(loaded.connector, MLP)
    assert torch.equal(loaded(**kit.inputs(16)).logits, model(**kit.inputs(16)).logits)


def test_tied_weights_stay_tied(kit: Any) -> None:
    llm: Any = tiny_llm("gemma")
    model = kit.build()
    model = VisionLanguageModel(model.encoder, model.connector, llm, image_token_id=kit.image).eval()  # type: ignore[arg-type]
    first, second = (module for module in model.connector.modules() if isinstance(module, nn.Linear))
    assert first.weight.shape != second.weight.shape
    second.bias = first.bias
    model.save_pretrained(kit.root / "run")
    saved = load_file(kit.root / "run/connector.safetensors")
    assert sum(name.endswith("bias") for name in saved) == 2
    loaded = VisionLanguageModel.from_pretrained(kit.root / "run")
    assert loaded.llm.lm_head.weight is loaded.llm.model.embed_tokens.weight  # type: ignore[union-attr]
    assert torch.equal(loaded(**kit.inputs(4)).logits, model(**kit.inputs(4)).logits)


def test_a_part_of_several_dtypes_keeps_each(kit: Any) -> None:
    model = kit.train(kit.build(dtype="bfloat16"), STAGE_3)
    for module in model.encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    model.save_pretrained(kit.root / "run")
    loaded = VisionLanguageModel.from_pretrained(kit.root / "run")
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


def test_a_file_in_the_place_of_a_folder_is_left_alone(kit: Any) -> None:
    place = kit.root / "run"
    place.write_text("mine")
    with pytest.raises(VlmError, match="a file of that name is there"):
        kit.build().save_pretrained(place)
    assert place.read_text() == "mine"
    assert not list(kit.root.glob(".run*"))


PARTIAL = {
    # Files, and the parameters that are saved: of a block of CLIP, or the norms of an LLM of two layers.
    "last-block": (LAST_BLOCK, {"connector.safetensors", "encoder.trained.safetensors"}, 16),
    "norms": (NORMS, {"connector.safetensors", "llm.trained.safetensors"}, 5),
    "whole": (STAGE_2, {"connector.safetensors", "llm"}, None),
    "nothing": (STAGE_1, {"connector.safetensors"}, None),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PARTIAL)
def test_a_partial_checkpoint_holds_what_trained_over_the_source(kit: Any, name: str, dtype: str) -> None:
    stage, files, count = PARTIAL[name]
    model = kit.train(kit.build(dtype=dtype), stage)
    hold_masters(model, "bf16")
    model.save_pretrained(kit.root / "run", partial=True)
    assert {path.name for path in (kit.root / "run").iterdir()} == {"model.json", *files}
    if count is not None:
        file = next(iter(name for name in files if "trained" in name))
        parameters = dict(model.named_parameters())
        saved = [key for key in load_file(kit.root / "run" / file) if f"{file.split('.')[0]}.{key}" in parameters]
        assert len(saved) == count
    loaded = VisionLanguageModel.from_pretrained(kit.root / "run")
    assert part_weights.part_hashes(loaded) == part_weights.part_hashes(model)
    # A part that was loaded so may be saved so again, or whole.
    loaded.save_pretrained(kit.root / "again", partial=True)
    assert {path.name for path in (kit.root / "again").iterdir()} == {"model.json", *files}
    loaded.save_pretrained(kit.root / "whole")
    assert not list((kit.root / "whole").glob("*.trained.*"))
    (kit.root / "clip").rename(kit.root / "moved")
    (kit.root / "llm").rename(kit.root / "moved-llm")
    model.save_pretrained(kit.root / "gone", partial=True)
    assert not list((kit.root / "gone").glob("*.trained.*"))


def test_partial_checkpoints_join_the_tensors_of_all_stages(kit: Any) -> None:
    model = kit.train(kit.build(), LAST_BLOCK, NORMS, LORA)
    model.save_pretrained(kit.root / "run", partial=True)
    files = {path.name for path in (kit.root / "run").iterdir()}
    assert files == {
        *("model.json", "connector.safetensors", "adapter", "encoder.trained.safetensors", "llm.trained.safetensors")
    }
    loaded = VisionLanguageModel.from_pretrained(kit.root / "run")
    assert torch.equal(loaded(**kit.inputs()).logits, model(**kit.inputs()).logits)
    kit.train(loaded, NORMS)
    loaded.save_pretrained(kit.root / "next", partial=True)
    again = VisionLanguageModel.from_pretrained(kit.root / "next")
    assert torch.equal(again(**kit.inputs()).logits, loaded(**kit.inputs()).logits)


def test_a_partial_checkpoint_never_hangs_on_another_checkpoint(kit: Any) -> None:
    kit.train(kit.build(), STAGE_2).save_pretrained(kit.root / "first")
    loaded = kit.train(VisionLanguageModel.from_pretrained(kit.root / "first"), NORMS)
    loaded.save_pretrained(kit.root / "second", partial=True)
    assert (kit.root / "second/llm").is_dir()
    shutil.rmtree(kit.root / "first")
    again = VisionLanguageModel.from_pretrained(kit.root / "second")
    assert torch.equal(again(**kit.inputs()).logits, loaded(**kit.inputs()).logits)


def test_a_partial_checkpoint_over_another_source_is_refused(kit: Any) -> None:
    kit.train(kit.build(), LAST_BLOCK).save_pretrained(kit.root / "run", partial=True)
    kit.write_clip("clip", seed=9)
    with pytest.raises(VlmError, match=r"the encoder 'hf:.*' is not the one that checkpoint"):
        VisionLanguageModel.from_pretrained(kit.root / "run")
    kit.write_clip("clip", patch=14)
    with pytest.raises(VlmError, match="build the same one"):
        VisionLanguageModel.from_pretrained(kit.root / "run")
