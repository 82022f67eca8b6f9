"""A Stage-1 step against `LlavaForConditionalGeneration(labels=)` with the same weights and samples.

python benchmarks/train_step.py [--packed] [--cached] [--dtype float32] [--batch 4] [--rounds 7]
python benchmarks/train_step.py --device cuda --llm 7b --batch 8     # on a GPU

A step is forward, backward and AdamW; encoder and LLM are frozen, the projector trains. With `--packed` answers are of
mixed length: the peer pads them, ours stand in one row. With `--cached` ours reads the encoder's tokens from a file, in
the dtype of the run; the peer encodes, as it does today. The differences are those of one step in float32.

On a GPU, a token is one that the LLM reads, padding left out. Model FLOPs are those that the step needs, as
`torch.utils.flop_counter` counts them in ours, for both; the peak is the chip's dense one for the dtype, as its maker
states it (H200 in bfloat16: 989 TFLOP/s).
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from paired import added_memory, describe_machine, measure, memory_in_fresh_process, table
from stage_1 import IMAGE_TOKENS, SHAPES, Cache, build, make_batch
from torch.utils.flop_counter import FlopCounterMode

TODAY, OURS = "LlavaForConditionalGeneration", "vlm-encoders"


def main() -> None:
    """Measure and print a table."""
    options = _options()
    shape, dtype = SHAPES[options.llm], getattr(torch, options.dtype)
    check = "" if options.memory_of else difference(options)
    today, ours = build(shape, options.device, dtype)
    theirs, own = make_batch(options, dtype, options.batch)
    steps = {TODAY: step(today, lambda: theirs), OURS: step(ours, reader(options, ours, own))}
    if options.memory_of:
        print(added_memory(steps[options.memory_of], options.device))
        return
    seconds = measure(steps, options.rounds, options.device)
    # What is freed is given back at once: else memory that building has left free, and gaps, would count or hide.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    memory = {name: memory_in_fresh_process(name) for name in steps}
    extra = {name: f"{size / 2**20:.0f} MiB ({size / memory[TODAY]:.2f})" for name, size in memory.items()}
    tokens = int(theirs["attention_mask"].sum())
    modes = "".join(f", {mode}" for mode in ("packed", "cached") if getattr(options, mode))
    print(
        f"Stage-1 step{modes}, {IMAGE_TOKENS} image tokens, {shape.vocabulary} words, {shape.layers} layers of "
        f"{shape.hidden}, {options.dtype}, batch {options.batch} of {tokens} tokens, "
        f"{tokens / theirs['attention_mask'].numel():.2f} of what is padded; {check}"
    )
    print(describe_machine(options.device))
    print(table(seconds, TODAY, extra))
    if options.device != "cpu":
        print(rates(seconds, tokens, flops(steps[OURS]), options.peak_tflops))


def difference(options: argparse.Namespace) -> str:
    """Say how far loss and projector gradients are apart in float32, gradients by the largest of them."""
    samples = options.batch if options.llm == "cut" else min(options.batch, 2)
    today, ours = build(SHAPES[options.llm], options.device, torch.float32)
    theirs, own = make_batch(options, torch.float32, samples)
    losses = [today(**theirs).loss, ours(**reader(options, ours, own)()).loss]
    for loss in losses:
        loss.backward()
    first, second = (float(loss.detach()) for loss in losses)
    gradients = [
        [parameter.grad for parameter in part.parameters()]
        for part in (today.model.multi_modal_projector, ours.connector)
    ]
    largest = max(float(gradient.abs().max()) for gradient in gradients[0])
    apart = max(float((mine - their).abs().max()) for their, mine in zip(*gradients, strict=True))
    return (
        f"in float32 the losses are {first:.6f} and {second:.6f} ({abs(first - second):.1e} apart), gradients "
        f"{apart / largest:.1e} of the largest apart"
    )


def reader(options: argparse.Namespace, ours: torch.nn.Module, own: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Give what makes our batch: with `--cached`, the tokens are read each time."""
    if not options.cached:
        return lambda: own
    cache = Cache(ours, own["pixel_values"])
    text = {name: value for name, value in own.items() if name != "pixel_values"}
    return lambda: {**text, "visual": cache.read()}


def step(model: torch.nn.Module, batch: Callable[[], dict[str, Any]]) -> Callable[[], None]:
    """Give one optimizer step of what trains in a model."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-5)

    def take() -> None:
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return take


def flops(take: Callable[[], None]) -> int:
    """Count the FLOPs of a step."""
    with FlopCounterMode(display=False) as counter:
        take()
    return counter.get_total_flops()


def rates(seconds: dict[str, list[float]], tokens: int, needed: int, peak_tflops: float) -> str:
    """Write tokens a second, and the share of the chip's peak that the step's needed FLOPs are."""
    lines = ["| variant | tokens/s | MFU |", "|---|---:|---:|"]
    for name, times in seconds.items():
        median = statistics.median(times)
        lines.append(f"| {name} | {tokens / median:.0f} | {needed / median / (peak_tflops * 1e12):.1%} |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--llm", choices=sorted(SHAPES), default="cut")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--memory-of", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
