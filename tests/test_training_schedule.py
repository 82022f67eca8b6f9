"""Learning-rate schedules against their formulas and torch's own."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from vlm_encoders.training.schedule import build_schedule, cosine_with_warmup, warmup_stable_decay


def test_the_schedule_has_the_values_of_its_formula() -> None:
    values = [cosine_with_warmup(step, total=14, warmup=4, floor=0.1) for step in range(16)]
    assert values[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert values[9] == pytest.approx(0.1 + 0.9 * 0.5)
    assert values[14] == pytest.approx(0.1)
    assert values[15] == values[14]
    assert all(earlier > later for earlier, later in pairwise(values[4:15]))


def test_after_the_warm_up_it_is_torchs_cosine() -> None:
    weight = nn.Parameter(torch.zeros(1))
    ours = torch.optim.SGD([weight], lr=0.3)
    theirs = torch.optim.SGD([weight], lr=0.3)
    schedule = build_schedule(ours, kind="cosine", total=20, warmup_ratio=0.0, floor=0.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=20)
    for _ in range(20):
        assert schedule.get_last_lr()[0] == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        for optimizer, line in ((ours, schedule), (theirs, reference)):
            optimizer.step()
            line.step()


def test_a_constant_schedule_warms_up_and_stays() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = build_schedule(optimizer, kind="constant", total=10, warmup_ratio=0.1, floor=0.0)
    rates = []
    for _ in range(5):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_a_run_of_one_step_moves() -> None:
    assert cosine_with_warmup(0, total=1, warmup=math.ceil(0.03)) > 0


def test_wsd_rises_stays_and_falls() -> None:
    values = [warmup_stable_decay(step, total=20, warmup=4, decay=5, floor=0.1) for step in range(22)]
    assert values[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert values[4:16] == [1.0] * 12
    assert values[16] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(1 / 5)))
    assert values[20] == values[21] == pytest.approx(0.1)
    assert all(earlier > later for earlier, later in pairwise(values[15:21]))


def test_a_fall_that_would_begin_in_the_warm_up_begins_behind_it() -> None:
    values = [warmup_stable_decay(step, total=10, warmup=5, decay=8) for step in range(11)]
    assert values[4] < values[5] == 1.0 > values[6]
    assert values[10] == 0.0


def test_wsd_is_built_from_parts_of_the_run() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3.0)
    schedule = build_schedule(optimizer, kind="wsd", total=10, warmup_ratio=0.1, floor=0.0, decay_ratio=0.2)
    rates = []
    for _ in range(11):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:2] == [1.5, 3.0]
    assert rates[1:9] == [3.0] * 8
    assert rates[9] == pytest.approx(3.0 * (1 - math.sqrt(0.5)))
    assert rates[10] == 0.0
