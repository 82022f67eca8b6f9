"""Images a second and model FLOPs utilisation of five towers, eager and compiled, against timm's bare models.

python benchmarks/throughput.py [--device cuda] [--dtype bfloat16] [--batch 64] [--rounds 10] [--only clip]

FLOPs are those that `torch.utils.flop_counter` counts in one forward of timm's model; the peak is the chip's dense
one for the dtype, as its maker states it (H200 in bfloat16: 989 TFLOP/s).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch
from paired import describe_machine, measure
from torch.utils.flop_counter import FlopCounterMode

from vlm_encoders import create_encoder

TOWERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "clip": ("clip-vit-l-14-336", {"feature_layer": -1}, "vit_large_patch14_clip_quickgelu_336"),
    "siglip": ("siglip-so400m-14-384", {}, "vit_so400m_patch14_siglip_gap_384"),
    "dinov2": ("dinov2-vit-l-14", {"image_size": 518}, "vit_large_patch14_dinov2"),
    "swin": ("swin-l-384", {}, "swin_large_patch4_window12_384"),
    "sam": ("sam-vit-b", {}, "samvit_base_patch16"),
}


def rows(key: str, options: argparse.Namespace) -> list[str]:
    """Measure one tower: timm bare, ours, and both compiled."""
    name, arguments, timm_name = TOWERS[key]
    dtype = getattr(torch, options.dtype)
    with torch.device("meta"):
        counted = timm.create_model(timm_name, num_classes=0).eval()
        size = create_encoder(name, pretrained=False, **arguments).spec.image_size
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            counted.forward_features(torch.empty(1, 3, *size))
    bare: Any = timm.create_model(timm_name, num_classes=0).to(options.device, dtype).eval()
    ours = create_encoder(name, pretrained=False, **arguments).to(options.device, dtype)
    pixels = torch.randn(options.batch, 3, *size, device=options.device, dtype=dtype)
    compiled_bare, compiled_ours = torch.compile(bare.forward_features), torch.compile(ours)
    calls: dict[str, Callable[[], Any]] = {
        "timm": lambda: bare.forward_features(pixels),
        "vlm-encoders": lambda: ours(pixels),
        "timm, compiled": lambda: compiled_bare(pixels),
        "vlm-encoders, compiled": lambda: compiled_ours(pixels),
    }
    with torch.inference_mode():
        seconds = measure(calls, options.rounds, options.device)
    lines = []
    for variant, times in seconds.items():
        rate = options.batch / statistics.median(times)
        ratio = statistics.median(mine / theirs for mine, theirs in zip(times, seconds["timm"], strict=True))
        use = rate * counter.get_total_flops() / (options.peak_tflops * 1e12)
        lines.append(f"| {name}, {size[0]} px | {variant} | {rate:.1f} | {use:.1%} | {ratio:.2f} |")
    return lines


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--only", choices=sorted(TOWERS), default=None)
    options = parser.parse_args()
    print(f"{options.dtype}, batch {options.batch}; {describe_machine(options.device)}")
    print("| tower | variant | images/s | MFU | time to timm's |\n|---|---|---:|---:|---:|")
    for key in TOWERS if options.only is None else [options.only]:
        print("\n".join(rows(key, options)), flush=True)


if __name__ == "__main__":
    main()
