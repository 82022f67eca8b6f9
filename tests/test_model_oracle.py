"""The whole model against LlavaForConditionalGeneration that holds the same weights."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from connectors import MLP
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.transformers_backend import TransformersEncoder
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.vlm.model import VisionLanguageModel

IMAGE = 60
TOKENS = 16


@pytest.fixture
def pair(clip_spec: EncoderSpec, llama: LlamaForCausalLM) -> tuple[LlavaForConditionalGeneration, VisionLanguageModel]:
    """LLaVA of transformers with random weights, and ours filled from it."""
    torch.manual_seed(2)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        hidden_act="quick_gelu",
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=llama.config,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_seq_length=TOKENS,
    )
    reference = LlavaForConditionalGeneration(config).eval()
    tower = CLIPVisionModel(vision)
    tower.load_state_dict(reference.model.vision_tower.state_dict())
    encoder = TransformersEncoder.build(clip_spec, pretrained=False, dtype=torch.float32)
    missing, unexpected = encoder.network.load_state_dict(tower.state_dict(), strict=False)
    assert not missing
    assert all("encoder.layers.3." in key or "post_layernorm" in key for key in unexpected)
    connector = MLP(32, 32)
    projector = reference.model.multi_modal_projector
    linears = [module for module in connector.modules() if isinstance(module, torch.nn.Linear)]
    linears[0].load_state_dict(projector.linear_1.state_dict())
    linears[1].load_state_dict(projector.linear_2.state_dict())
    llama.model.load_state_dict(reference.model.language_model.state_dict())
    llama.lm_head.load_state_dict(reference.lm_head.state_dict())
    return reference, VisionLanguageModel(encoder, connector, llama, image_token_id=IMAGE).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two samples of one image each, the second padded on the right."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 59, (2, 30), generator=generator)
    ids[0, 2 : 2 + TOKENS] = IMAGE
    ids[1, 5 : 5 + TOKENS] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    ids[1, 25:] = 0
    labels = torch.full_like(ids, -100)
    labels[0, 22:30] = ids[0, 22:30]
    labels[1, 23:25] = ids[1, 23:25]
    pixels = torch.randn(2, 3, 28, 28, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def test_logits_equal(
    pair: tuple[LlavaForConditionalGeneration, VisionLanguageModel], batch: dict[str, torch.Tensor]
) -> None:
    reference, ours = pair
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        expected = reference(**inputs).logits
        logits = ours(**inputs).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5)


def test_loss_and_projector_gradients_equal(
    pair: tuple[LlavaForConditionalGeneration, VisionLanguageModel], batch: dict[str, torch.Tensor]
) -> None:
    reference, ours = pair
    expected = reference(**batch).loss
    output = ours(**batch)
    assert output.num_supervised == 10
    assert output.logits.shape == (10, 64)
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-6)
    expected.backward()
    output.loss.backward()
    wanted = reference.model.multi_modal_projector.linear_1.weight.grad
    ours_grad = next(parameter.grad for name, parameter in ours.connector.named_parameters() if "weight" in name)
    torch.testing.assert_close(ours_grad, wanted, rtol=1e-5, atol=1e-7)


def test_greedy_and_beam_generate_the_same_ids(
    pair: tuple[LlavaForConditionalGeneration, VisionLanguageModel], batch: dict[str, torch.Tensor]
) -> None:
    reference, ours = pair
    inputs = {"input_ids": batch["input_ids"][:1], "pixel_values": batch["pixel_values"][:1]}
    for options in ({}, {"num_beams": 3}):
        expected = reference.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
        ids = ours.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
        assert ids.tolist() == expected[:, inputs["input_ids"].shape[1] :].tolist()


def test_an_image_is_encoded_once_whatever_the_beams(
    pair: tuple[LlavaForConditionalGeneration, VisionLanguageModel], batch: dict[str, torch.Tensor]
) -> None:
    _, ours = pair
    seen: list[int] = []
    encoder: Encoder = ours.encoder
    encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    ours.generate(batch["input_ids"][:1], pixel_values=batch["pixel_values"][:1], max_new_tokens=5, num_beams=4)
    assert seen == [1]
