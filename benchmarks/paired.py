"""Paired measurement: variants alternate in one process; what counts is the ratio of each round.

Times are of the whole machine, so a single one says little; the median of the per-round
ratios is what a noisy machine cannot fake. Memory is measured with one process a variant.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

# Python looks in a script's own folder first, where `connectors.py` would pass for the package of that name.
if Path(sys.path[0]).resolve() == Path(__file__).parent.resolve():
    sys.path.append(sys.path.pop(0))

__all__ = ["added_memory", "describe_machine", "measure", "memory_in_fresh_process", "table", "tensor_memory"]


def measure(variants: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Time each variant once a round, in an order that rotates; one round of warm-up is not counted.

    Returns:
        Seconds by variant: CPU seconds of this process on the CPU, wall seconds on an accelerator.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            synchronize(device)
            started = clock()
            variants[name]()
            synchronize(device)
            if number:
                seconds[name].append(clock() - started)
    return seconds


def table(seconds: Mapping[str, list[float]], first: str, extra: Mapping[str, str]) -> str:
    """Write medians, and the median of the per-round ratios to the variant `first`."""
    lines = ["| variant | median s | ratio to first | spread | added memory |", "|---|---:|---:|---:|---:|"]
    for name, times in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(times, seconds[first], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        median, ratio = statistics.median(times), statistics.median(ratios)
        lines.append(f"| {name} | {median:.3f} | {ratio:.2f} | {spread} | {extra.get(name, '')} |")
    return "\n".join(lines)


def added_memory(work: Callable[[], object], device: str) -> int:
    """Give the peak bytes that two calls of `work` take above what was held before them: weights and batch."""
    if device != "cpu":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        work()
        return torch.cuda.max_memory_allocated() - held
    # Writing 5 resets the high-water mark of resident memory (Linux only).
    Path("/proc/self/clear_refs").write_text("5")
    held = _status("VmRSS")
    work()
    work()
    return _status("VmHWM") - held


def tensor_memory(work: Callable[[], object], device: str) -> int:
    """Give the peak bytes of the tensors that one call of `work` makes, its result among them.

    Unlike resident memory this is exact, and blind to what the math libraries take beside it.
    """
    work()
    if device != "cpu":
        return added_memory(work, device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    live = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def memory_in_fresh_process(name: str) -> int:
    """Run this script again with `--memory-of name` and read the bytes it prints last."""
    arguments = [sys.executable, *sys.argv, "--memory-of", name]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)  # noqa: S603
    return int(done.stdout.split()[-1])


def describe_machine(device: str) -> str:
    """Say what was measured on."""
    import transformers

    chip = torch.cuda.get_device_name() if device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{time.strftime('%Y-%m-%d')}, {chip}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def synchronize(device: str) -> None:
    """Wait for the accelerator, where there is one."""
    if device != "cpu":
        torch.cuda.synchronize()


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024
