"""A stage by its name, or from a file of one's own policies."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from connectors.errors import UnknownNameError, VlmError
from connectors.registry import nearest
from vlm_encoders.training.setting_checks import check_type
from vlm_encoders.vlm.policy import PARTS, PartPolicy, StagePolicy
from vlm_encoders.vlm.published import STAGES

__all__ = ["stage_policy"]


def stage_policy(stage: str) -> StagePolicy:
    """Give the stage of a run's settings: one of `STAGES`, or that of a TOML file.

    A file has a table for each part that trains, `[encoder]`, `[connector]` and `[llm]`, with the fields
    of `PartPolicy`; `[[encoder]]` tables are one for each encoder of a joint.

    Raises:
        UnknownNameError: there is no such stage; the nearest are given.
        VlmError: the file cannot be read, or its policies contradict themselves.
    """
    if stage in STAGES:
        return STAGES[stage]
    if not stage.endswith(".toml"):
        raise UnknownNameError(f"no stage '{stage}'; {nearest(stage, list(STAGES))}; or give a .toml file of policies")
    try:
        tables = tomllib.loads(Path(stage).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise VlmError(f"the stage file '{stage}' cannot be read ({error}); give a TOML file of policies") from error
    except tomllib.TOMLDecodeError as error:
        raise VlmError(f"the stage file '{stage}' is not TOML: {error}") from error
    for name in tables:
        if name not in PARTS:
            raise VlmError(f"the stage file '{stage}' has '{name}', no part; use the tables [{'], ['.join(PARTS)}]")
    try:
        parts: dict[str, Any] = {part: _policies(part, table) for part, table in tables.items()}
        return StagePolicy(stage, **parts)
    except VlmError as error:
        raise VlmError(f"{stage}: {error}") from error


def _policies(part: str, table: Any) -> PartPolicy | tuple[PartPolicy, ...]:
    if isinstance(table, list) and part == "encoder":
        return tuple(_policy(f"{part}.{number}", each) for number, each in enumerate(table))
    return _policy(part, table)


def _policy(name: str, table: Any) -> PartPolicy:
    if not isinstance(table, dict):
        raise VlmError(f"'{name}' must be a table of policy fields, got {table!r}; write [{name}] and mode = \"train\"")
    known = [field.name for field in fields(PartPolicy)]
    hints = get_type_hints(PartPolicy)
    for key, value in table.items():
        if key not in known:
            raise VlmError(f"[{name}] has no field '{key}'; {nearest(key, known)}")
        check_type(f"[{name}] {key}", value, hints[key])
    try:
        return PartPolicy(**table)
    except VlmError as error:
        raise VlmError(f"[{name}]: {error}") from error
