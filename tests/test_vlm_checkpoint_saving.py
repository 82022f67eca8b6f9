"""A save is whole or not at all: full disks, killed processes, folders of other things."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from connectors.errors import VlmError
from vlm_encoders.vlm.atomic import atomic_folder
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import VLMProcessor
from vlm_encoders.vlm.stages import STAGE_1, STAGE_3


def fill_the_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_last_good_checkpoint(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.train(kit.build(), STAGE_1)
    model.save_pretrained(kit.root / "runs/model")
    wanted = model(**kit.inputs()).logits
    kit.train(model, STAGE_3)
    for place in ("safetensors.torch.save_file", "vlm_encoders.vlm.checkpoint.save_llm", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(place, fill_the_disk)
            with pytest.raises(
                VlmError, match=r"No space left on device; what was there is untouched, free some space"
            ):
                model.save_pretrained(kit.root / "runs/model")
            with pytest.raises(VlmError, match="nothing was left behind"):
                model.save_pretrained(kit.root / "runs/new")
        assert [path.name for path in (kit.root / "runs").iterdir()] == ["model"]
    loaded = VisionLanguageModel.from_pretrained(kit.root / "runs/model")
    assert torch.equal(loaded(**kit.inputs()).logits, wanted)
    model.save_pretrained(kit.root / "runs/model")
    loaded = VisionLanguageModel.from_pretrained(kit.root / "runs/model")
    assert torch.equal(loaded(**kit.inputs()).logits, model(**kit.inputs()).logits)


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_save_that_is_killed_at_any_rename_leaves_a_checkpoint(
    kit: Any, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kit.build()
    model.save_pretrained(kit.root / "runs/model")
    wanted = model(**kit.inputs()).logits
    kit.train(model, STAGE_1)
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
            model.save_pretrained(kit.root / "runs/model")
    assert len(list((kit.root / "runs").iterdir())) == 2
    new = model(**kit.inputs()).logits
    loaded = VisionLanguageModel.from_pretrained(kit.root / "runs/model")
    assert torch.equal(loaded(**kit.inputs()).logits, new if renames == 2 else wanted)
    model.save_pretrained(kit.root / "runs/model")
    assert [path.name for path in (kit.root / "runs").iterdir()] == ["model"]
    assert torch.equal(VisionLanguageModel.from_pretrained(kit.root / "runs/model")(**kit.inputs()).logits, new)


def test_an_error_of_another_kind_is_handed_on(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()

    def fail() -> None:
        with atomic_folder(tmp_path / "run") as inside:
            (inside / "file").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not list((tmp_path / "run").iterdir())


def test_saving_never_replaces_a_folder_that_holds_other_things(kit: Any) -> None:
    model = kit.build()
    (kit.root / "home").mkdir()
    (kit.root / "home/thesis.txt").write_text("years of work")
    with pytest.raises(VlmError, match=r"holds 1 things .* such as 'thesis.txt'"):
        model.save_pretrained(kit.root / "home")
    assert (kit.root / "home/thesis.txt").read_text() == "years of work"


def test_the_processor_of_a_checkpoint_stays_when_the_model_is_saved_again(
    kit: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = kit.build(newline=False)
    processor = VLMProcessor(model.encoder, model.connector, tokenizer)  # type: ignore[arg-type]
    processor.save_pretrained(kit.root / "run")
    for _ in range(2):
        model.save_pretrained(kit.root / "run")
    loaded = VLMProcessor.from_pretrained(kit.root / "run", model)
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
