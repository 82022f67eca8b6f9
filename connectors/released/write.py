"""A chain's weights under the names of released ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from connectors.base import Connector
from connectors.chain import Chain
from connectors.errors import VlmError
from connectors.recipe import recipe_of
from connectors.released.find import layout_of
from connectors.released.keys import to_theirs
from connectors.released.layout import Layout

__all__ = ["labels_of", "to_released", "under_their_names"]


def to_released(chain: Connector, layout: str, *, prefix: str | None = None) -> dict[str, Tensor]:
    """Give a chain's weights under the names that a library saves; the reverse of `load_released`.

    Args:
        chain: of the recipe that the layout holds, or its only link.
        layout: one of `released_layouts()`.
        prefix: what to put in front of every name; None for what the library's files have.

    Returns:
        Names to tensors, which share memory with the chain where nothing is transposed or joined.

    Raises:
        VlmError: the layout does not hold such a chain.
        UnknownNameError: there is no such layout.
    """
    found = layout_of(layout)
    chain = chain if isinstance(chain, Chain) else Chain(chain)
    written = under_their_names(found, chain)
    shapes = {name: tuple(tensor.shape) for name, tensor in written.items()}
    try:
        plan = found.plan_of(shapes, found.hinted(_hints_of(found, chain)))
        kept = plan.build()
    except VlmError as error:
        raise VlmError(f"layout '{layout}' does not hold this chain: {error}") from error
    ours, theirs = recipe_of(chain, plan.out_dim), recipe_of(kept, plan.out_dim)
    if ours != theirs:
        raise VlmError(f"layout '{layout}' holds {theirs}, this chain is {ours}; keep its recipe, or another layout")
    root = found.roots[0] if prefix is None else prefix
    return {root + name: tensor.detach().contiguous() for name, tensor in written.items()}


def labels_of(chain: Chain) -> list[str]:
    """Name each link by its kind, the second of a kind `conv2`."""
    seen: Counter[str] = Counter()
    labels = []
    for each in chain.connectors:
        seen[each.name] += 1
        labels.append(each.name if seen[each.name] == 1 else f"{each.name}{seen[each.name]}")
    return labels


def _ours(chain: Chain) -> dict[str, Tensor]:
    """Give the chain's parameters by label, and the newline."""
    found: dict[str, Tensor] = {}
    for label, each in zip(labels_of(chain), chain.connectors, strict=True):
        tensors = each.state_dict(keep_vars=True).items()
        # A link that was in a model by itself shares its newline with the chain.
        found |= {f"{label}.{name}": tensor for name, tensor in tensors if name != "newline"}
    if chain.newline is not None:
        found["newline"] = chain.newline
    return found


def under_their_names(layout: Layout, chain: Chain) -> dict[str, Tensor]:
    """Give the chain's tensors under the layout's names, without the root."""
    found, unknown = to_theirs(_ours(chain), layout.pairs)
    if unknown:
        raise VlmError(f"layout '{layout.name}' has no name for the chain's {unknown[0]}; choose another layout")
    for name, length in layout.constants.items():
        found[name] = torch.arange(length)[None]
    return found


def _hints_of(layout: Layout, chain: Chain) -> dict[str, Any]:
    """Read the hints off a chain; what a file may lack or leave out is not asked of one that is written."""
    links = dict(zip(labels_of(chain), chain.connectors, strict=True))
    found: dict[str, Any] = {name: False for name, hint in layout.hints.items() if not hint.link}
    for name, hint in layout.hints.items():
        if hint.link in links:
            options = links[hint.link].options()
            found[name] = options[name] if name in options else getattr(links[hint.link], name)
        elif hint.link:
            found[name] = hint.usual
    return found
