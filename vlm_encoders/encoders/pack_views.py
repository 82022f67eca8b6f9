"""Views of many sizes as one sequence, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from connectors.errors import VlmError
from connectors.tokens import Grid, PackedTokens, VisualTokens

__all__ = ["Pack", "Places", "ViewTokens", "by_size", "join_sizes", "pack_views"]

Places: TypeAlias = Sequence[Tensor] | None
"""For each view the places (n,) of the patch tokens that are encoded, or None for all of them."""


@dataclass(frozen=True)
class ViewTokens:
    """What goes into the first block for views of one size.

    Attributes:
        hidden: (B, P + N, D), the prefix first.
        grid: (rows, columns) of the N tokens.
        rotary: cosines and sines (P + N, d) of a view's tokens, the same for all; () without any.
    """

    hidden: Tensor
    grid: Grid
    rotary: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Pack:
    """Views as one sequence, the shortest first.

    Attributes:
        hidden: (1, M, D), the prefix of each view in front of its tokens.
        rotary: cosines and sines (M, d), or ().
        lengths: tokens of each view with its prefix, in the order of the sequence.
        order: the view's index at each place of the sequence.
        grids: of each view, by its index; None where tokens were dropped.
        num_prefix: P.
    """

    hidden: Tensor
    rotary: tuple[Tensor, ...]
    lengths: list[int]
    order: list[int]
    grids: list[Grid | None]
    num_prefix: int

    def unpack(self, hidden: Tensor) -> PackedTokens:
        """Bring a layer's output (1, M, D) to the order of the views, the prefix apart."""
        parts = dict(zip(self.order, hidden[0].split(self.lengths), strict=True))
        views = [parts[index] for index in range(len(parts))]
        count = self.num_prefix
        tokens = hidden[0] if not count and self.order == sorted(self.order) else torch.cat([v[count:] for v in views])
        prefix = torch.stack([view[:count] for view in views]) if count else None
        return PackedTokens(tokens, self.grids, [len(view) - count for view in views], prefix)


def by_size(views: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Give the indices of the views of each size, and their pixels (B, 3, H, W)."""
    sizes: dict[Grid, list[int]] = {}
    for index, view in enumerate(views):
        sizes.setdefault((view.shape[1], view.shape[2]), []).append(index)
    for indices in sizes.values():
        yield indices, torch.stack([views[index] for index in indices])


def join_sizes(groups: Iterable[tuple[list[int], VisualTokens]], kept: Places, owner: str) -> PackedTokens:
    """Pack what a network of whole maps gave of the views of each size, in the order of the views.

    Args:
        groups: indices of the views of each size, and their tokens.
        kept: None: whole maps lose no token.
        owner: the encoder's name, for messages.

    Raises:
        VlmError: tokens are to be dropped.
    """
    if kept is not None:
        raise VlmError(f"{owner}: its network reads whole maps, so no token can be dropped; drop none")
    found: dict[int, VisualTokens] = {}
    for indices, visual in groups:
        found |= dict(zip(indices, PackedTokens.join([visual]).split(), strict=True))
    return PackedTokens.join([found[index] for index in range(len(found))])


def pack_views(groups: Sequence[tuple[list[int], ViewTokens]], kept: Places, num_prefix: int) -> Pack:
    """Make one sequence of views.

    Args:
        groups: indices of the views of each size, and their tokens.
        kept: of the patch tokens; a view of which some are dropped has no grid.
        num_prefix: P, tokens in front of each view's patches, which are all kept.
    """
    found: list[tuple[int, Tensor, tuple[Tensor, ...]]] = []
    grids: dict[int, Grid | None] = {}
    for indices, group in groups:
        for index, hidden in zip(indices, group.hidden, strict=True):
            total = len(hidden) - num_prefix
            grids[index] = group.grid if kept is None or len(kept[index]) == total else None
            if kept is None:
                found.append((index, hidden, group.rotary))
            else:
                chosen = _with_prefix(kept[index], num_prefix).to(hidden.device)
                found.append((index, hidden[chosen], tuple(each[chosen] for each in group.rotary)))
    found.sort(key=lambda view: len(view[1]))
    return Pack(
        hidden=torch.cat([hidden for _, hidden, _ in found])[None],
        rotary=tuple(torch.cat(each) for each in zip(*(rotary for _, _, rotary in found), strict=True)),
        lengths=[len(hidden) for _, hidden, _ in found],
        order=[index for index, _, _ in found],
        grids=[grids[index] for index in range(len(found))],
        num_prefix=num_prefix,
    )


def _with_prefix(places: Tensor, count: int) -> Tensor:
    return torch.cat([torch.arange(count, device=places.device), places + count])
