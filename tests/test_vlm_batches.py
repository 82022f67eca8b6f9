"""Batches of every kind: each sample's logits are those that it has alone."""

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from connectors import build_connector
from connectors.errors import TokenShapeError, VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.testing import tiny_llm
from vlm_encoders.tiling import AnyResTiler, Tiler
from vlm_encoders.vlm.answer import answer
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import Sample, VLMProcessor

GRIDS = ((1, 2), (2, 1), (2, 2))


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def turns(question: str, reply: str = "w7 w8 w9") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def build(
    encoder: Encoder, llm: Any, tokenizer: PreTrainedTokenizerFast, tiler: Tiler | None
) -> tuple[VisionLanguageModel, VLMProcessor]:
    torch.manual_seed(6)
    connector = build_connector("pixel_shuffle:factor=2+mlp", encoder.token_spec, 32)
    processor = VLMProcessor(encoder, connector, tokenizer, tiler=tiler)
    image_token_id = processor.image_token_id
    model = VisionLanguageModel(encoder, connector, llm, image_token_id=image_token_id, layout=processor.layout)
    return model.eval(), processor


@pytest.fixture(params=["whole", "anyres"])
def built(
    request: pytest.FixtureRequest, clip: Encoder, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> tuple[VisionLanguageModel, VLMProcessor]:
    tiler = AnyResTiler(tile_size=28, grids=GRIDS) if request.param == "anyres" else None
    return build(clip, llama, tokenizer, tiler)


def mixed(processor: VLMProcessor) -> list[Sample]:
    """Text alone, one image, several of other shapes, and an image at either end."""
    return [
        processor.sample(turns("w1 w2 w3")),
        processor.sample(turns("<image> w1 w2"), [picture(50, 40, 0)]),
        processor.sample(
            turns("w4 <image> w5 <image> <image> w6", "w1"),
            [picture(100, 20, 1), picture(28, 28, 2), picture(21, 70, 3)],
        ),
        processor.sample(
            [*turns("<image>", "w2 w3"), *turns("w1 <image>", "w4")], [picture(60, 60, 4), picture(30, 64, 5)]
        ),
    ]


@pytest.mark.parametrize("side", ["right", "left"])
def test_each_sample_of_a_mixed_batch_has_the_logits_that_it_has_alone(
    built: tuple[VisionLanguageModel, VLMProcessor], side: Any
) -> None:
    model, processor = built
    samples = mixed(processor)
    batch = processor.collate(samples, padding_side=side)
    labels = batch.pop("labels")
    with torch.no_grad():
        together = model(**batch).logits
        supervised = model(**batch, labels=labels)
    losses, count = 0.0, 0
    for row, sample in enumerate(samples):
        alone = processor.collate([sample])
        own = alone.pop("labels")
        with torch.no_grad():
            wanted = model(**alone).logits[0]
            single = model(**alone, labels=own)
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(together[row][real], wanted, rtol=0, atol=1e-5)
        assert single.loss is not None
        losses += float(single.loss) * single.num_supervised
        count += single.num_supervised
    assert supervised.num_supervised == count
    assert supervised.loss is not None
    assert float(supervised.loss) == pytest.approx(losses / count, abs=1e-5)


def test_leaving_out_the_mask_of_right_padding_changes_no_supervised_logit(
    built: tuple[VisionLanguageModel, VLMProcessor],
) -> None:
    model, processor = built
    batch = processor.collate(mixed(processor))
    seen: list[bool] = []
    model.llm.register_forward_pre_hook(
        lambda *call: seen.append(call[2].get("attention_mask") is not None), with_kwargs=True
    )
    with torch.no_grad():
        output = model(**batch)
        embeds = model._embed(batch["input_ids"], batch["pixel_values"], batch["plans"])
        forced = model.llm(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    assert seen == [False, True]
    predicts = batch["labels"][:, 1:] != -100
    torch.testing.assert_close(output.logits, forced[:, :-1][predicts], rtol=0, atol=1e-6)


def test_answers_of_a_batch_are_those_of_each_prompt_alone(built: tuple[VisionLanguageModel, VLMProcessor]) -> None:
    model, processor = built
    prompts = [
        processor.prompt([{"role": "user", "content": "w1"}]),
        processor.prompt([{"role": "user", "content": "<image> w2 w3"}], [picture(80, 30, 6)]),
        processor.prompt([{"role": "user", "content": "<image> <image>"}], [picture(9, 9, 7), picture(30, 90, 8)]),
    ]
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        together = answer(model, processor, prompts, max_new_tokens=5, **options)
        assert together == [answer(model, processor, [one], max_new_tokens=5, **options)[0] for one in prompts]


def test_sampling_repeats_with_its_seed(built: tuple[VisionLanguageModel, VLMProcessor]) -> None:
    model, processor = built
    batch = processor.collate(
        [processor.prompt([{"role": "user", "content": "<image>"}], [picture(40, 40, 9)])], padding_side="left"
    )
    del batch["labels"]

    def drawn(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        ids: Tensor = model.generate(**batch, max_new_tokens=12, do_sample=True, num_return_sequences=3)
        result: list[list[int]] = ids.tolist()
        return result

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_every_view_is_encoded_once_for_beams_and_samples(built: tuple[VisionLanguageModel, VLMProcessor]) -> None:
    model, processor = built
    prompt = processor.prompt(
        [{"role": "user", "content": "<image> <image>"}], [picture(90, 20, 1), picture(28, 28, 2)]
    )
    batch = processor.collate([prompt], padding_side="left")
    del batch["labels"]
    seen: list[int] = []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    model.generate(**batch, max_new_tokens=5, num_beams=4, num_return_sequences=2)
    model.generate(**batch, max_new_tokens=5, do_sample=True, num_return_sequences=3)
    assert seen == [len(batch["pixel_values"])] * 2


def test_without_plans_each_view_is_an_image_of_the_same_layout(
    built: tuple[VisionLanguageModel, VLMProcessor],
) -> None:
    model, processor = built
    pixels = torch.randn(2, 3, 28, 28)
    images = model.embed_images(pixels)
    count = 4 + model.layout.newline
    assert [tuple(image.shape) for image in images] == [(count, 32)] * 2
    ids = torch.full((2, count + 3), 5)
    ids[:, 1 : 1 + count] = processor.image_token_id
    assert model(ids, pixel_values=pixels).logits.shape == (2, count + 3, 64)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_parts_of_different_dtypes_work_together(
    family: str, clip: Encoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, processor = build(clip, tiny_llm(family), tokenizer, AnyResTiler(tile_size=28, grids=GRIDS))
    model.encoder.to(torch.bfloat16)
    model.llm.to(torch.bfloat16)
    output = model(**processor.collate(mixed(processor)))
    assert output.logits.dtype == torch.bfloat16
    assert output.loss is not None
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.connector.parameters())
    assert model.newline is not None
    assert model.newline.grad is not None


def test_bad_batches_get_a_sentence(built: tuple[VisionLanguageModel, VLMProcessor]) -> None:
    model, processor = built
    batch = processor.collate(mixed(processor))
    without = {**batch, "pixel_values": None, "plans": []}
    with pytest.raises(VlmError, match=r"image placeholders, the images gave 0 tokens"):
        model(**without)
    text = processor.collate([processor.sample(turns("w1"))])
    with pytest.raises(VlmError, match=r"holds 0 image placeholders, the images gave \d+ tokens"):
        model(**{**text, "pixel_values": batch["pixel_values"], "plans": batch["plans"]})
    with pytest.raises(TokenShapeError, match=r"plans have \d+ views, got tokens of 1"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:1]})
    with pytest.raises(VlmError, match="no supervised token"):
        model(**{**batch, "labels": torch.full_like(batch["labels"], -100)})
    with pytest.raises(VlmError, match=r"labels are \(B, T\)"):
        model(**{**batch, "labels": batch["labels"][:, 1:]})
    del batch["labels"]
    with pytest.raises(VlmError, match="3 of 4 prompts end in padding"):
        model.generate(**batch, max_new_tokens=2)


def test_a_connector_that_does_not_fit_is_refused_when_the_model_is_built(
    clip: Encoder, llama: LlamaForCausalLM
) -> None:
    connector = build_connector("mlp", clip.token_spec, 48)
    with pytest.raises(TokenShapeError, match="the connector ends at width 48, the LLM takes 32"):
        VisionLanguageModel(clip, connector, llama, image_token_id=60)
    queries = build_connector("perceiver:queries=4", clip.token_spec, 32)
    with pytest.raises(TokenShapeError, match="4 queries without a grid"):
        VisionLanguageModel(clip, queries, llama, image_token_id=60, layout=AnyResTiler(tile_size=28).layout)
