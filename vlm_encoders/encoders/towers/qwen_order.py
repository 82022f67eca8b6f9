"""The order in which Qwen's vision towers take patches: block by block of those that the merger joins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from connectors.tokens import Grid

__all__ = ["block_order", "chosen_rows", "cut_patches", "drop_rows", "drop_windows", "token_windows"]


def cut_patches(pixels: Tensor, side: int, merge: int, frames: int) -> Tensor:
    """Cut views (B, 3, H, W) into rows of patches, each repeated in time, in the order of the merger's blocks."""
    split = pixels.unflatten(3, (-1, merge, side)).unflatten(2, (-1, merge, side))
    ordered = split.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    length = pixels.shape[1] * frames * side * side
    repeated: Tensor = ordered.expand(*ordered.shape[:6], frames, side, side)
    return repeated.reshape(-1, length)


def block_order(grids: Sequence[Grid], merge: int) -> Tensor:
    """Give the place, counted row by row through all views, of each patch in the order of blocks, (M,)."""
    orders, start = [], 0
    for rows, columns in grids:
        places = torch.arange(start, start + rows * columns).reshape(rows // merge, merge, columns // merge, merge)
        orders.append(places.transpose(1, 2).flatten())
        start += rows * columns
    return torch.cat(orders)


def chosen_rows(grids: Sequence[Grid], kept: Sequence[Tensor], order: Tensor) -> Tensor:
    """Say of each patch in the order of blocks whether it is among the kept ones, (M,) of bool.

    Args:
        grids: of the views.
        kept: for each view its kept places, row by row.
        order: as `block_order` gives it.
    """
    chosen = torch.zeros(len(order), dtype=torch.bool)
    start = 0
    for (rows, columns), places in zip(grids, kept, strict=True):
        chosen[start + places.cpu()] = True
        start += rows * columns
    return chosen[order]


def token_windows(units: Tensor, unit: int) -> Tensor:
    """Give an order of tokens (M,) from one of the merger's blocks (M / unit,)."""
    return (units[:, None] * unit + torch.arange(unit)).flatten()


def drop_rows(known: dict[str, Tensor], chosen: Tensor, lengths: Sequence[int]) -> dict[str, Tensor]:
    """Leave what the network is told of the chosen patches alone; windows by `drop_windows`.

    Args:
        known: places (M, ...) of each patch, and bounds of views.
        chosen: (M,) of bool.
        lengths: the number of chosen patches of each view.
    """
    bounds = pad(torch.tensor(lengths).cumsum(0, dtype=torch.int32), (1, 0))
    return {name: bounds if name == "cu_seqlens" else value[chosen] for name, value in known.items()}


def drop_windows(order: Tensor, bounds: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Leave the chosen patches alone in an order (M,) of windows and in their bounds; empty windows go."""
    left = chosen[order]
    counted = pad(left.cumsum(0, dtype=torch.int32), (1, 0))
    numbers = chosen.cumsum(0) - 1
    return numbers[order[left]], counted[bounds.long()].unique_consecutive()
