"""The processor: its counts are the model's, it travels without weights, and refuses what would be cut."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from connectors import build_connector
from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.tiling import AnyResTiler, InternVLTiler, Tiler
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import VLMProcessor

TILERS: list[Tiler | None] = [
    None,
    AnyResTiler(tile_size=28, grids=((1, 2), (2, 1), (2, 2), (1, 3))),
    AnyResTiler(tile_size=28, grids=((2, 2),), thumbnail=False),
    InternVLTiler(tile_size=28, max_tiles=4, markers=False),
]
SIZES = [(28, 28), (1, 1), (200, 30), (30, 200), (57, 91), (640, 480)]
RECIPES = ["mlp", "pixel_shuffle:factor=2+mlp", "keep_prefix+mlp"]


def question(text: str, reply: str = "w1 w2") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


def build(
    encoder: Encoder, tokenizer: Any, tiler: Tiler | None = None, recipe: str = "mlp", **options: Any
) -> VLMProcessor:
    return VLMProcessor(encoder, build_connector(recipe, encoder.token_spec, 32), tokenizer, tiler=tiler, **options)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tiler", TILERS, ids=["whole", "anyres", "anyres-bare", "internvl"])
def test_counts_are_those_of_the_model(
    tiler: Tiler | None,
    recipe: str,
    clip: Encoder,
    llama: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    connector = build_connector(recipe, clip.token_spec, 32)
    processor = VLMProcessor(clip, connector, tokenizer, tiler=tiler)
    token, layout = processor.image_token_id, processor.layout
    model = VisionLanguageModel(clip, connector, llama, image_token_id=token, layout=layout)
    for height, width in SIZES:
        image = Image.new("RGB", (width, height), (90, 10, 200))
        sample = processor.sample(question("w5 <image> w6"), [image])
        with torch.no_grad():
            [embedded] = model.embed_images(sample.pixel_values, sample.plans)
        assert sample.input_ids.count(processor.image_token_id) == len(embedded)
        assert processor.num_image_tokens((height, width)) == len(embedded)


def test_labels_stay_on_the_answers_when_images_are_expanded(clip: Encoder, tokenizer: PreTrainedTokenizerFast) -> None:
    processor = build(clip, tokenizer)
    image = Image.new("RGB", (30, 30))
    sample = processor.sample([*question("<image> w5", "w1 w2"), *question("w3 <image> w4", "w6")], [image, image])
    assert len(sample.labels) == len(sample.input_ids)
    supervised = [token for token, label in zip(sample.input_ids, sample.labels, strict=True) if label != -100]
    assert tokenizer.decode(supervised).split() == ["w1", "w2", "</s>", "w6", "</s>"]
    assert supervised == [label for label in sample.labels if label != -100]
    assert sample.pixel_values is not None
    assert sample.pixel_values.shape == (2, 3, 28, 28)


def test_a_prompt_is_the_sample_up_to_its_answer(clip: Encoder, tokenizer: PreTrainedTokenizerFast) -> None:
    processor = build(clip, tokenizer)
    image = Image.new("RGB", (30, 30))
    sample = processor.sample(question("<image> w5"), [image])
    prompt = processor.prompt(question("<image> w5")[:1], [image])
    first = next(place for place, label in enumerate(sample.labels) if label != -100)
    assert prompt.input_ids == sample.input_ids[:first]
    assert set(prompt.labels) == {-100}


def test_it_travels_to_workers_without_weights(clip: Encoder, tokenizer: PreTrainedTokenizerFast) -> None:
    processor = build(clip, tokenizer, TILERS[1])
    packed = pickle.dumps(processor)
    assert len(packed) < 30_000
    weights = sum(parameter.numel() * 4 for parameter in clip.parameters())
    assert weights > 60_000
    image = Image.effect_noise((90, 40), 60)
    again = pickle.loads(packed)  # noqa: S301
    check_same(processor, again, image)


def check_same(first: VLMProcessor, second: VLMProcessor, image: Image.Image) -> None:
    wanted, made = (each.sample(question("<image> w5"), [image]) for each in (first, second))
    assert made.input_ids == wanted.input_ids
    assert made.labels == wanted.labels
    assert made.plans == wanted.plans
    assert made.pixel_values is not None
    assert torch.equal(made.pixel_values, wanted.pixel_values)
    assert first.collate([wanted])["input_ids"].equal(second.collate([made])["input_ids"])


def test_it_loads_as_it_was_saved(
    tmp_path: Path, clip: Encoder, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    connector = build_connector("mlp", clip.token_spec, 32)
    processor = VLMProcessor(clip, connector, tokenizer, tiler=TILERS[1], max_length=333)
    layout = processor.layout
    model = VisionLanguageModel(clip, connector, llama, image_token_id=processor.image_token_id, layout=layout)
    processor.save_pretrained(tmp_path / "run")
    loaded = VLMProcessor.from_pretrained(tmp_path / "run", model)
    assert loaded.max_length == 333
    assert loaded.tiler == processor.tiler
    assert loaded.image_token_id == processor.image_token_id
    assert len(loaded.tokenizer) == len(tokenizer)
    check_same(processor, loaded, Image.effect_noise((90, 40), 60))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["processor"]
    with pytest.raises(VlmError, match="holds no processor"):
        VLMProcessor.from_pretrained(tmp_path, model)
    (tmp_path / "run/processor/processor.json").write_text("{}")
    with pytest.raises(VlmError, match="holds no processor that can be read"):
        VLMProcessor.from_pretrained(tmp_path / "run", model)


def test_the_image_token_is_added_once(clip: Encoder, tokenizer: PreTrainedTokenizerFast) -> None:
    size = len(tokenizer)
    first = build(clip, tokenizer)
    second = build(clip, tokenizer)
    assert first.image_token_id == second.image_token_id == size
    assert len(tokenizer) == size + 1
    assert tokenizer("<image>w1 w2<image>", add_special_tokens=False)["input_ids"].count(size) == 2


def test_a_sample_longer_than_the_context_is_refused_with_its_numbers(
    clip: Encoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    image = Image.new("RGB", (30, 30))
    length = len(build(clip, tokenizer).sample(question("<image> <image>"), [image, image]).input_ids)
    fits = build(clip, tokenizer, max_length=length)
    assert len(fits.sample(question("<image> <image>"), [image, image]).input_ids) == length
    short = build(clip, tokenizer, max_length=length - 1)
    sentence = rf"{length} tokens long \(32 of 2 images\), the context takes {length - 1}; "
    with pytest.raises(VlmError, match=sentence):
        short.sample(question("<image> <image>"), [image, image])


def test_placeholders_and_images_must_agree(clip: Encoder, tokenizer: PreTrainedTokenizerFast) -> None:
    processor = build(clip, tokenizer)
    with pytest.raises(VlmError, match="the text holds 1 image placeholder, 0 images came"):
        processor.sample(question("<image> w1"))
    with pytest.raises(VlmError, match="the text holds 0 image placeholders, 1 image came"):
        processor.prompt(question("w1")[:1], [Image.new("RGB", (9, 9))])


def test_tiles_of_another_size_than_the_encoders_are_refused(clip: Encoder, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(VlmError, match="tiles of 56 px"):
        build(clip, tokenizer, AnyResTiler(tile_size=56))


@pytest.mark.parametrize(("pad", "eos", "filling"), [("<pad>", "</s>", 0), (None, "</s>", 2), (None, None, 0)])
def test_padding_falls_back_to_the_end_of_text(
    pad: str | None, eos: str | None, filling: int, clip: Encoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    processor = build(clip, tokenizer)
    samples = [processor.sample(question("w1 w2 w3 w4")), processor.sample(question("w1"))]
    tokenizer.pad_token, tokenizer.eos_token = pad, eos
    for side in ("right", "left"):
        batch = processor.collate(samples, padding_side=side)  # type: ignore[arg-type]
        padded = batch["attention_mask"] == 0
        assert padded.sum(1).tolist() == [0, 3]
        assert padded[1, -3:].all() if side == "right" else padded[1, :3].all()
        assert set(batch["input_ids"][padded].tolist()) == {filling}
        assert set(batch["labels"][padded].tolist()) == {-100}
        assert batch["input_ids"][1][~padded[1]].tolist() == samples[1].input_ids
        assert batch["pixel_values"] is None
        assert batch["plans"] == []
