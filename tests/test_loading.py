"""Where weights lie and how they are read: hub cache, folder or file; revisions, shards, pickles; no guess, no lie."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from connectors.errors import VlmError
from vlm_encoders.encoders.weight_files import OPEN_CLIP_NAMES, load_state, weight_files
from vlm_encoders.encoders.weights import find_weights, snapshot
from vlm_encoders.registry import create_encoder, encoder_spec

STATE = {"tower.a": torch.arange(3.0), "tower.b": torch.ones(2, 2), "llm.c": torch.zeros(4)}


def same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


def fake_hub(root: Path, repo: str, revisions: dict[str, str]) -> dict[str, Path]:
    """Make the folders of the hub's cache: a commit for each branch or tag, and give their snapshots."""
    home = root / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    for name, commit in revisions.items():
        (home / "refs" / name).write_text(commit)
        (home / "snapshots" / commit).mkdir(parents=True)
    return {name: home / "snapshots" / commit for name, commit in revisions.items()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def write_shards(folder: Path, suffix: str = ".safetensors") -> None:
    """Write `STATE` as two files and an index: the tower in the first, the LLM in the second."""
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    places = {key: f"{stem}-0000{1 if key.startswith('tower') else 2}-of-00002{suffix}" for key in STATE}
    for name in set(places.values()):
        part = {key: value for key, value in STATE.items() if places[key] == name}
        save_file(part, folder / name) if suffix == ".safetensors" else torch.save(part, folder / name)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": places}))


def is_tower(key: str) -> bool:
    return key.startswith("tower.")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_read_by_their_index(suffix: str, tmp_path: Path) -> None:
    write_shards(tmp_path, suffix)
    # A file that the index does not name is of something else.
    save_file({"stranger": torch.ones(1)}, tmp_path / "adapter.safetensors")
    assert same(load_state(tmp_path, "x"), STATE)


def test_shards_without_wanted_keys_are_not_opened(tmp_path: Path) -> None:
    write_shards(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    second.write_bytes(b"no safetensors at all")
    tower = {key: value for key, value in STATE.items() if is_tower(key)}
    assert same(load_state(tmp_path, "x", wanted=is_tower), tower)
    second.unlink()
    assert same(load_state(tmp_path, "x", wanted=is_tower), tower)
    with pytest.raises(VlmError, match=r"has no model-00002-of-00002.safetensors, which its index names"):
        load_state(tmp_path, "x")


def test_names_tell_which_file_of_several_is_read(tmp_path: Path) -> None:
    save_file({"theirs": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"ours": torch.ones(1)}, tmp_path / "open_clip_model.safetensors")
    assert weight_files(tmp_path, "x") == [tmp_path / "model.safetensors"]
    assert weight_files(tmp_path, "x", names=OPEN_CLIP_NAMES) == [tmp_path / "open_clip_model.safetensors"]


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(VlmError, match=r"^x: folder .* holds no weights; expected one of model.safetensors, "):
        load_state(tmp_path, "x")
    for name in ("one", "two"):
        save_file(STATE, tmp_path / f"{name}.safetensors")
    with pytest.raises(VlmError, match="holds no weights"):
        load_state(tmp_path, "x")
    assert same(load_state(tmp_path / "one.safetensors", "x"), STATE)


class Harmful:
    """What a pickle must not run."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harmed"),))


@pytest.mark.parametrize("content", [{"a": Harmful()}, {"a": "text"}, [torch.ones(1)], None])
def test_a_pickle_with_more_than_tensors_is_refused(
    content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(VlmError, match=r"^x: weights .*pytorch_model.bin' cannot be read: "):
        load_state(tmp_path, "x")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"no weights", pickle.dumps({"a": 1}, protocol=2)])
def test_broken_files_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VlmError, match=rf"^x: weights '.*{name}' cannot be read: .*; give an intact file"):
        load_state(tmp_path, "x")


@pytest.mark.parametrize(
    "content",
    [b"\x80\x02}q\x00h\x05.", b"\x80\x02K\x01a.", b"\x80\x02(.", b"\x80\x02G\x00.", b"\x80\x02]q\x00]q\x01s."],
)
def test_a_damaged_pickle_is_refused_whatever_it_raises(content: bytes, tmp_path: Path) -> None:
    # A whole file of torch's old form: magic number, protocol, system, then the damaged object.
    head = b"".join(pickle.dumps(each, protocol=2) for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    for start in (head, b""):
        (tmp_path / "pytorch_model.bin").write_bytes(start + content)
        with pytest.raises(VlmError, match=r"^x: weights '.*pytorch_model.bin' cannot be read: .+; give an intact"):
            load_state(tmp_path, "x")


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    torch.save({}, tmp_path / "empty.bin")
    for name in ("empty.safetensors", "empty.bin"):
        with pytest.raises(VlmError, match=rf"{name}' cannot be read: it holds no tensors; give an intact file"):
            load_state(tmp_path / name, "x", wanted=is_tower)


def test_a_broken_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(VlmError, match="has no weight_map; repair the file"):
        load_state(tmp_path, "x")


def test_a_revision_is_taken_from_the_cache(cache: Path) -> None:
    folders = fake_hub(cache, "org/net", {"main": "1" * 40, "v2": "2" * 40})
    for folder in folders.values():
        save_file(STATE, folder / "model.safetensors")
    for revision, name in ((None, "main"), ("main", "main"), ("v2", "v2"), ("2" * 40, "v2")):
        assert find_weights("x", "org/net", pretrained=True, revision=revision) == folders[name]
    sentence = "^no network and no local weights for 'x' at revision 'v3'; pass pretrained=False or set HF_HOME"
    with pytest.raises(VlmError, match=sentence):
        find_weights("x", "org/net", pretrained=True, revision="v3")


@pytest.mark.filterwarnings("ignore:.*the cache lacks its preprocessor_config")
def test_a_revision_reaches_the_encoder(cache: Path) -> None:
    import transformers

    folders = fake_hub(cache, "org/net", {"main": "1" * 40, "v2": "2" * 40})
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    models = {}
    for seed, (name, folder) in enumerate(folders.items()):
        torch.manual_seed(seed)
        models[name] = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**shape, image_size=28, patch_size=7))
        models[name].save_pretrained(folder)
    pixels = torch.randn(1, 3, 28, 28)
    for revision, name in ((None, "main"), ("v2", "v2")):
        encoder = create_encoder("hf:org/net", revision=revision)
        expected = models[name].eval()(pixels, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(encoder(pixels).tokens, expected[:, 1:])


def test_a_local_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(VlmError, match=r"is no hub id, so it has no revision 'v2'; leave revision out"):
        find_weights("x", str(tmp_path), pretrained=True, revision="v2")
    # The revision of a row says nothing of weights that are given by hand.
    assert find_weights("x", "org/net", pretrained=str(tmp_path), revision="v2") == tmp_path


def test_a_revision_of_weights_that_are_elsewhere_is_refused(tmp_path: Path) -> None:
    for pretrained in (tmp_path, False):
        with pytest.raises(VlmError, match=r"^clip-vit-b-32: revision 'v2' is of weights on the hub, pretrained="):
            create_encoder("clip-vit-b-32", pretrained=pretrained, revision="v2")


def test_a_cache_that_lacks_a_shard_is_no_cache(cache: Path) -> None:
    folder = fake_hub(cache, "org/net", {"main": "1" * 40})["main"]
    write_shards(folder)
    assert find_weights("x", "org/net", pretrained=True) == folder
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert find_weights("x", "org/net", pretrained=True, wanted=is_tower) == folder
    with pytest.raises(VlmError, match="no network and no local weights for 'x'"):
        find_weights("x", "org/net", pretrained=True)


class GoneError(RevisionNotFoundError):
    """The hub's error, which can be made without an answer of the hub."""

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)


class Hub:
    """The hub as one repository without a network: what is asked of it is written down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.patterns: list[str] = []

    def list_repo_files(self, repo: str, revision: str | None = None) -> list[str]:
        if revision == "gone":
            raise GoneError("no such revision")
        return [file.name for file in self.folder.iterdir()]

    def hf_hub_download(self, repo: str, name: str, revision: str | None = None) -> str:
        fetched = self.folder / "fetched" / name
        fetched.parent.mkdir(exist_ok=True)
        fetched.write_bytes((self.folder / name).read_bytes())
        return str(fetched)

    def snapshot_download(self, repo: str, **arguments: Any) -> str:
        self.patterns = arguments["allow_patterns"]
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that answers."""
    made = Hub(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("vlm_encoders.encoders.weights._require_network", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: made)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", made.hf_hub_download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
    return made


def test_one_form_of_the_weights_is_fetched(hub: Hub) -> None:
    for name in ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "tf_model.h5"):
        (hub.folder / name).touch()
    snapshot("org/net", "x")
    assert hub.patterns == ["*.json", "model.safetensors"]
    snapshot("org/net", "x", names=OPEN_CLIP_NAMES)
    assert hub.patterns == ["*.json", "open_clip_model.safetensors"]
    snapshot("org/net", "x", weights=False)
    assert hub.patterns == ["*.json"]


def test_only_shards_with_wanted_keys_are_fetched(hub: Hub) -> None:
    write_shards(hub.folder)
    find_weights("x", "org/net", pretrained=True, wanted=is_tower)
    assert hub.patterns == ["*.json", "model-00001-of-00002.safetensors"]


def test_what_the_hub_does_not_have_is_said(hub: Hub) -> None:
    with pytest.raises(VlmError, match=r"^x: 'org/net' has no revision 'gone'; give a commit, tag or branch of it"):
        snapshot("org/net", "x", revision="gone")
    with pytest.raises(VlmError, match=r"^x: 'org/net' holds none of model.safetensors, .*; pass a local file"):
        snapshot("org/net", "x")


@pytest.mark.parametrize("source", ["./nofolder", "../nofolder", "/no/folder", "~/nofolder", "a/b/c", "nofolder/"])
def test_what_is_no_hub_id_is_refused_without_asking(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("vlm_encoders.encoders.weights._require_network", ask)
    with pytest.raises(VlmError, match=r"^hf:.*: '.*' is neither a folder nor a hub id such as org/name"):
        encoder_spec(f"hf:{source}")
    with pytest.raises(VlmError, match=r"^x: '.*' is neither a folder nor a hub id such as org/name"):
        find_weights("x", source, pretrained=True)


VIT = {"model_type": "vit", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 32}


def write_vit(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**VIT, "intermediate_size": 48, "patch_size": 8}))


