"""One global block of SAM-B at 1024 px: transformers' own, which makes the whole position bias, against ours by rows.

python benchmarks/sam_attention.py [--device cuda] [--dtype bfloat16] [--part attention] [--train] [--rounds 7]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from paired import added_memory, describe_machine, measure, memory_in_fresh_process, table
from torch import Tensor, nn
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionLayer

from vlm_encoders.encoders.sam_attention import attend_by_rows

TODAY, OURS = "transformers, sdpa", "vlm-encoders"


def build(dtype: torch.dtype, device: str) -> dict[str, SamVisionLayer]:
    """Make the block twice with the same random weights; the tables, zero at first, are random too."""
    torch.manual_seed(0)
    config = SamVisionConfig()
    config._attn_implementation = "sdpa"  # noqa: SLF001
    today = SamVisionLayer(config, 0).eval()
    nn.init.normal_(today.attn.rel_pos_h, std=0.02)
    nn.init.normal_(today.attn.rel_pos_w, std=0.02)
    ours = copy.deepcopy(today)
    attend_by_rows([ours])
    return {TODAY: today.to(device, dtype), OURS: ours.to(device, dtype)}


def work_of(block: SamVisionLayer, part: str, hidden: Tensor, *, train: bool) -> Callable[[], Tensor]:
    """Give one call of the block, or of its attention alone, with its backward pass if asked for."""
    module = block if part == "block" else block.attn

    def work() -> Tensor:
        with torch.set_grad_enabled(train):
            given = module(hidden)
            result: Tensor = given if part == "block" else given[0]
            if train:
                result.float().square().mean().backward()
                module.zero_grad(set_to_none=True)
        return result.detach()

    return work


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--part", choices=("block", "attention"), default="block")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", default=None)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(1, 64, 64, 768, generator=torch.Generator().manual_seed(1)).to(options.device, dtype)
    blocks = build(dtype, options.device)
    variants = {name: work_of(block, options.part, hidden, train=options.train) for name, block in blocks.items()}
    if options.memory_of:
        print(added_memory(variants[options.memory_of], options.device))
        return
    apart = (variants[TODAY]() - variants[OURS]()).abs().max()
    seconds = measure(variants, options.rounds, options.device)
    memory = {name: memory_in_fresh_process(name) for name in variants}
    extra = {name: f"{size / 2**20:.0f} MiB ({size / memory[TODAY]:.2f})" for name, size in memory.items()}
    what = f"{options.part}{', forward and backward' if options.train else ''}"
    print(f"SAM-B's global {what}, 64x64 tokens, {options.dtype}, batch 1; apart by {apart:.1e}")
    print(describe_machine(options.device))
    print(table(seconds, TODAY, extra))


if __name__ == "__main__":
    main()
