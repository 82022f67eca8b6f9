"""What to say of a file in which no connector is found."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from connectors.errors import VlmError
from connectors.released.layout import Layout
from connectors.released.match import WORDS, hindrance, matches

__all__ = ["unknown"]

_OTHERS = re.compile(r"layers\.|blocks\.|\.h\.|encoder\.|[qkvo]_proj|gate_proj|up_proj|down_proj|out_proj")
_SHOWN = 3
# A checkpoint around the weights has no more names than this: model, optimizer, step, ...
_FEW = 20


def unknown(
    state: Mapping[str, Tensor], keys: list[str], layouts: Sequence[Layout], name: str | None, prefix: str | None
) -> VlmError:
    """Write the error: what is nearest, and what to do."""
    holds: Any = state
    if isinstance(state, Mapping) and len(keys) <= _FEW and any(isinstance(holds[key], Mapping) for key in keys):
        inner = next(key for key in keys if isinstance(holds[key], Mapping))
        return VlmError(f"this is a checkpoint around the weights; pass what it holds under '{inner}'")
    if name is None:
        said = f"no connector that is known is in these {len(keys)} names"
    else:
        where = f"'{prefix}'" if prefix is not None else " or ".join(f"'{root}'" for root in layouts[0].roots)
        said = f"no tensor of layout '{name}' is here, which has names like {layouts[0].marks[0]} behind {where}"
    hint = _behind(state, keys, layouts) or _hindered(keys, layouts) or _incomplete(keys, layouts)
    return VlmError(f"{said}; {hint or _nearest(state, keys, layouts, name)}")


def _marked(keys: list[str], layouts: Sequence[Layout]) -> list[tuple[Layout, str, int]]:
    """List what stands in front of some of a layout's marks, and how many of them it has."""
    found = []
    known = set(keys)
    for layout in layouts:
        fronts = {key.removesuffix(mark) for mark in layout.marks for key in keys if key.endswith(mark)}
        for front in sorted(front for front in fronts if not front or front.endswith(".")):
            count = sum(front + mark in known for mark in layout.marks)
            found.append((layout, front, count))
    return found


def _behind(state: Mapping[str, Tensor], keys: list[str], layouts: Sequence[Layout]) -> str:
    found = [(layout.name, front) for layout, front, _ in _marked(keys, layouts) if matches(state, layout, front, keys)]
    if not found:
        return ""
    name, front = found[0]
    return f"layout '{name}' is behind another prefix, pass prefix='{front}'"


def _hindered(keys: list[str], layouts: Sequence[Layout]) -> str:
    for layout, front, count in _marked(keys, layouts):
        if count == len(layout.marks) and (other := hindrance(layout, front, keys)) is not None:
            return (
                f"the names of layout '{layout.name}' are, but no file of it has '{other}', which is of a model with "
                f"another connector; pass without='{other}' if that is all the same one"
            )
    return ""


def _incomplete(keys: list[str], layouts: Sequence[Layout]) -> str:
    found = [each for each in _marked(keys, layouts) if each[2] < len(each[0].marks)]
    if not found:
        return ""
    layout, front, _ = max(found, key=lambda each: each[2] / len(each[0].marks))
    missing = ", ".join(front + mark for mark in layout.marks if front + mark not in keys)
    return f"of layout '{layout.name}' {missing} are missing; merge the model's shards into one mapping, if it has any"


def _nearest(state: Mapping[str, Tensor], keys: list[str], layouts: Sequence[Layout], name: str | None) -> str:
    likely = [key for key in keys if WORDS.search(key) and not _OTHERS.search(key)] or keys
    marks = [mark for layout in layouts for mark in layout.marks]
    close = sorted(likely, key=lambda key: -max(difflib.SequenceMatcher(None, key, mark).ratio() for mark in marks))
    nearby = ", ".join(f"{key}{_shape(state, key)}" for key in close[:_SHOWN]) or "none at all"
    if name is not None:
        return f"the nearest names are {nearby}"
    known = ", ".join(sorted(layout.name for layout in layouts))
    return f"the nearest are {nearby}; rename them as one of the known layouts has them, which are {known}"


def _shape(state: Mapping[str, Tensor], key: str) -> str:
    source: Any = state
    tensor = source.get_tensor(key) if hasattr(source, "get_tensor") else source[key]
    return f" {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else ""
