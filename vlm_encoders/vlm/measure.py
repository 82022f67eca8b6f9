"""How long a sample is, before anything of it is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vlm_encoders.vlm.chat import IGNORED
from vlm_encoders.vlm.placeholders import check_places

__all__ = ["SampleLength", "measure_ids"]


class SampleLength(NamedTuple):
    """What a sample costs the LLM.

    Attributes:
        tokens: all of them, T.
        supervised: those with a label.
        image_tokens: those at image places, markers apart.
    """

    tokens: int
    supervised: int
    image_tokens: int


def measure_ids(ids: Sequence[int], labels: Sequence[int], image_token_id: int, runs: Sequence[int]) -> SampleLength:
    """Count the tokens of a text whose image places are not expanded.

    Args:
        ids: one placeholder for each run of image tokens.
        labels: -100 where nothing is learned.
        image_token_id: the placeholder's id.
        runs: image tokens of each placeholder, in order.

    Raises:
        VlmError: the text does not hold one placeholder a run.
    """
    places = sum(token == image_token_id for token in ids)
    check_places(places, len(runs))
    supervised = sum(label != IGNORED and token != image_token_id for token, label in zip(ids, labels, strict=True))
    return SampleLength(len(ids) - places + sum(runs), supervised, sum(runs))
