"""Stages by name: the four of this package, and those of released models with their source.

Data alone: it is listed without torch.
"""

from __future__ import annotations

from connectors.errors import UnknownNameError
from connectors.registry import nearest
from vlm_encoders.vlm.policy import StagePolicy
from vlm_encoders.vlm.published_llava import LLAVA
from vlm_encoders.vlm.published_others import OTHERS
from vlm_encoders.vlm.published_stage import PublishedStage

__all__ = ["PUBLISHED", "STAGES", "PublishedStage", "published_stage"]

PUBLISHED: dict[str, PublishedStage] = {each.name: each for each in (*LLAVA, *OTHERS)}
STAGES: dict[str, StagePolicy] = {name: each.policy for name, each in PUBLISHED.items()}


def published_stage(name: str) -> PublishedStage:
    """Give a stage by its name.

    Raises:
        UnknownNameError: there is none; the nearest are given.
    """
    if name not in PUBLISHED:
        raise UnknownNameError(f"no stage '{name}'; {nearest(name, list(PUBLISHED))}")
    return PUBLISHED[name]
