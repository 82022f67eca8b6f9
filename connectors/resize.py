"""Resize: the grid as a picture, brought to another size.

Source: LLaVA-OneVision, https://arxiv.org/abs/2408.03326, section 3.2;
`LlavaOnevisionModel.apply_pooling` of transformers; PyTorch's `interpolate`.
"""

from __future__ import annotations

from typing import Self

from connectors.base import Connector, Option, register_connector
from connectors.blocks import resize
from connectors.errors import UnknownNameError
from connectors.registry import nearest
from connectors.targets import check_target
from connectors.tokens import Grid, TokenSpec, VisualTokens, require_grid

__all__ = ["RESIZE_MODES", "Resize"]

RESIZE_MODES = ("bilinear", "nearest", "bicubic", "area")
"""Ways of `torch.nn.functional.interpolate`, corners not aligned."""


@register_connector("resize")
class Resize(Connector):
    """Resize the grid of tokens, in fp32.

    Args:
        factor: by which the sides are divided, rounded up: 27 by 2 gives 14.
        grid: (rows, columns) that go out, finer or coarser than what comes in.
        mode: one of `RESIZE_MODES`. All but "area" look at few neighbours however coarse
            the grid becomes.

    Shape: (B, R*C, D) -> (B, R'*C', D); prefix kept.

    Raises:
        VlmError: not exactly one of factor and grid is given, or it is not positive.
        UnknownNameError: the mode is unknown.
    """

    source = "LLaVA-OneVision, https://arxiv.org/abs/2408.03326"
    used_by = "LLaVA-OneVision, for the frames of a video (factor 2)"
    choose = "to bring encoders or images of different grids to one, or where a pooling's factor does not divide"

    def __init__(self, factor: int | None = None, grid: Grid | None = None, mode: str = "bilinear") -> None:
        super().__init__()
        grid = check_target("resize", factor, grid)
        if mode not in RESIZE_MODES:
            raise UnknownNameError(f"'resize' has no mode '{mode}'; {nearest(str(mode), list(RESIZE_MODES))}")
        self.factor, self.grid, self.mode = factor, grid, mode

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, R*C, D) to (B, R'*C', D)."""
        grid = require_grid(self.out_spec(visual.spec).grid)
        return visual if grid == visual.grid else resize(visual, grid, self.mode)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Change the grid, keep the width and the prefix."""
        rows, columns = require_grid(spec.grid)
        if self.grid is not None:
            rows, columns = self.grid
        elif self.factor is not None:
            rows, columns = -(-rows // self.factor), -(-columns // self.factor)
        return TokenSpec(rows * columns, spec.dim, (rows, columns), spec.num_prefix)

    @classmethod
    def build(
        cls,
        in_spec: TokenSpec,
        out_dim: int,
        *,
        factor: int | None = None,
        grid: Grid | None = None,
        mode: str = "bilinear",
    ) -> Self:
        """Make the resize; it fits every width."""
        return cls(factor, grid, mode)

    def options(self) -> dict[str, Option]:
        """Give the factor or the grid, and the mode."""
        if self.grid is not None:
            return {"grid": self.grid, "mode": self.mode}
        return {"mode": self.mode} if self.factor is None else {"factor": self.factor, "mode": self.mode}
