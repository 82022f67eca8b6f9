"""Visual tokens as a tree of tensors, which is how `torch.export` and `torch.utils.checkpoint` see them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.utils import _pytree as pytree

from connectors.tokens import Grid, VisualTokens

__all__ = ["register_visual_tokens"]


def register_visual_tokens() -> None:
    """Make tokens and prefix the leaves; the grid is a constant of whatever is exported."""
    pytree.register_pytree_node(
        VisualTokens,
        _flatten,
        _unflatten,
        flatten_with_keys_fn=_flatten_with_keys,
        serialized_type_name="connectors.VisualTokens",
        to_dumpable_context=lambda grid: None if grid is None else list(grid),
        from_dumpable_context=lambda grid: None if grid is None else tuple(grid),
    )


def _flatten(visual: VisualTokens) -> tuple[list[Any], Grid | None]:
    return [visual.tokens, visual.prefix], visual.grid


def _flatten_with_keys(visual: VisualTokens) -> tuple[list[tuple[pytree.KeyEntry, Any]], Grid | None]:
    keys = [(pytree.GetAttrKey(name), getattr(visual, name)) for name in ("tokens", "prefix")]
    return keys, visual.grid  # type: ignore[return-value]


def _unflatten(leaves: Iterable[Any], grid: Grid | None) -> VisualTokens:
    # Leaves may be anything here, so nothing is checked.
    visual = object.__new__(VisualTokens)
    for name, leaf in zip(("tokens", "prefix", "grid"), (*leaves, grid), strict=True):
        object.__setattr__(visual, name, leaf)
    return visual
