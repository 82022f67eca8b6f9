"""What `train_step.py` measures: two models of the same weights, and one batch as each of them takes it."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from connectors import MLP, VisualTokens
from vlm_encoders import (
    STAGE_1,
    VisionLanguageModel,
    apply_stage,
    create_encoder,
    encoder_spec,
    list_encoders,
    register_encoder,
)

IMAGE, IMAGE_TOKENS = 31_999, 576
BEFORE, QUESTION, ANSWER = 5, 15, 20


@dataclass(frozen=True)
class Shape:
    """The size of encoder and LLM; the defaults are cut to what a CPU core does in seconds."""

    hidden: int = 1024
    layers: int = 4
    heads: int = 16
    key_heads: int = 16
    inner: int = 2816
    vocabulary: int = 32_000
    vision_layers: int = 3


# Those of Qwen2.5-0.5B and of Vicuna-7B, with all of CLIP ViT-L.
SHAPES = {
    "cut": Shape(),
    "0.5b": Shape(896, 24, 14, 2, 4864, 151_936, 24),
    "7b": Shape(4096, 32, 32, 32, 11_008, 32_000, 24),
}


def build(shape: Shape, device: str, dtype: torch.dtype) -> tuple[LlavaForConditionalGeneration, VisionLanguageModel]:
    """Make both models, with the same random weights: CLIP ViT-L/14 at 336 px, MLP, Llama; the projector trains."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2)
    if not list_encoders("clip-cut"):
        register_encoder(replace(encoder_spec("clip-vit-l-14-336"), name="clip-cut", num_layers=shape.vision_layers))
    with torch.device(device):
        today = LlavaForConditionalGeneration(config).to(dtype)
        llm = LlamaForCausalLM(text).to(dtype)
        connector = MLP(1024, shape.hidden).to(dtype)
    encoder = create_encoder("clip-cut", pretrained=False).to(device, dtype)
    tower = today.model.vision_tower.state_dict()
    # What is frozen is held once.
    encoder.network.load_state_dict({name: tower[name] for name in encoder.network.state_dict()}, assign=True)
    llm.model.load_state_dict(today.model.language_model.state_dict(), assign=True)
    llm.lm_head.load_state_dict(today.lm_head.state_dict(), assign=True)
    linears = [module for module in connector.modules() if isinstance(module, torch.nn.Linear)]
    for mine, theirs in zip(linears, ("linear_1", "linear_2"), strict=True):
        mine.load_state_dict(getattr(today.model.multi_modal_projector, theirs).state_dict())
    ours = apply_stage(VisionLanguageModel(encoder, connector, llm, image_token_id=IMAGE), STAGE_1).train()
    today.requires_grad_(requires_grad=False)
    today.model.multi_modal_projector.requires_grad_(requires_grad=True)
    return today.train(), ours


def make_batch(options: argparse.Namespace, dtype: torch.dtype, samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make one image, a question and an answer a sample: as the peer takes them, padded, and as ours does.

    With `--packed` answers are of log-normal lengths, of 14 tokens in the median, and ours stand in one row.
    """
    draw = torch.Generator().manual_seed(1)
    answers = [ANSWER] * samples
    if options.packed:
        lengths = (np.log(14) + 0.6 * torch.randn(samples, generator=draw)).exp()
        answers = [int(length) for length in lengths.clamp(3, 200)]
    rows = []
    for answer in answers:
        ids = torch.randint(10, 31_000, (BEFORE + IMAGE_TOKENS + QUESTION + answer,), generator=draw)
        ids[BEFORE : BEFORE + IMAGE_TOKENS] = IMAGE
        labels = torch.full_like(ids, -100)
        labels[-answer:] = ids[-answer:]
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    padded: dict[str, Any] = {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill)
        for name, fill in fills.items()
    }
    padded["pixel_values"] = torch.randn(samples, 3, 336, 336, generator=draw).to(dtype)
    own = dict(padded)
    if options.packed:
        own |= {name: torch.cat([row[name] for row in rows])[None] for name in fills}
        own["lengths"] = [len(row["input_ids"]) for row in rows]
    return _on(options.device, padded), _on(options.device, own)


class Cache:
    """The encoder's tokens of a batch in a file, read anew at each step."""

    def __init__(self, ours: VisionLanguageModel, pixels: Tensor) -> None:
        with torch.no_grad():
            visual = ours.encoder(pixels)
        self.grid, self.dtype, self.device = visual.grid, visual.tokens.dtype, pixels.device
        self.file = tempfile.NamedTemporaryFile(suffix=".tokens")  # noqa: SIM115
        raw = visual.tokens.cpu().contiguous().view(torch.uint8).numpy()
        self.stored = np.memmap(self.file.name, np.uint8, "w+", shape=raw.shape)
        self.stored[:] = raw

    def read(self) -> VisualTokens:
        """Read the tokens of all images."""
        tokens = torch.from_numpy(np.array(self.stored)).view(self.dtype)
        return VisualTokens(tokens.to(self.device), self.grid)


def _on(device: str, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
