"""Every tiler the whole way: image, views, tokens, prompt, logits; mixed batches, budgets and chunks."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import DINOv3ViTConfig, DINOv3ViTModel, LlamaForCausalLM, PreTrainedTokenizerFast

from connectors import build_connector
from connectors.errors import TokenShapeError, VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.fused import FusedEncoder
from vlm_encoders.registry import create_encoder
from vlm_encoders.testing import tiny_llm
from vlm_encoders.tiling import PRESETS, Tiler, build_tiler, scales
from vlm_encoders.training import ConversationDataset, TrainConfig, Trainer
from vlm_encoders.vlm.answer import answer
from vlm_encoders.vlm.build import build_model
from vlm_encoders.vlm.encode import encode_images
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import Sample, VLMProcessor
from vlm_encoders.vlm.stages import STAGE_1, apply_stage

SIZES = [(28, 28), (1, 1), (90, 30), (30, 110), (57, 91), (64, 48)]
PATCH = 7


def picture(height: int, width: int, seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def turns(question: str, reply: str = "w7 w8") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native encoder of two blocks of 32: patches of 7 px, CLS and two registers."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("dino")
    config = DINOv3ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=PATCH,
        num_register_tokens=2,
    )
    DINOv3ViTModel(config).save_pretrained(folder)
    return folder


def small(name: str, **options: Any) -> Tiler:
    """Make a tiler whose images cost few tokens, without markers: the tokenizer of the tests has none."""
    known = PRESETS[name].tiler.__dataclass_fields__
    sizes = {
        "max_pixels": 12 * 4 * PATCH**2,
        "min_pixels": 4 * PATCH**2,
        "max_tiles": 6,
        "max_patches": 48,
        "slice_size": 28,
    }
    scales = {"scales": (1, 2)} if name == "dynamic-s2" else {}
    wanted = {"markers": False, "patch": PATCH, "merge": 1} | sizes | scales | options
    return build_tiler(name, 28, **{key: value for key, value in wanted.items() if key in known})


def assemble(
    encoder: Encoder, llm: Any, tokenizer: PreTrainedTokenizerFast, tiler: Tiler, recipe: str = "mlp", **options: Any
) -> tuple[VisionLanguageModel, VLMProcessor]:
    connector = build_connector(recipe, tiler.layout.connector_spec(encoder.token_spec), 32)
    processor = VLMProcessor(encoder, connector, tokenizer, tiler=tiler)
    model = VisionLanguageModel(
        encoder, connector, llm, image_token_id=processor.image_token_id, layout=processor.layout, **options
    )
    return model.eval(), processor


@pytest.fixture(params=list(PRESETS))
def built(
    request: pytest.FixtureRequest,
    clip: Encoder,
    dino_folder: Path,
    llama: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[VisionLanguageModel, VLMProcessor]:
    tiler = small(request.param)
    encoder = create_encoder(f"hf:{dino_folder}").eval() if tiler.native else clip
    return assemble(encoder, llama, tokenizer, tiler)


def mixed(processor: VLMProcessor) -> list[Sample]:
    """Text alone, one image, several of other shapes and sizes."""
    return [
        processor.sample(turns("w1 w2 w3")),
        processor.sample(turns("<image> w1 w2"), [picture(40, 50, 0)]),
        processor.sample(turns("w4 <image> w5 <image> w6"), [picture(20, 100, 1), picture(28, 28, 2)]),
        processor.sample(turns("w4 <image>", "w1"), [picture(90, 30, 3)]),
    ]


def test_counts_are_those_of_the_model(built: tuple[VisionLanguageModel, VLMProcessor]) -> None:
    model, processor = built
    for size in SIZES:
        sample = processor.sample(turns("w5 <image> w6"), [picture(*size, 4)])
        assert sample.pixel_values is not None
        with torch.no_grad():
            (embedded,) = model.embed_images(sample.pixel_values, sample.plans)
        assert sample.input_ids.count(processor.image_token_id) == len(embedded)
        assert processor.num_image_tokens(size) == len(embedded)


def test_each_sample_of_a_mixed_batch_has_the_logits_that_it_has_alone(
    built: tuple[VisionLanguageModel, VLMProcessor],
) -> None:
    model, processor = built
    samples = mixed(processor)
    batch = processor.collate(samples)
    del batch["labels"]
    with torch.no_grad():
        together = model(**batch).logits
    for row, sample in enumerate(samples):
        alone = processor.collate([sample])
        del alone["labels"]
        with torch.no_grad():
            wanted = model(**alone).logits[0]
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(together[row][real], wanted, rtol=0, atol=1e-5)


def test_chunks_change_nothing_but_memory(built: tuple[VisionLanguageModel, VLMProcessor]) -> None:
    model, processor = built
    batch = processor.collate(mixed(processor))
    with torch.no_grad():
        whole = model.embed_images(batch["pixel_values"], batch["plans"])
        for chunk in (1, 40, 10_000):
            model.chunk_tokens = chunk
            for one, other in zip(whole, model.embed_images(batch["pixel_values"], batch["plans"]), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_images_are_encoded_without_a_model(built: tuple[VisionLanguageModel, VLMProcessor]) -> None:
    model, processor = built
    images = [picture(*size, 8) for size in SIZES]
    batch = processor.collate([processor.sample(turns("<image>"), [image]) for image in images])
    tiler = processor.tiler
    with torch.no_grad():
        wanted = model.embed_images(batch["pixel_values"], batch["plans"])
    for chunk in (None, 1, 40):
        made = encode_images(model.encoder, images, tiler, connector=model.connector, chunk_tokens=chunk)
        for one, other in zip(wanted, made, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-6)
    bare = encode_images(model.encoder, images, tiler, chunk_tokens=60)
    # Without a connector there is no newline: one token less a row.
    width = model.encoder.token_spec.dim * max(1, processor.layout.scales)
    assert all(one.shape[1] == width and len(one) <= len(other) for one, other in zip(bare, wanted, strict=True))


def test_an_image_costs_no_more_than_its_budget(built: tuple[VisionLanguageModel, VLMProcessor]) -> None:
    model, processor = built
    for size in SIZES:
        free = processor.num_image_tokens(size)
        assert processor.num_image_tokens(size, max_tokens=free) == free
        tight = max(free - 1, 20)
        least = processor.num_image_tokens(size, max_tokens=tight)
        assert least <= tight
        sample = processor.prompt([{"role": "user", "content": "<image>"}], [picture(*size, 5)], max_tokens=tight)
        assert sample.pixel_values is not None
        with torch.no_grad():
            (embedded,) = model.embed_images(sample.pixel_values, sample.plans)
        assert sample.input_ids.count(processor.image_token_id) == len(embedded) == least


def test_budgets_are_one_for_all_or_one_each(
    clip: Encoder, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    _, processor = assemble(clip, llama, tokenizer, small("internvl"))
    wide = [picture(30, 90, 6), picture(30, 90, 7)]
    ask = [{"role": "user", "content": "<image> <image>"}]

    def views(**options: Any) -> list[int]:
        return [plan.num_views for plan in processor.prompt(ask, wide, **options).plans]

    assert views() == [4, 4]
    assert views(max_tokens=50) == [3, 3]
    assert views(max_tokens=[16, None]) == [1, 4]
    processor.max_image_tokens = 50
    assert views() == [3, 3]
    assert views(max_tokens=[16, None]) == [1, 3]
    with pytest.raises(VlmError, match="2 images have 1 budgets; give max_tokens once, or for each image"):
        processor.prompt(ask, wide, max_tokens=[16])
    for wrong in (1.5, "50", [2.5, 3], 0, [-4, None]):
        with pytest.raises(VlmError, match="a budget is a whole number of tokens from 1, or one for each image, got"):
            processor.prompt(ask, wide, max_tokens=wrong)
    with pytest.raises(VlmError, match=r"needs at least 16 tokens .* 15 are allowed; raise max_tokens"):
        processor.prompt(ask, wide, max_tokens=15)


def test_budgets_count_markers_as_the_tokenizer_writes_them(
    clip: Encoder, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.add_tokens(["<img>", "</img>"], special_tokens=True)
    _, processor = assemble(clip, llama, tokenizer, small("internvl", markers=True))
    ask, image = [{"role": "user", "content": "<image>"}], [picture(30, 90, 6)]
    # Three tiles and a thumbnail of 16 tokens, and two marks.
    for budget, views in ((66, 4), (65, 3), (50, 3), (49, 1), (18, 1)):
        (plan,) = processor.prompt(ask, image, max_tokens=budget).plans
        assert plan.num_views == views, budget
    with pytest.raises(VlmError, match="needs at least 18 tokens"):
        processor.prompt(ask, image, max_tokens=17)


@pytest.mark.parametrize("marked", [True, False])
def test_placeholders_and_images_that_do_not_agree_are_refused(
    clip: Encoder, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, marked: bool
) -> None:
    tokenizer.add_tokens(["<img>", "</img>"], special_tokens=True)
    _, processor = assemble(clip, llama, tokenizer, small("internvl", markers=marked))
    image = picture(30, 90, 6)
    # As many placeholders as the image has views would otherwise pass for one run each.
    for count, images in ((4, [image]), (1, [image, image]), (0, [image]), (1, [])):
        text = "w1 " + " ".join(["<image>"] * count)
        said = f"holds {count} image placeholder.* {len(images)} images? came; write one placeholder for each image"
        with pytest.raises(VlmError, match=said):
            processor.prompt([{"role": "user", "content": text}], images)


def test_a_connector_that_takes_no_odd_grid_is_refused_before_the_first_image(
    dino_folder: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    dino = create_encoder(f"hf:{dino_folder}").eval()
    with pytest.raises(VlmError, match=r"'qwen2-vl' gives views of any multiple of 7 px, .* give the tiler merge="):
        assemble(dino, llama, tokenizer, small("qwen2-vl"), recipe="patch_merger")
    assemble(dino, llama, tokenizer, small("qwen2-vl", merge=2), recipe="patch_merger")


@pytest.mark.parametrize("chunk", [0, -5, 2.5])
def test_a_chunk_is_a_number_of_tokens(
    clip: Encoder, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, chunk: Any
) -> None:
    with pytest.raises(VlmError, match="chunk_tokens is a whole number of tokens from 1, got"):
        assemble(clip, llama, tokenizer, small("internvl"), chunk_tokens=chunk)
    with pytest.raises(VlmError, match="chunk_tokens is a whole number of tokens from 1, got"):
        encode_images(clip, picture(9, 9, 0), small("internvl"), chunk_tokens=chunk)


@pytest.mark.parametrize("name", ["whole", "llava-next", "internvl", "s2", "dynamic-s2", "tiles"])
def test_joints_of_encoders_are_tiled_too(
    name: str, clip: Encoder, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    joint = FusedEncoder([clip, copy.deepcopy(clip)]).eval()
    model, processor = assemble(joint, llama, tokenizer, small(name))
    image = picture(30, 90, 6)
    sample = processor.prompt([{"role": "user", "content": "<image>"}], [image])
    assert sample.pixel_values is not None
    with torch.no_grad():
        (wanted,) = model.embed_images(sample.pixel_values, sample.plans)
    for chunk in (None, 20):
        (made,) = encode_images(joint, image, processor.tiler, connector=model.connector, chunk_tokens=chunk)
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-6)
    if name == "whole":
        assert torch.equal(model.embed_images(sample.pixel_values)[0], wanted)


def test_scales_are_joined_image_by_image(
    clip: Encoder, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = assemble(clip, llama, tokenizer, small("s2"), chunk_tokens=40)
    seen: list[int] = []
    join = scales.join_scales

    def watched(visual: Any, plans: Any, *rest: Any) -> Any:
        seen.append(len(visual.tokens))
        return join(visual, plans, *rest)

    monkeypatch.setattr(scales, "join_scales", watched)
    batch = processor.collate(mixed(processor))
    model.embed_images(batch["pixel_values"], batch["plans"])
    assert seen == [plan.num_views for plan in batch["plans"]]


@pytest.mark.parametrize("name", ["internvl:max_tiles=1", "idefics3:split=false", "s2:scales=1"])
def test_even_one_tile_has_the_size_of_a_view(name: str, clip: Encoder) -> None:
    with pytest.raises(VlmError, match=r"cuts tiles of 56 px, but clip-small sees 28x28 px; use tile_size=28"):
        build_tiler(name, 56).check(clip.spec)


def test_the_encoder_sees_no_more_than_a_chunk(
    clip: Encoder, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, dino_folder: Path
) -> None:
    seen: list[int] = []
    # 16 patch tokens and one CLS token a view: 40 tokens hold two.
    model, processor = assemble(clip, llama, tokenizer, small("internvl"), chunk_tokens=40)
    clip.register_forward_pre_hook(lambda _, call: seen.append(len(call[0])))
    batch = processor.collate(mixed(processor))
    model.embed_images(batch["pixel_values"], batch["plans"])
    assert max(seen) == 2
    assert sum(seen) == len(batch["pixel_values"])
    dino = create_encoder(f"hf:{dino_folder}").eval()
    native, processor = assemble(dino, llama, tokenizer, small("qwen2-vl"), chunk_tokens=40)
    packs: list[int] = []
    forward = dino.forward_packed

    def watched(views: list[torch.Tensor], kept: Any = None) -> Any:
        packed = forward(views, kept)
        packs.append(len(packed.tokens))
        return packed

    dino.forward_packed = watched  # type: ignore[method-assign]
    batch = processor.collate(mixed(processor))
    native.embed_images(batch["pixel_values"], batch["plans"])
    assert len(packs) > 1
    assert max(packs) <= 48, "one image may be larger than the chunk, a pack of several may not"


def test_a_batch_of_text_alone_has_no_views(built: tuple[VisionLanguageModel, VLMProcessor]) -> None:
    model, processor = built
    batch = processor.collate([processor.sample(turns("w1")), processor.sample(turns("w2 w3"))])
    assert batch["pixel_values"] is None
    assert torch.isfinite(model(**batch).loss)


def test_views_that_are_not_those_of_the_plans_are_refused(
    built: tuple[VisionLanguageModel, VLMProcessor],
) -> None:
    model, processor = built
    batch = processor.collate(mixed(processor))
    for plans in (batch["plans"][:-1], [*batch["plans"], batch["plans"][0]]):
        with pytest.raises(TokenShapeError, match=r"plans have \d+ views, got .* of \d+; pass the plans that"):
            model.embed_images(batch["pixel_values"], plans)


def test_no_view_is_no_image(built: tuple[VisionLanguageModel, VLMProcessor]) -> None:
    model, _ = built
    assert model.embed_images([]) == []
    assert model.embed_images(torch.empty(0, 3, 28, 28), []) == []
    with pytest.raises(VlmError, match="there is no image to encode; give one or more"):
        encode_images(model.encoder, [])


def test_generation_takes_images_of_many_sizes(built: tuple[VisionLanguageModel, VLMProcessor]) -> None:
    model, processor = built
    prompts = [
        processor.prompt([{"role": "user", "content": "w1"}]),
        processor.prompt([{"role": "user", "content": "<image> w2 w3"}], [picture(30, 80, 6)]),
    ]
    together = answer(model, processor, prompts, max_new_tokens=4, do_sample=False)
    assert together == [answer(model, processor, [one], max_new_tokens=4, do_sample=False)[0] for one in prompts]


def test_a_native_model_trains_and_loads(dino_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    records = []
    for index, (height, width) in enumerate(SIZES):
        picture(height, width, index).save(tmp_path / f"{index}.png")
        said = [{"from": "human", "value": "<image> w40"}, {"from": "gpt", "value": f"w{index}"}]
        records.append({"id": str(index), "image": f"{index}.png", "conversations": said})
    records.append({"id": "text", "conversations": [{"from": "human", "value": "w3"}, {"from": "gpt", "value": "w4"}]})
    (tmp_path / "data.json").write_text(json.dumps(records))
    tiny_llm().save_pretrained(tmp_path / "llm")  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path / "llm")
    model, processor = build_model(
        f"hf:{dino_folder}",
        "keep_prefix+mlp",
        tmp_path / "llm",
        tiler=small("qwen2-vl"),
        chunk_tokens=64,
        max_image_tokens=30,
    )
    apply_stage(model, STAGE_1)
    config = TrainConfig(
        data=str(tmp_path / "data.json"),
        image_folder=str(tmp_path),
        output=str(tmp_path / "out"),
        steps=3,
        batch_size=3,
        num_workers=1,
        cpu=True,
    )
    dataset = ConversationDataset(config.data, config.image_folder, processor)
    before = {name: value.clone() for name, value in model.connector.state_dict().items()}
    result = Trainer(model, processor, dataset, config).fit()
    assert all(map(torch.isfinite, map(torch.tensor, result.losses)))
    assert any(not torch.equal(value, before[name]) for name, value in model.connector.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    loaded = VisionLanguageModel.from_pretrained(tmp_path / "saved")
    again = VLMProcessor.from_pretrained(tmp_path / "saved", loaded)
    assert (again.tiler, again.max_image_tokens) == (processor.tiler, 30)
    batch = processor.collate(mixed(processor))
    other = again.collate(mixed(again))
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, loaded(**other).loss)


def test_the_processor_of_a_native_model_travels_without_weights(
    dino_folder: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    dino = create_encoder(f"hf:{dino_folder}").eval()
    _, processor = assemble(dino, llama, tokenizer, small("qwen2-vl"), recipe="perceiver:queries=4+mlp")
    data = pickle.dumps(processor)
    travelled = pickle.loads(data)  # noqa: S301
    assert travelled.num_image_tokens((64, 48)) == processor.num_image_tokens((64, 48)) == 4
    connector = travelled._prompts.counts._connector
    assert {each.device.type for each in connector.parameters()} == {"meta"}


def test_tilers_and_encoders_that_do_not_fit_are_refused(
    clip: Encoder, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(VlmError, match="gives views of many sizes, clip-small takes one; use a tiler of square tiles"):
        assemble(clip, llama, tokenizer, small("qwen2-vl"))
    with pytest.raises(VlmError, match="encodes views of one size, 28x28 px"):
        clip.forward_packed([torch.zeros(3, 28, 28)])


def test_markers_that_the_tokenizer_does_not_know_are_refused(
    clip: Encoder, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(
        VlmError,
        match=r"'internvl' marks images by '<img>', .* the unknown token; .*internvl:markers=false",
    ):
        assemble(clip, llama, tokenizer, small("internvl", markers=True))


def test_marks_that_would_become_many_tokens_or_none_are_refused(
    clip: Encoder, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    # A byte-level tokenizer has no unknown token: it would write a mark letter by letter.
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator(["w1 w2"], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bytewise = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w1")
    with pytest.raises(VlmError, match=r"'<img>', which the tokenizer writes as 5 tokens; .*'internvl:markers=false'"):
        assemble(clip, llama, bytewise, small("internvl", markers=True))
    with pytest.raises(VlmError, match=r"'\\n', which the tokenizer writes as 0 tokens"):
        assemble(clip, llama, tokenizer, small("dynamic-s2", markers=True))
    bytewise.add_tokens(["<img>", "</img>"], special_tokens=True)
    assemble(clip, llama, bytewise, small("internvl", markers=True))


def test_messages_name_the_tiler_that_was_asked_for(
    clip: Encoder, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    _, processor = assemble(clip, llama, tokenizer, small("llava-next"))
    with pytest.raises(VlmError, match="'llava-next' needs at least 17 tokens"):
        processor.num_image_tokens((30, 90), max_tokens=3)
    assert small("llava-next") == small("anyres")


def test_markers_stand_in_the_prompt_and_are_not_learned(
    clip: Encoder, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    # A tokenizer that knows the markers, written apart as this one reads words.
    tokenizer.add_tokens(["<img>", "</img>"], special_tokens=True)
    _, processor = assemble(clip, llama, tokenizer, small("internvl", markers=True))
    sample = processor.sample(turns("w1 <image> w2", "w3"), [picture(30, 90, 6)])
    ids = sample.input_ids
    start, end = (tokenizer.convert_tokens_to_ids(mark) for mark in ("<img>", "</img>"))
    first, last = ids.index(start), ids.index(end)
    assert ids[first + 1 : last] == [processor.image_token_id] * processor.num_image_tokens((30, 90))
    assert ids.count(processor.image_token_id) == last - first - 1
    assert all(label == -100 for label in sample.labels[: last + 1])
    answers = [label for label in sample.labels if label != -100]
    assert tokenizer.convert_ids_to_tokens(answers)[0] == "w3"
