"""Pooling: fewer tokens without a parameter.

Source: DeCo, https://arxiv.org/abs/2405.20985, section 4; `LlavaNextVideoPooler` of
transformers; PyTorch's `avg_pool2d`, `max_pool2d` and their adaptive kin.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from connectors.base import Connector, Option, register_connector
from connectors.blocks import check_on_odd, fit, fold_grid, gather_blocks
from connectors.errors import VlmError
from connectors.targets import check_target, coarser
from connectors.tokens import Grid, PackedTokens, TokenSpec, VisualTokens, require_grid

__all__ = ["AvgPool", "MaxPool", "Pool"]


class Pool(Connector):
    """Make one token of each block of the grid; options as `AvgPool`, a subclass says how."""

    def __init__(self, factor: int | None = None, grid: Grid | None = None, on_odd: str = "error") -> None:
        super().__init__()
        grid = check_target(self._label, factor, grid)
        check_on_odd(self._label, on_odd)
        if grid is not None and on_odd != "error":
            raise VlmError(
                f"'{self._label}' has on_odd={on_odd} beside a grid, which every grid pools to; leave it out"
            )
        self.factor, self.grid, self.on_odd = factor, grid, on_odd

    @staticmethod
    @abstractmethod
    def pool(feature_map: Tensor, kernel: Grid, ceil: bool) -> Tensor:  # noqa: FBT001 - as torch's
        """Pool (B, D, R, C) by blocks of `kernel`; `ceil` keeps blocks that the edge cuts."""

    @staticmethod
    @abstractmethod
    def adapt(feature_map: Tensor, grid: Grid) -> Tensor:
        """Pool (B, D, R, C) to `grid` by blocks that may overlap."""

    @staticmethod
    @abstractmethod
    def reduce(blocks: Tensor, real: Tensor | None) -> Tensor:
        """Pool (M, S, D) to (M, D), without the tokens where `real`, (M, S), is False."""

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, R*C, D) to (B, R'*C', D)."""
        rows, columns = require_grid(self.out_spec(visual.spec).grid)
        if self.factor is not None:
            fitted = fit(visual, self.factor, self.on_odd) if self.on_odd == "resize" else visual
            pooled = self.pool(fitted.as_map(), (self.factor, self.factor), self.on_odd == "pad")
            return VisualTokens.from_map(pooled, visual.prefix)
        in_rows, in_columns = require_grid(visual.grid)
        # Whole blocks are pooled as such: adaptive pooling has no deterministic gradient on CUDA.
        if in_rows % rows == 0 and in_columns % columns == 0:
            pooled = self.pool(visual.as_map(), (in_rows // rows, in_columns // columns), False)
        else:
            pooled = self.adapt(visual.as_map(), (rows, columns))
        return VisualTokens.from_map(pooled, visual.prefix)

    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        """Map (M, D) to (M', D), by one gather where a factor is given."""
        if self.factor is None:
            return super().forward_packed(packed)
        blocks, real, grids = gather_blocks(packed, self.factor, self.on_odd)
        return PackedTokens(self.reduce(blocks, real), grids, prefix=packed.prefix)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Shrink the grid, keep the width and the prefix."""
        grid = require_grid(spec.grid)
        if self.factor is not None:
            rows, columns = fold_grid(grid, self.factor, self.on_odd)
        else:
            rows, columns = coarser(self._label, grid, require_grid(self.grid))
        return TokenSpec(rows * columns, spec.dim, (rows, columns), spec.num_prefix)

    @classmethod
    def build(
        cls,
        in_spec: TokenSpec,
        out_dim: int,
        *,
        factor: int | None = None,
        grid: Grid | None = None,
        on_odd: str = "error",
    ) -> Self:
        """Make the pooling; it fits every width."""
        return cls(factor, grid, on_odd)

    def options(self) -> dict[str, Option]:
        """Give the grid, or the factor and on_odd."""
        if self.grid is not None:
            return {"grid": self.grid}
        return {} if self.factor is None else {"factor": self.factor, "on_odd": self.on_odd}

    @property
    def _label(self) -> str:
        return self.name or type(self).__name__


@register_connector("avg_pool")
class AvgPool(Pool):
    """Average the tokens of each block of the grid into one.

    Args:
        factor: side of the block, tokens.
        grid: (rows, columns) that go out, from any grid that is not smaller;
            where it does not divide the grid that comes in, blocks overlap.
        on_odd: what is done with a grid that `factor` does not divide, one of `ON_ODD`;
            "pad" averages the tokens that a block at the edge really holds.

    Shape: (B, R*C, D) -> (B, R'*C', D); prefix kept.

    Raises:
        VlmError: not exactly one of factor and grid is given, it is not positive, or
            on_odd comes with grid.
        UnknownNameError: on_odd is unknown.
    """

    source = "DeCo, https://arxiv.org/abs/2405.20985"
    used_by = "DeCo (by grid), LLaVA-NeXT-Video (factor 2); before the norm in Gemma 3"
    choose = "to cut the tokens at no cost in parameters, first when fewer tokens are wanted"

    @staticmethod
    def pool(feature_map: Tensor, kernel: Grid, ceil: bool) -> Tensor:  # noqa: FBT001 - as torch's
        """Average blocks of `kernel`; one that the edge cuts is the mean of what it holds."""
        if not ceil:
            return F.avg_pool2d(feature_map, kernel)
        # `ceil_mode` would do, but its compiled gradient divides by whole blocks (torch 2.15).
        rows, columns = feature_map.shape[2:]
        wide = feature_map.to(_wide(feature_map.dtype))
        pooled = F.avg_pool2d(F.pad(wide, (0, -columns % kernel[1], 0, -rows % kernel[0])), kernel)
        held_rows, held_columns = (
            torch.arange(side, 0, -step, device=feature_map.device).clamp(max=step)
            for side, step in zip((rows, columns), kernel, strict=True)
        )
        whole = kernel[0] * kernel[1]
        return (pooled * (whole / (held_rows[:, None] * held_columns))).to(feature_map.dtype)

    @staticmethod
    def adapt(feature_map: Tensor, grid: Grid) -> Tensor:
        """Average to `grid`."""
        wide = feature_map.to(_wide(feature_map.dtype))
        return F.adaptive_avg_pool2d(wide, grid).to(feature_map.dtype)

    @staticmethod
    def reduce(blocks: Tensor, real: Tensor | None) -> Tensor:
        """Average (M, S, D), zero where not real, to (M, D)."""
        # A sum of fp16 tokens of a thousand has no room in fp16.
        total = blocks.sum(1, dtype=_wide(blocks.dtype))
        count = blocks.shape[1] if real is None else real.sum(1, keepdim=True)
        return (total / count).to(blocks.dtype)


@register_connector("max_pool")
class MaxPool(Pool):
    """Take, channel by channel, the largest value of each block of the grid.

    Args:
        factor: side of the block, tokens.
        grid: (rows, columns) that go out.
        on_odd: what is done with a grid that `factor` does not divide; all as `AvgPool`.

    Shape: (B, R*C, D) -> (B, R'*C', D); prefix kept.

    Raises:
        VlmError: as `AvgPool`.
        UnknownNameError: on_odd is unknown.
    """

    source = "the code of LLaVA-NeXT, https://github.com/LLaVA-VL/LLaVA-NeXT (`mm_spatial_pool_mode=max`)"
    used_by = "none that we know; an option in the code of LLaVA-NeXT"
    choose = "where small, strong details such as text should outlive the pooling"

    @staticmethod
    def pool(feature_map: Tensor, kernel: Grid, ceil: bool) -> Tensor:  # noqa: FBT001 - as torch's
        """Take the largest of blocks of `kernel`."""
        return F.max_pool2d(feature_map, kernel, ceil_mode=ceil)

    @staticmethod
    def adapt(feature_map: Tensor, grid: Grid) -> Tensor:
        """Take the largest of each block of `grid`."""
        out: Tensor = F.adaptive_max_pool2d(feature_map, grid)
        return out

    @staticmethod
    def reduce(blocks: Tensor, real: Tensor | None) -> Tensor:
        """Take the largest of (M, S, D) where real."""
        filled = blocks if real is None else blocks.masked_fill(~real[..., None], -torch.inf)
        return filled.amax(1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
