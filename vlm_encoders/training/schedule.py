"""Learning rates over a run: a warm-up, then half a cosine, the peak, or the peak and a fall at the end."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["build_schedule", "cosine_with_warmup", "go_on", "warmup_stable_decay"]


def cosine_with_warmup(step: int, total: int, warmup: int, floor: float = 0.0) -> float:
    """Give the factor on the peak learning rate at a step, counted from 0.

    It rises in even parts over the warm-up, so that the first step moves too, is 1 at
    step `warmup`, and falls as half a cosine to `floor` at step `total`.

    Source: arXiv 1608.03983, section 3, without restarts.
    """
    if step < warmup:
        return _rise(step, warmup)
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_stable_decay(step: int, total: int, warmup: int, decay: int, floor: float = 0.0) -> float:
    """Give the factor on the peak learning rate at a step, counted from 0.

    It rises as in `cosine_with_warmup`, stays at 1, and falls in the last `decay` steps as
    1 - sqrt to `floor` at step `total`; a warm-up and a fall that meet leave no stable part.

    Source: arXiv 2404.06395, section 4; the form of the fall, arXiv 2405.18392, section 3.
    """
    first = max(total - decay, warmup)
    if step < warmup:
        return _rise(step, warmup)
    if step < first:
        return 1.0
    progress = min((step - first) / max(total - first, 1), 1.0)
    return floor + (1.0 - floor) * (1.0 - math.sqrt(progress))


def build_schedule(
    optimizer: Optimizer, *, kind: str, total: int, warmup_ratio: float, floor: float, decay_ratio: float = 0.0
) -> LambdaLR:
    """Make the learning-rate schedule of a run of `total` steps.

    Args:
        optimizer: its groups hold the peak rates.
        kind: "cosine", "constant" or "wsd".
        total: steps of the run.
        warmup_ratio: part of the steps in which the rate rises.
        floor: part of the peak at which "cosine" and "wsd" end.
        decay_ratio: part of the steps in which "wsd" falls.
    """
    warmup = math.ceil(warmup_ratio * total)
    if kind == "wsd":
        decay = math.ceil(decay_ratio * total)
        return LambdaLR(optimizer, partial(warmup_stable_decay, total=total, warmup=warmup, decay=decay, floor=floor))
    # A floor of 1 is a warm-up and then the peak rate.
    factor = partial(cosine_with_warmup, total=total, warmup=warmup, floor=1.0 if kind == "constant" else floor)
    return LambdaLR(optimizer, factor)


def go_on(schedule: LambdaLR, step: int) -> None:
    """Bring a schedule to where it stands after a step; it is a function of the step alone."""
    groups = schedule.optimizer.param_groups
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, base, rate in zip(groups, schedule.base_lrs, rates, strict=True):
        group["initial_lr"], group["lr"] = base, rate
    schedule.load_state_dict({"last_epoch": step, "_last_lr": rates, "lr_lambdas": [None] * len(groups)})


def _rise(step: int, warmup: int) -> float:
    return (step + 1) / (warmup + 1)
