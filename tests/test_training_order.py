"""The order of the data: nothing dropped nor doubled, the same from any step and on any number of processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.errors import VlmError
from vlm_encoders.training.config import TrainConfig
from vlm_encoders.training.feeding.length_order import GroupedBatches, PackedBatches
from vlm_encoders.training.feeding.lengths import DataLengths, SampleLength
from vlm_encoders.training.feeding.order import SeededBatches, StepBatches, make_order

Make = Callable[..., StepBatches]

LENGTHS = st.lists(st.integers(1, 60) | st.none(), min_size=1, max_size=70)


def seeded(lengths: list[int | None], **options: Any) -> StepBatches:
    return SeededBatches(len(lengths), **options)


def grouped(lengths: list[int | None], **options: Any) -> StepBatches:
    return GroupedBatches(lengths, text_only=[bool(length and length % 3 == 0) for length in lengths], **options)


def packed(lengths: list[int | None], **options: Any) -> StepBatches:
    return PackedBatches(lengths, 64, window=16, **options)


ORDERS: list[Make] = [seeded, grouped, packed]


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


@pytest.mark.parametrize("make", ORDERS)
@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS,
    batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_each_epoch_holds_each_sample_once(
    make: Make, lengths: list[int | None], batch_size: int, accumulation: int, epochs: int, seed: int
) -> None:
    order = make(lengths, batch_size=batch_size, accumulation=accumulation, steps=0, seed=seed)
    steps = order.steps_per_epochs(epochs)
    per_step = batch_size * accumulation
    assert (steps - 1) * per_step < order.epoch_units(epochs) <= steps * per_step
    if isinstance(order, SeededBatches):
        for epoch in range(epochs + 1):
            assert sorted(order.epoch(epoch)) == list(range(len(lengths)))
    units = [unit for step in range(steps) for unit in order.units(step)]
    for epoch in range(epochs):
        # The steps that two epochs share are sorted inside: they are told apart by how often a sample was seen.
        whole = units[: order.epoch_units(epoch + 1)]
        shared = Counter(flat(units[: -(-order.epoch_units(epoch + 1) // per_step) * per_step]))
        assert all(count >= epoch + 1 for count in shared.values())
        assert len(shared) == len(lengths)
        if order.epoch_units(epoch + 1) % per_step == 0 or make is not grouped:
            assert set(Counter(flat(whole)).values()) == {epoch + 1}


@pytest.mark.parametrize("make", ORDERS)
@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS,
    batch_size=st.integers(1, 3),
    accumulation=st.integers(1, 2),
    steps=st.integers(1, 9),
    start=st.integers(0, 9),
    seed=st.integers(0, 3),
    world=st.integers(1, 4),
)
def test_any_step_and_any_world_give_the_same_run(
    make: Make,
    lengths: list[int | None],
    batch_size: int,
    accumulation: int,
    steps: int,
    start: int,
    seed: int,
    world: int,
) -> None:
    def order(rank: int, world: int, size: int, first: int = 0) -> StepBatches:
        return make(
            lengths,
            batch_size=size,
            accumulation=accumulation,
            steps=steps,
            seed=seed,
            start=first,
            rank=rank,
            world=world,
        )

    one = order(0, 1, batch_size * world)
    ranks = [order(rank, world, batch_size) for rank in range(world)]
    for step in range(steps):
        turns = zip(*(rank.step_batches(step) for rank in ranks), strict=True)
        # Not only the step: each forward pass of all processes holds what that of the one does.
        assert [flat(list(turn)) for turn in turns] == one.step_batches(step)
    whole, tail = list(ranks[-1]), order(world - 1, world, batch_size, start)
    assert list(tail) == whole[start * accumulation :]
    assert len(tail) == len(list(tail))
    # Steps asked for out of order, as an error report does, change nothing.
    assert ranks[-1].step_batches(0) == whole[:accumulation]


def test_seeds_and_epochs_give_other_orders() -> None:
    lengths: list[int | None] = list(range(1, 61))
    for make in ORDERS:
        runs = [make(lengths, batch_size=6, accumulation=1, steps=20, seed=seed) for seed in range(3)]
        assert len({str(list(run)) for run in runs}) == 3
        count = runs[0].steps_per_epochs(1)
        assert list(runs[0])[:count] != list(runs[0])[count : 2 * count]


def test_groups_hold_like_lengths_and_text_apart() -> None:
    lengths: list[int | None] = [20 + 7 * index % 400 for index in range(4000)]
    text_only = [index % 5 == 0 for index in range(4000)]
    options = {"batch_size": 4, "accumulation": 2, "steps": 500, "seed": 1, "world": 2}

    def waste(order: StepBatches) -> float:
        batches = [[lengths[index] or 0 for index in batch] for batch in order]
        return 1 - sum(map(sum, batches)) / sum(max(batch) * len(batch) for batch in batches)

    assert waste(SeededBatches(4000, **options)) > 0.3
    assert waste(GroupedBatches(lengths, **options)) < 0.03
    order = GroupedBatches(lengths, text_only=text_only, **options)
    assert waste(order) < 0.05
    mixed = sum(len({text_only[index] for index in batch}) == 2 for batch in order)
    assert mixed <= 6
    # Steps of short and of long samples come mixed, not in the order of their length.
    means = [sum(lengths[index] or 0 for index in flat(order.step_batches(step))) / 8 for step in range(250)]
    falls = sum(one > other for one, other in pairwise(means))
    assert 90 < falls < 160


def test_epochs_that_end_inside_a_step_stay_grouped() -> None:
    lengths: list[int | None] = [20 + 7 * index % 400 for index in range(1003)]
    order = GroupedBatches(lengths, batch_size=8, accumulation=1, steps=376, seed=2)
    batches = [[lengths[index] or 0 for index in batch] for batch in order]
    assert all(batch == sorted(batch, reverse=True) for batch in batches)
    padded = sum(max(batch) * 8 for batch in batches)
    # Only the steps that two epochs share hold any lengths.
    assert 1 - sum(map(sum, batches)) / padded < 0.06


def test_packs_hold_no_more_than_asked_for_and_are_full() -> None:
    lengths: list[int | None] = [5 + (index * 37) % 90 for index in range(3000)]
    order = PackedBatches(lengths, 256, batch_size=1, accumulation=1, steps=0, seed=4, window=500)
    packs = [order.units(step)[0] for step in range(order.steps_per_epochs(1))]
    taken = [sum(lengths[index] or 0 for index in samples) for samples in packs]
    assert max(taken) <= 256
    assert sorted(flat(packs)) == list(range(3000))
    assert order.fill == pytest.approx(sum(taken) / (256 * len(packs)))
    assert order.fill > 0.97
    # Of a window, packs of the longest samples are made first; they come in any order.
    longest = [max(lengths[index] or 0 for index in samples) for samples in packs]
    assert sum(one < other for one, other in pairwise(longest)) > 0.3 * len(packs)
    assert order.longer == 0


def test_a_batch_is_the_samples_of_its_packs_in_one_list() -> None:
    lengths: list[int | None] = [10] * 12
    order = PackedBatches(lengths, 30, batch_size=2, accumulation=1, steps=2, seed=0)
    assert [len(batch) for batch in order] == [6, 6]
    assert sorted(flat(list(order))) == list(range(12))


def test_a_longer_sample_has_a_pack_of_its_own_or_is_refused() -> None:
    lengths: list[int | None] = [10, 70, None, 20, 50]
    order = PackedBatches(lengths, 40, batch_size=1, accumulation=1, steps=0, seed=0)
    packs = [order.units(step)[0] for step in range(order.steps_per_epochs(1))]
    assert order.longer == 2
    assert [1] in packs
    assert [4] in packs
    assert order.fill == pytest.approx((70 + 50 + 31) / (70 + 50 + 40))
    with pytest.raises(VlmError, match=r"2 samples are longer than a pack of 40 tokens: sample 1 .* longest takes 70"):
        PackedBatches(lengths, 40, allow_longer=False, batch_size=1, accumulation=1, steps=0, seed=0)
    with pytest.raises(VlmError, match="packs of 0 tokens"):
        PackedBatches(lengths, 0, batch_size=1, accumulation=1, steps=0, seed=0)


def told(*tokens: int | None) -> DataLengths:
    return DataLengths.of([None if each is None else SampleLength(each, 1, each % 2) for each in tokens])


def test_the_settings_choose_the_order() -> None:
    plain = {"data": "d.json", "output": "out", "batch_size": 2}
    lengths = told(10, 21, 30, 41, 50)
    order = make_order(5, TrainConfig(**plain))
    assert type(order) is SeededBatches
    assert (order.steps, len(order)) == (3, 3)
    assert make_order(5, TrainConfig(**plain, epochs=3)).steps == 8
    assert make_order(5, TrainConfig(**plain, steps=7), start=2).steps == 7
    assert make_order(5, TrainConfig(**plain), steps=4, world=2, rank=1).steps == 4
    by_length = make_order(5, TrainConfig(**plain, group_by_length=True), lengths=lengths)
    assert type(by_length) is GroupedBatches
    in_packs = make_order(5, TrainConfig(**plain, pack_tokens=60, epochs=2), lengths=lengths)
    assert type(in_packs) is PackedBatches
    assert in_packs.steps == in_packs.steps_per_epochs(2)
    with pytest.raises(VlmError, match="set one of them"):
        make_order(5, TrainConfig(**plain, pack_tokens=60, group_by_length=True), lengths=lengths)
    with pytest.raises(VlmError, match="pack_tokens needs the lengths of the 5 samples, none came"):
        make_order(5, TrainConfig(**plain, pack_tokens=60))
    with pytest.raises(VlmError, match="group_by_length needs the lengths of the 6 samples, 5 came"):
        make_order(6, TrainConfig(**plain, group_by_length=True), lengths=lengths)
    with pytest.raises(VlmError, match="5 lengths and 1 marks"):
        GroupedBatches(list(lengths.tokens), text_only=[True], batch_size=1, accumulation=1, steps=1, seed=0)
