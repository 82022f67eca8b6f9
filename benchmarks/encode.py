"""Encode against the tower of LLaVA's `clip_encoder.py`: all blocks run, all hidden states kept, one used.

python benchmarks/encode.py [--device cuda] [--dtype bfloat16] [--batch 4] [--layer -2] [--rounds 5]
"""

from __future__ import annotations

import argparse

import torch
from paired import added_memory, describe_machine, measure, memory_in_fresh_process, table
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlm_encoders import Encoder, create_encoder

TODAY, OURS = "LLaVA-style tower", "vlm-encoders"


def build(layer: int, dtype: torch.dtype, device: str) -> tuple[CLIPVisionModel, Encoder]:
    """Make both towers of CLIP ViT-L/14 at 336 px, with the same random weights."""
    torch.manual_seed(0)
    encoder = create_encoder("clip-vit-l-14-336", pretrained=False, feature_layer=layer)
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    tower = CLIPVisionModel(config)
    # The blocks behind the feature layer keep their own random weights: they change no token that is used.
    left = tower.load_state_dict(encoder.network.state_dict(), strict=False)
    if left.unexpected_keys:
        raise SystemExit(f"the towers differ: {left.unexpected_keys[:3]}")
    return tower.to(device, dtype).eval(), encoder.to(device, dtype).eval()


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layer", type=int, default=-2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", default=None)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    tower, encoder = build(options.layer, dtype, options.device)
    pixels = torch.randn(options.batch, 3, 336, 336, generator=torch.Generator().manual_seed(1))
    pixels = pixels.to(options.device, dtype)

    @torch.no_grad()
    def today() -> Tensor:
        tokens: Tensor = tower(pixels, output_hidden_states=True).hidden_states[options.layer][:, 1:]
        return tokens

    @torch.no_grad()
    def ours() -> Tensor:
        tokens: Tensor = encoder(pixels).tokens
        return tokens

    variants = {TODAY: today, OURS: ours}
    if options.memory_of:
        print(added_memory(variants[options.memory_of], options.device))
        return
    equal = "bit-equal" if torch.equal(today(), ours()) else f"apart by {(today() - ours()).abs().max():.1e}"
    seconds = measure(variants, options.rounds, options.device)
    memory = {name: memory_in_fresh_process(name) for name in variants}
    extra = {name: f"{size / 2**20:.0f} MiB ({size / memory[TODAY]:.2f})" for name, size in memory.items()}
    print(f"CLIP ViT-L/14 at 336 px, layer {options.layer}, {options.dtype}, batch {options.batch}; tokens {equal}")
    print(describe_machine(options.device))
    print(table(seconds, TODAY, extra))


if __name__ == "__main__":
    main()
