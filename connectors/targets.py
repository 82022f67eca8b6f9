"""The grid or the factor that a connector brings tokens to, as its options say it."""

from __future__ import annotations

from connectors.base import require_positive
from connectors.errors import TokenShapeError, VlmError
from connectors.tokens import Grid

__all__ = ["check_grid", "check_target", "coarser"]


def check_grid(name: str, grid: Grid) -> Grid:
    """Give a grid back as a tuple, whatever pair it came as.

    Raises:
        VlmError: it is not two positive whole numbers.
    """
    try:
        rows, columns = grid
    except (TypeError, ValueError):
        raise VlmError(f"'{name}' has grid={grid}; give rows and columns, for example grid=8x8") from None
    require_positive(name, rows=rows, columns=columns)
    return rows, columns


def check_target(name: str, factor: int | None, grid: Grid | None) -> Grid | None:
    """Give the grid back as a tuple, None where there is a factor.

    Raises:
        VlmError: both are given, or neither, or a wrong one.
    """
    if (factor is None) == (grid is None):
        given = "neither" if factor is None else "both"
        raise VlmError(f"'{name}' takes factor or grid, got {given}; write {name}:factor=2 or {name}:grid=8x8")
    if factor is not None:
        require_positive(name, factor=factor)
    return None if grid is None else check_grid(name, grid)


def coarser(name: str, grid: Grid, target: Grid) -> Grid:
    """Give `target`, to which `grid` is pooled, or refuse one that is finer.

    Raises:
        TokenShapeError: a side of the target is longer than that of the grid.
    """
    if target[0] > grid[0] or target[1] > grid[1]:
        raise TokenShapeError(
            f"{name}:grid={target[0]}x{target[1]} is finer than the {grid[0]}x{grid[1]} grid that comes in; "
            f"use at most {grid[0]}x{grid[1]}, or a larger image"
        )
    return target
