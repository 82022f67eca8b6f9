"""A Stage-1 step against `LlavaForConditionalGeneration(labels=)` with the same weights and batch.

python benchmarks/train_step.py [--device cuda] [--dtype float32] [--batch 4] [--hidden 1024] [--layers 4] [--rounds 7]

A step is forward, backward and AdamW; encoder and LLM are frozen, the projector trains.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from paired import added_memory, describe_machine, measure, memory_in_fresh_process, table
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from connectors import MLP
from vlm_encoders import (
    STAGE_1,
    VisionLanguageModel,
    apply_stage,
    create_encoder,
    encoder_spec,
    register_encoder,
)

TODAY, OURS = "LlavaForConditionalGeneration", "vlm-encoders"
IMAGE = 31_999
IMAGE_TOKENS, QUESTION, ANSWER = 576, 20, 20


def build(options: argparse.Namespace) -> tuple[LlavaForConditionalGeneration, VisionLanguageModel]:
    """Make both models with the same random weights: CLIP ViT-L/14 at 336 px cut to few blocks, MLP, Llama."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=options.vision_layers,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=32_000,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
    )
    today = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2)
    )
    register_encoder(replace(encoder_spec("clip-vit-l-14-336"), name="clip-cut", num_layers=options.vision_layers))
    encoder = create_encoder("clip-cut", pretrained=False)
    encoder.network.load_state_dict(_shared(today.model.vision_tower, encoder.network))
    connector, llm = MLP(1024, options.hidden), LlamaForCausalLM(text)
    linears = [module for module in connector.modules() if isinstance(module, torch.nn.Linear)]
    for mine, theirs in zip(linears, ("linear_1", "linear_2"), strict=True):
        mine.load_state_dict(getattr(today.model.multi_modal_projector, theirs).state_dict())
    llm.model.load_state_dict(today.model.language_model.state_dict())
    llm.lm_head.load_state_dict(today.lm_head.state_dict())
    dtype = getattr(torch, options.dtype)
    ours = VisionLanguageModel(encoder, connector, llm, image_token_id=IMAGE)
    ours = apply_stage(ours.to(options.device, dtype), STAGE_1).train()
    today.requires_grad_(requires_grad=False)
    today.model.multi_modal_projector.requires_grad_(requires_grad=True)
    return today.to(options.device, dtype).train(), ours


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vision-layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", default=None)
    options = parser.parse_args()
    today, ours = build(options)
    batch = make_batch(options)
    steps = {TODAY: step(today, batch), OURS: step(ours, batch)}
    if options.memory_of:
        print(added_memory(steps[options.memory_of], options.device))
        return
    losses = [model(**batch).loss.item() for model in (today, ours)]
    seconds = measure(steps, options.rounds, options.device)
    memory = {name: memory_in_fresh_process(name) for name in steps}
    extra = {name: f"{size / 2**20:.0f} MiB ({size / memory[TODAY]:.2f})" for name, size in memory.items()}
    print(
        f"Stage-1 step, {IMAGE_TOKENS} image tokens, 32,000 words, {options.layers} layers of {options.hidden}, "
        f"{options.dtype}, batch {options.batch}; first losses {losses[0]:.6f} and {losses[1]:.6f}"
    )
    print(describe_machine(options.device))
    print(table(seconds, TODAY, extra))


def make_batch(options: argparse.Namespace) -> dict[str, Tensor]:
    """Make one image, a question and an answer a sample."""
    generator = torch.Generator().manual_seed(1)
    length = IMAGE_TOKENS + QUESTION + ANSWER
    ids = torch.randint(10, 31_000, (options.batch, length), generator=generator)
    ids[:, 5 : 5 + IMAGE_TOKENS] = IMAGE
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    pixels = torch.randn(options.batch, 3, 336, 336, generator=generator).to(getattr(torch, options.dtype))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
    return {name: tensor.to(options.device) for name, tensor in batch.items()}


def step(model: torch.nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Give one optimizer step of what trains in a model."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-5)

    def take() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return take


def _shared(tower: torch.nn.Module, network: torch.nn.Module) -> dict[str, Tensor]:
    weights = tower.state_dict()
    return {name: weights[name] for name in network.state_dict()}


if __name__ == "__main__":
    main()
