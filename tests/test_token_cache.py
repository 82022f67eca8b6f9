"""Tokens kept on the disk: the run is the one without them, whatever is killed or changed."""

import copy
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from connectors import build_connector
from connectors.errors import VlmError
from connectors.tokens import PackedTokens, VisualTokens
from vlm_encoders.encoder import Encoder
from vlm_encoders.registry import create_encoder
from vlm_encoders.tiling import PRESETS, Tiler, build_tiler
from vlm_encoders.training import ConversationDataset, TrainConfig
from vlm_encoders.training.feeding.lengths import data_lengths
from vlm_encoders.training.kept.kept_tokens import TokenCache, image_key
from vlm_encoders.training.kept.token_cache import from_cache, with_token_cache
from vlm_encoders.training.kept.token_fill import fill_cache
from vlm_encoders.training.kept.token_store import TokenStore, TokenWriter
from vlm_encoders.vlm.batch import to_device
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import VLMProcessor
from vlm_encoders.vlm.stages import STAGE_1, STAGE_3, apply_stage

CPU = torch.device("cpu")
SIZES = [(28, 28), (40, 90), (90, 30), (57, 64)]


def draw(path: Path, size: tuple[int, int], seed: int) -> None:
    levels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(levels.numpy()).save(path)


def record(index: int, images: list[str]) -> dict[str, Any]:
    asked = {"from": "human", "value": "<image> " * len(images) + "w4"}
    return {"id": str(index), "image": images, "conversations": [asked, {"from": "gpt", "value": f"w{index} w2"}]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six conversations on five pictures: one of text alone, one of two pictures, one picture that comes twice."""
    for index, size in enumerate([*SIZES, (33, 33)]):
        draw(tmp_path / f"{index}.png", size, index)
    images = [["0.png"], ["1.png"], [], ["2.png", "3.png"], ["0.png"], ["4.png"]]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record(index, names) for index, names in enumerate(images)]))
    return path


@pytest.fixture
def dino(tmp_path: Path) -> Encoder:
    """A native encoder of two blocks of 32: patches of 7 px, CLS and two registers."""
    torch.manual_seed(3)
    config = DINOv3ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28,
        patch_size=7, num_register_tokens=2,
    )  # fmt: skip
    DINOv3ViTModel(config).save_pretrained(tmp_path / "dino")
    return create_encoder(f"hf:{tmp_path}/dino").eval()


def small(name: str) -> Tiler:
    known = PRESETS[name].tiler.__dataclass_fields__
    wanted = {
        "max_pixels": 2352, "min_pixels": 196, "max_tiles": 6, "max_patches": 48, "slice_size": 28,
        "markers": False, "patch": 7, "merge": 1, **({"scales": (1, 2)} if name == "dynamic-s2" else {}),
    }  # fmt: skip
    return build_tiler(name, 28, **{key: value for key, value in wanted.items() if key in known})


def assemble(encoder: Encoder, llama: Any, tokenizer: Any, tiler: Tiler | None = None, recipe: str = "mlp") -> Any:
    spec = encoder.token_spec if tiler is None else tiler.layout.connector_spec(encoder.token_spec)
    connector = build_connector(recipe, spec, 32, seed=0)
    processor = VLMProcessor(encoder, connector, tokenizer, tiler=tiler)
    layout = processor.layout
    model = VisionLanguageModel(encoder, connector, llama, image_token_id=processor.image_token_id, layout=layout)
    return apply_stage(model, STAGE_1).train(), processor


def filled(model: Any, processor: Any, data: Path, **options: Any) -> tuple[ConversationDataset, TokenCache]:
    dataset = ConversationDataset(data, None, processor)
    cache = TokenCache(data.parent / "cache", model.encoder, processor, **options)
    fill_cache(cache, dataset, model.encoder, device=CPU)
    return from_cache(dataset, cache), cache


def train(model: Any, dataset: Any, autocast: torch.dtype | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Take a step on each pair of samples, twice over."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    losses = []
    for first in (0, 2, 4) * 2:
        batch = dataset.processor.collate([dataset[first], dataset[first + 1]])
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = model(**to_device(batch, CPU)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize(("recipe", "autocast"), [("mlp", None), ("keep_prefix+mlp", None), ("mlp", torch.bfloat16)])
def test_a_cached_run_is_the_other_one_to_the_bit(
    clip: Encoder, llama: Any, tokenizer: Any, data: Path, recipe: str, autocast: torch.dtype | None
) -> None:
    model, processor = assemble(clip, llama, tokenizer, recipe=recipe)
    dataset, cache = filled(model, processor, data, autocast=autocast)
    plain = ConversationDataset(data, None, processor)
    calls: list[int] = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    losses, weights = train(model, dataset, autocast)
    assert not calls
    expected, wanted = train(model, plain, autocast)
    assert losses == expected
    assert all(torch.equal(weights[name], tensor) for name, tensor in wanted.items())
    assert len(cache.store) == 5
    assert dataset[1].pixel_values is None
    assert dataset[2].visual is None
    assert dataset[1].plans == plain[1].plans


@pytest.mark.parametrize("name", list(PRESETS))
def test_all_tilers(clip: Encoder, dino: Encoder, llama: Any, tokenizer: Any, data: Path, name: str) -> None:
    tiler = small(name)
    model, processor = assemble(dino if tiler.native else clip, llama, tokenizer, tiler)
    dataset, _ = filled(model, processor, data)
    plain = ConversationDataset(data, None, processor)
    kind = PackedTokens if tiler.native else VisualTokens
    for index in (1, 3):
        assert isinstance(dataset[index].visual, kind)
        assert dataset[index].input_ids == plain[index].input_ids
    for packed in (False, True):
        batches = [processor.collate([each[index] for index in range(6)], packed=packed) for each in (dataset, plain)]
        with torch.no_grad():
            cached, uncached = (model(**batch).loss for batch in batches)
        # Views are encoded in other batches, whose sums are rounded in another order.
        torch.testing.assert_close(cached, uncached, rtol=0, atol=1e-6)


def test_only_what_is_new_is_encoded(clip: Encoder, llama: Any, tokenizer: Any, data: Path) -> None:
    model, processor = assemble(clip, llama, tokenizer)
    filled(model, processor, data)
    views: list[int] = []
    model.encoder.register_forward_pre_hook(lambda _, args: views.append(len(args[0])))
    first, _ = filled(model, processor, data)
    # The one view is that by which the dtype of the output is known.
    assert views == [1]
    old = first[1].visual.tokens
    draw(data.parent / "1.png", SIZES[1], 77)
    with pytest.raises(
        VlmError, match=r"sample 1 .*: image '.*1\.png' is not in the token cache .*start the run again"
    ):
        first[1]
    views.clear()
    second, cache = filled(model, processor, data)
    assert views == [1, 1]
    assert not torch.equal(second[1].visual.tokens, old)
    assert len(cache.store) == 6


def test_a_key_is_of_all_that_tokens_depend_on(clip: Encoder, llama: Any, tokenizer: Any, data: Path) -> None:
    _, processor = assemble(clip, llama, tokenizer)
    base = TokenCache(data.parent, clip, processor).folder
    assert TokenCache(data.parent, clip, processor).folder == base
    assert TokenCache(data.parent, clip, processor, autocast=torch.bfloat16).folder != base
    assert TokenCache(data.parent, clip, processor, dtype=torch.bfloat16).folder != base
    assert TokenCache(data.parent, clip, assemble(clip, llama, tokenizer, small("internvl"))[1]).folder != base
    other = copy.deepcopy(clip)
    next(other.parameters()).data[0] += 1
    assert TokenCache(data.parent, other, processor).folder != base
    other = copy.deepcopy(clip)
    other.spec = clip.spec.altered(mean=(0.5, 0.5, 0.5))
    assert TokenCache(data.parent, other, processor).folder != base
    keys = {image_key(data.parent / "0.png"), image_key((data.parent / "0.png").read_bytes())}
    keys |= {image_key(Image.open(data.parent / "0.png")), image_key((data.parent / "1.png").read_bytes())}
    assert len(keys) == 4
    os.utime(data.parent / "0.png", ns=(1, 1))
    assert image_key(data.parent / "0.png") not in keys


def test_whatever_is_cut_off_nothing_half_written_is_read(tmp_path: Path) -> None:
    values = {bytes([number] * 16): torch.full((number,), float(number)) for number in range(1, 5)}
    with TokenWriter(tmp_path / "whole") as writer:
        for key, tensor in values.items():
            writer.add(key, (number := len(tensor), 2 * number), [tensor])
    tokens, index = writer.files
    for file in (tokens, index):
        data = file.read_bytes()
        for length in range(len(data)):
            shutil.rmtree(tmp_path / "cut", ignore_errors=True)
            shutil.copytree(tmp_path / "whole", tmp_path / "cut")
            (tmp_path / "cut" / file.name).write_bytes(data[:length])
            store = TokenStore(tmp_path / "cut", torch.float32)
            found = {key: entry for key in values if (entry := store.find(key)) is not None}
            assert len(found) < len(values)
            assert list(found) == list(values)[: len(found)]
            for key, entry in found.items():
                assert torch.equal(store.read(entry), values[key])
                assert entry.size == (len(values[key]), 2 * len(values[key]))
    # A writer that is killed leaves its files; the next one makes its own.
    with TokenWriter(tmp_path / "cut") as writer:
        writer.add(b"n" * 16, (1, 1), [torch.ones(3)])
    again = TokenStore(tmp_path / "cut", torch.float32)
    assert torch.equal(again.read(again.find(b"n" * 16)), torch.ones(3))
    assert again.find(b"o" * 16) is None


def test_an_error_while_filling_leaves_no_record(
    clip: Encoder, llama: Any, tokenizer: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor = assemble(clip, llama, tokenizer)
    dataset = ConversationDataset(data, None, processor)
    cache = TokenCache(data.parent / "cache", clip, processor)

    def fill_the_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fill_the_disk)
        with pytest.raises(VlmError, match=r"cannot be written: No space left on device; .*free some space"):
            fill_cache(cache, dataset, clip, device=CPU)
    assert len(TokenStore(cache.folder, torch.float32)) == 0
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 1000))  # type: ignore[attr-defined]
        # 16 patch tokens and one prefix token of width 32 in float32.
        sentence = r"about 6 images of 2\.2 kB each, 13\.1 kB in all, its disk has 1\.0 kB left; name a folder"
        with pytest.raises(VlmError, match=sentence):
            fill_cache(cache, dataset, clip, device=CPU)


def test_workers_read_and_processes_share(clip: Encoder, llama: Any, tokenizer: Any, data: Path) -> None:
    _, processor = assemble(clip, llama, tokenizer)
    dataset = ConversationDataset(data, None, processor)
    cache = TokenCache(data.parent / "cache", clip, processor)
    fill_cache(cache, dataset, clip, device=CPU, rank=1, world=2, workers=1)
    assert len(cache.store) == 4
    fill_cache(cache, dataset, clip, device=CPU, rank=0, world=2)
    assert len(cache.store) == 5
    cached = pickle.loads(pickle.dumps(from_cache(dataset, cache)))  # noqa: S301 - as a worker that is spawned gets it
    assert cached[0].visual.tokens.shape == (1, 16, 32)
    loader = DataLoader(cached, batch_size=3, collate_fn=processor.collate, num_workers=1)
    for batch, indices in zip(loader, (range(3), range(3, 6)), strict=True):
        expected = processor.collate([cached[index] for index in indices])
        assert torch.equal(batch["visual"].tokens, expected["visual"].tokens)
        assert torch.equal(batch["visual"].prefix, expected["visual"].prefix)


def test_bfloat16_halves_the_room(clip: Encoder, llama: Any, tokenizer: Any, data: Path) -> None:
    model, processor = assemble(clip, llama, tokenizer)
    exact, _ = filled(model, processor, data)
    half, cache = filled(model, processor, data, dtype=torch.bfloat16)
    assert torch.equal(half[0].visual.tokens, exact[0].visual.tokens.bfloat16())
    assert sum(file.stat().st_size for file in cache.folder.glob("*.tokens")) == 5 * 17 * 32 * 2


def settings(data: Path, **more: Any) -> TrainConfig:
    return TrainConfig(data=str(data), output=str(data.parent / "out"), steps=1, cpu=True, **more)


def test_it_is_asked_for_by_the_settings(clip: Encoder, llama: Any, tokenizer: Any, data: Path) -> None:
    model, processor = assemble(clip, llama, tokenizer)
    dataset = ConversationDataset(data, None, processor)
    accelerator, said = Accelerator(cpu=True), []
    assert with_token_cache(dataset, model, processor, settings(data), accelerator) is dataset
    config = settings(data, token_cache=str(data.parent / "cache"))
    cached = with_token_cache(dataset, model, processor, config, accelerator, say=said.append)
    assert cached[0].visual is not None
    assert cached.name(1) == dataset.name(1)
    assert dataset[0].visual is None
    assert len(said) == 1
    assert "encoding about 6 images of 2.2 kB each" in said[0]
    assert data_lengths(cached).tokens == data_lengths(dataset).tokens
    prompt = cached.processor.prompt([{"role": "user", "content": "<image> w1"}], [data.parent / "0.png"])
    assert prompt.pixel_values is not None
    assert prompt.visual is None


def test_what_has_no_tokens_of_its_own_is_refused(clip: Encoder, llama: Any, tokenizer: Any, data: Path) -> None:
    model, processor = assemble(clip, llama, tokenizer)
    dataset = ConversationDataset(data, None, processor)
    accelerator, config = Accelerator(cpu=True), settings(data, token_cache=str(data.parent / "cache"))
    with pytest.raises(VlmError, match="needs samples by index with their images, and a list has no processor"):
        with_token_cache([dataset[0]], model, processor, config, accelerator)
    apply_stage(model, STAGE_3)
    with pytest.raises(
        VlmError, match=r"a frozen encoder gives, and 'clip-small' trains \(\d+ parameters, 'net.*leave"
    ):
        with_token_cache(dataset, model, processor, config, accelerator)


def test_a_picture_that_cannot_be_read_is_told_by_its_sample(
    clip: Encoder, llama: Any, tokenizer: Any, data: Path
) -> None:
    (data.parent / "1.png").write_bytes(b"")
    (data.parent / "4.png").unlink()
    _, processor = assemble(clip, llama, tokenizer)
    dataset = ConversationDataset(data, None, processor, check=False)
    cache = TokenCache(data.parent / "cache", clip, processor)
    fill_cache(cache, dataset, clip, device=CPU)
    cached = from_cache(dataset, cache)
    assert cached[3].visual is not None
    for index, sentence in ((1, r"sample 1 .*is empty"), (5, r"sample 5 .*is missing")):
        with pytest.raises(VlmError, match=sentence):
            cached[index]
