"""Policies as data: what contradicts itself is refused, and a table's cell says what trains."""

from collections.abc import Callable

import pytest

from connectors.errors import VlmError
from vlm_encoders.vlm.policy import PartPolicy, StagePolicy

TRAIN = PartPolicy("train", lr=1e-3)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: PartPolicy("frozen", lr=1e-3), "a frozen part has no lr"),
        (lambda: PartPolicy("frozen", weight_decay=0.0), "a frozen part has no weight_decay"),
        (lambda: PartPolicy("train"), "needs a learning rate above 0"),
        (lambda: PartPolicy("train", lr=float("nan")), "needs a learning rate above 0"),
        (lambda: PartPolicy("train", lr=1.0, last_blocks=0), "at least one block"),
        (lambda: PartPolicy("train", lr=1.0, last_blocks=-0.5), "at least one block"),
        (lambda: PartPolicy("train", lr=1.0, last_blocks=1.0), "is a fraction of all blocks, below 1"),
        (lambda: PartPolicy("lora", lr=1.0, last_blocks=2), "last_blocks=2 needs mode='train'"),
        (lambda: PartPolicy("lora", lr=1.0, norms_only=True), "norms_only trains norms and nothing else"),
        (lambda: PartPolicy("frozen", norms_only=True), "norms_only trains norms and nothing else"),
        (lambda: PartPolicy("dora", lr=1.0, layer_decay=0.9), "layer_decay=0.9 needs mode='train'"),
        (lambda: PartPolicy("train", lr=1.0, layer_decay=0.0), "a factor above 0 and at most 1, got 0.0"),
        (lambda: PartPolicy("train", lr=1.0, layer_decay=1.1), "a factor above 0 and at most 1, got 1.1"),
        (lambda: PartPolicy("train", lr=1.0, weight_decay=-0.1), "weight_decay must be 0 or more"),
        (lambda: PartPolicy("lora", lr=1.0, lora_rank=0), "lora_rank must be at least 1"),
        (lambda: PartPolicy("lora", lr=1.0, lora_alpha=0.0), "lora_alpha must be above 0"),
        (lambda: PartPolicy("lora", lr=1.0, lora_dropout=1.0), "lora_dropout is a share from 0 to below 1"),
        (lambda: PartPolicy("train", lr=1.0, lora_alpha=8.0), "are of adapters, the mode is 'train'"),
        (lambda: PartPolicy("tune", lr=1.0), "no part mode 'tune'"),  # type: ignore[arg-type]
        (lambda: StagePolicy("x", PartPolicy("qlora", lr=1.0)), "asks QLoRA of the encoder"),
        (lambda: StagePolicy("x", connector=PartPolicy("qlora", lr=1.0)), "asks QLoRA of the connector"),
        (
            lambda: StagePolicy("x", connector=PartPolicy("train", lr=1.0, last_blocks=1)),
            "last_blocks of the connec",
        ),
        (lambda: StagePolicy("x", connector=PartPolicy("train", lr=1.0, layer_decay=1.0)), "layer_decay of the connec"),
        (lambda: StagePolicy("x", ()), "has no policy for the encoder"),
        (lambda: StagePolicy("x", (TRAIN, PartPolicy("qlora", lr=1.0))), "asks QLoRA of the encoder"),
    ],
)
def test_policies_that_contradict_themselves_are_refused(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(VlmError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("policy", "blocks", "words"),
    [
        (PartPolicy(), None, "frozen"),
        (TRAIN, None, "train"),
        (PartPolicy("train", lr=1.0, last_blocks=12), None, "last 12 blocks"),
        (PartPolicy("train", lr=1.0, last_blocks=0.5), None, "last 50% of the blocks"),
        (PartPolicy("train", lr=1.0, last_blocks=0.5), 11, "last 11 blocks"),
        (PartPolicy("train", lr=1.0, last_blocks=0.5), 1, "last 1 block"),
        (PartPolicy("train", lr=1.0, norms_only=True), None, "norms"),
        (PartPolicy("train", lr=1.0, norms_only=True, last_blocks=2), None, "norms, last 2 blocks"),
        (PartPolicy("train", lr=1.0, layer_decay=0.9), None, "train, layer decay 0.9"),
        (PartPolicy("lora", lr=1.0, lora_rank=128), None, "lora r=128"),
        (PartPolicy("dora", lr=1.0), None, "dora r=64"),
    ],
)
def test_a_cell_says_what_trains(policy: PartPolicy, blocks: int | None, words: str) -> None:
    assert policy.words(blocks) == words


def test_the_scale_of_adapters_is_twice_the_rank_where_none_is_given() -> None:
    assert PartPolicy("lora", lr=1.0, lora_rank=8).alpha == 16
    assert PartPolicy("lora", lr=1.0, lora_rank=8, lora_alpha=4).alpha == 4


def test_one_rate_for_all_reaches_each_encoder_and_leaves_the_rest() -> None:
    tail = PartPolicy("train", lr=1e-4, last_blocks=2, weight_decay=0.1)
    stage = StagePolicy("s", (PartPolicy(), tail), TRAIN)
    changed = stage.with_lr(0.5)
    assert changed.policies("encoder") == (PartPolicy(), PartPolicy("train", 0.5, last_blocks=2, weight_decay=0.1))
    assert (changed.connector.lr, changed.llm) == (0.5, PartPolicy())
    assert stage.with_lr(None) is stage


def test_the_policy_of_several_encoders_is_that_of_the_first_that_trains() -> None:
    assert StagePolicy("s", (PartPolicy(), TRAIN)).part("encoder") is TRAIN
    assert not StagePolicy("s", (PartPolicy(), PartPolicy())).part("encoder").trains
