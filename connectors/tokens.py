"""Visual tokens and their shapes: what encoders give and connectors change.

Shape letters used in both packages: B or V views, N tokens of a view, P prefix
tokens, D width, H width of the LLM, R rows, C columns, T text length, M image
embeddings in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from connectors.errors import TokenShapeError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Grid", "PackedTokens", "TokenSpec", "VisualTokens", "fold_grid", "require_grid"]

Grid: TypeAlias = tuple[int, int]
"""(rows, columns) of tokens or of tiles."""


@dataclass(frozen=True)
class TokenSpec:
    """The shape of the tokens of one view, known without computing any.

    Attributes:
        num_tokens: N, tokens of a view, without the prefix.
        dim: D, width of a token.
        grid: (rows, columns) of the tokens, row-major; None for queries, which
            have no place in the image.
        num_prefix: P, tokens in front (CLS, registers, distillation), kept apart.

    Raises:
        TokenShapeError: the grid does not hold `num_tokens`, or a number is not positive.
    """

    num_tokens: int
    dim: int
    grid: Grid | None = None
    num_prefix: int = 0

    def __post_init__(self) -> None:
        """Refuse a spec that no tensor can have."""
        if self.num_tokens < 1 or self.dim < 1 or self.num_prefix < 0:
            raise TokenShapeError(
                f"a token spec needs at least one token of width 1, got {self.num_tokens} tokens of width "
                f"{self.dim} with {self.num_prefix} prefix tokens"
            )
        if self.grid is not None and (min(self.grid) < 1 or self.grid[0] * self.grid[1] != self.num_tokens):
            rows, columns = self.grid
            raise TokenShapeError(f"a {rows}x{columns} grid holds {rows * columns} tokens, not {self.num_tokens}")


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The tokens of a batch of views of one size.

    Attributes:
        tokens: (B, N, D), row-major where they have a grid.
        grid: (rows, columns), or None for queries.
        prefix: (B, P, D) prefix tokens, or None.

    Raises:
        TokenShapeError: the tensors do not have these shapes.
    """

    tokens: Tensor
    grid: Grid | None = None
    prefix: Tensor | None = None

    def __post_init__(self) -> None:
        """Hold the tensors to the grid and to each other."""
        if self.tokens.ndim != 3:
            raise TokenShapeError(f"visual tokens are (B, N, D), got shape {tuple(self.tokens.shape)}")
        if self.grid is not None and self.grid[0] * self.grid[1] != self.tokens.shape[1]:
            rows, columns = self.grid
            raise TokenShapeError(
                f"a {rows}x{columns} grid holds {rows * columns} tokens, not {self.tokens.shape[1]}; "
                "keep prefix tokens apart in prefix="
            )
        if self.prefix is None:
            return
        batch, _, dim = self.tokens.shape
        if self.prefix.ndim != 3 or self.prefix.shape[0] != batch or self.prefix.shape[2] != dim:
            raise TokenShapeError(
                f"prefix tokens are (B, P, D) = ({batch}, P, {dim}), got shape {tuple(self.prefix.shape)}"
            )

    @property
    def spec(self) -> TokenSpec:
        """The shape of one view."""
        _, num_tokens, dim = self.tokens.shape
        num_prefix = 0 if self.prefix is None else self.prefix.shape[1]
        return TokenSpec(num_tokens, dim, self.grid, num_prefix)

    def as_map(self) -> Tensor:
        """Give the tokens as a feature map (B, D, R, C).

        Raises:
            TokenShapeError: the tokens have no grid.
        """
        rows, columns = require_grid(self.grid)
        batch, _, dim = self.tokens.shape
        return self.tokens.transpose(1, 2).reshape(batch, dim, rows, columns)

    @classmethod
    def from_map(cls, feature_map: Tensor, prefix: Tensor | None = None) -> VisualTokens:
        """Make tokens of a feature map (B, D, R, C), row by row."""
        if feature_map.ndim != 4:
            raise TokenShapeError(f"a feature map is (B, D, R, C), got shape {tuple(feature_map.shape)}")
        rows, columns = feature_map.shape[2:]
        return cls(feature_map.flatten(2).transpose(1, 2), (rows, columns), prefix)


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """Tokens of images with different grids, one image after another.

    Attributes:
        tokens: (M, D), M the tokens of all images together.
        grids: (rows, columns) of each image, in order.

    Raises:
        TokenShapeError: the grids do not hold M tokens.
    """

    tokens: Tensor
    grids: Sequence[Grid]

    def __post_init__(self) -> None:
        """Hold the tensor to the grids."""
        total = sum(rows * columns for rows, columns in self.grids)
        if self.tokens.ndim != 2 or self.tokens.shape[0] != total:
            raise TokenShapeError(
                f"packed tokens of these grids are ({total}, D), got shape {tuple(self.tokens.shape)}"
            )

    def split(self) -> list[VisualTokens]:
        """Give each image's tokens as a batch of one, (1, N, D) with its grid."""
        parts = self.tokens.split([rows * columns for rows, columns in self.grids])
        return [VisualTokens(part[None], grid) for part, grid in zip(parts, self.grids, strict=True)]


def require_grid(grid: Grid | None) -> Grid:
    """Give the grid back, or refuse tokens that have none.

    Raises:
        TokenShapeError: the tokens have no grid.
    """
    if grid is None:
        raise TokenShapeError("query tokens have no grid; put spatial connectors before the resampler")
    return grid


def fold_grid(grid: Grid, factor: int, instead: str = "") -> Grid:
    """Give the grid of `factor` x `factor` blocks.

    Args:
        grid: (rows, columns) of tokens.
        factor: side of a block, tokens.
        instead: what else the caller offers, in front of the advice to resize.

    Raises:
        TokenShapeError: the factor does not divide the grid.
    """
    rows, columns = grid
    if rows % factor or columns % factor:
        larger = f"{-(-rows // factor) * factor}x{-(-columns // factor) * factor}"
        smaller = f"{rows // factor * factor}x{columns // factor * factor} or " if min(grid) >= factor else ""
        raise TokenShapeError(
            f"a {rows}x{columns} grid does not divide into {factor}x{factor} blocks; "
            f"{instead}pad or resize the image to a grid of {smaller}{larger}"
        )
    return rows // factor, columns // factor