def test_the_hub_is_asked_for_the_processor_that_the_cache_lacks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fake_hub(cache, "org/net", {"main": "1" * 40})["main"]
    write_vit(folder)
    asked: list[tuple[str, str]] = []

    def download(repo: str, name: str, revision: str) -> str:
        asked.append((name, revision))
        (folder / name).write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.warns(UserWarning, match=r"^hf:org/net: the cache lacks .* assumed to be the vit family's: resize=sq"):
        encoder_spec("hf:org/net")
    assert not asked
    monkeypatch.setattr("vlm_encoders.encoders.weights._require_network", lambda *_: None)
    for _ in range(2):
        assert encoder_spec("hf:org/net").mean == (0.1, 0.2, 0.3)
    # At the commit that is cached: main may have moved on.
    assert asked == [("preprocessor_config.json", "1" * 40)]


def test_what_the_hub_was_found_not_to_have_is_not_asked_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    folder = fake_hub(cache, "org/net", {"main": "1" * 40})["main"]
    write_vit(folder)
    marks = folder.parents[1] / ".no_exist" / folder.name
    marks.mkdir(parents=True)
    (marks / "preprocessor_config.json").touch()
    asked: list[str] = []

    def download(repo: str, name: str, revision: str) -> str:
        asked.append(name)
        raise EntryNotFoundError("no such file")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("vlm_encoders.encoders.weights._require_network", lambda *_: None)
    assert encoder_spec("hf:org/net").resize == "squash"
    assert asked == ["processor_config.json"]
    assert not recwarn.list
