"""Tiles reach the encoder whole, and every connector can follow a tiler."""

import dataclasses

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from connectors.recipe import build_connector
from vlm_encoders.budget import token_budget
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.transformers_backend import TransformersEncoder
from vlm_encoders.registry import encoder_spec
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.testing import tiny_llm
from vlm_encoders.tiling import AnyResTiler
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import VLMProcessor

QUESTION = [{"role": "user", "content": "<image> w1"}, {"role": "assistant", "content": "w2"}]


@pytest.fixture
def cropping(clip_spec: EncoderSpec) -> Encoder:
    """A small encoder that resizes to 32 px and keeps the middle 28, as DINOv2 keeps 224 of 256."""
    spec = dataclasses.replace(clip_spec, crop_pct=28 / 32)
    return TransformersEncoder.build(spec, pretrained=False, dtype=torch.float32).eval()


def test_tiles_keep_their_border(cropping: Encoder, tokenizer: PreTrainedTokenizerFast) -> None:
    picture = Image.new("RGB", (56, 56), "white")
    picture.paste("black", (2, 2, 54, 54))
    processor = VLMProcessor(
        cropping, build_connector("mlp", cropping.token_spec, 32), tokenizer, tiler=AnyResTiler(28)
    )
    pixels = processor.sample(QUESTION, [picture]).pixel_values
    assert pixels is not None
    mean, std = (torch.tensor(values)[:, None, None] for values in (cropping.spec.mean, cropping.spec.std))
    _, top_left, *_, bottom_right = pixels * std + mean
    assert top_left[:, :2].min() > 0.99
    assert bottom_right[:, -2:].min() > 0.99
    assert top_left[:, 2:, 2:].max() < 0.01


@pytest.mark.parametrize(
    "recipe",
    ["qformer:queries=5,dim=32,layers=2,heads=4,ffn=48+linear", "perceiver:queries=5,heads=4,head_dim=8,kv_heads=2"],
)
def test_resamplers_put_tile_after_tile(recipe: str, clip: Encoder, tokenizer: PreTrainedTokenizerFast) -> None:
    connector = build_connector(recipe, clip.token_spec, 32)
    processor = VLMProcessor(clip, connector, tokenizer, tiler=AnyResTiler(28))
    assert processor.layout == TileLayout(unpad=False, newline=False)
    model = VisionLanguageModel(
        clip, connector, tiny_llm(), image_token_id=processor.image_token_id, layout=processor.layout
    )
    sample = processor.sample(QUESTION, [Image.new("RGB", (70, 30))])
    assert processor.num_image_tokens((30, 70)) == 5 * sample.plans[0].num_views
    assert torch.isfinite(model(**processor.collate([sample])).loss)


def test_budgets_of_resamplers_on_tiles_are_the_processor_s() -> None:
    row = token_budget("clip-vit-l-14-336", "qformer:queries=32+linear", tiler="anyres", image_size=(480, 640))
    assert (row.views, row.total) == (5, 160)
    assert encoder_spec("clip-vit-l-14-336").token_spec().num_tokens == row.encoder_tokens
