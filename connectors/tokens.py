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

__all__ = ["Grid", "PackedTokens", "TokenSpec", "VisualTokens", "require_grid"]

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
        if self.grid is not None and not (isinstance(self.grid, (tuple, list)) and len(self.grid) == 2):
            raise TokenShapeError(f"a grid is (rows, columns), got {self.grid!r}")
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
        if self.grid is not None and not (isinstance(self.grid, (tuple, list)) and len(self.grid) == 2):
            raise TokenShapeError(f"a grid is (rows, columns), got {self.grid!r}")
        if self.grid is not None and (min(self.grid) < 1 or self.grid[0] * self.grid[1] != self.tokens.shape[1]):
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
        # Not transpose and reshape: of one view they hide that channels lie last, and slow kernels are chosen.
        feature_map: Tensor = self.tokens.unflatten(1, require_grid(self.grid)).permute(0, 3, 1, 2)
        return feature_map

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
        grids: (rows, columns) of each image, in order; None for queries.
        lengths: the number of tokens of each image; needed only where a grid is None.
        prefix: (I, P, D), the prefix tokens of each of I images, or None.

    Raises:
        TokenShapeError: grids and lengths do not hold M tokens, a length is missing, or the
            prefix is not that of these images.
    """

    tokens: Tensor
    grids: Sequence[Grid | None]
    lengths: Sequence[int] = ()
    prefix: Tensor | None = None

    def __post_init__(self) -> None:
        """Hold the tensor to the grids."""
        grids = [None if grid is None else (grid[0], grid[1]) for grid in self.grids]
        if not self.lengths and None in grids:
            raise TokenShapeError("packed tokens without a grid need lengths=, the number of tokens of each image")
        lengths = list(self.lengths) or [rows * columns for rows, columns in filter(None, grids)]
        held = [length if grid is None else grid[0] * grid[1] for grid, length in zip(grids, lengths, strict=False)]
        if len(lengths) != len(grids) or held != lengths or min(lengths, default=1) < 1:
            raise TokenShapeError(f"packed grids {grids} do not hold {lengths} tokens; give one length for each image")
        if self.tokens.ndim != 2 or self.tokens.shape[0] != sum(lengths):
            raise TokenShapeError(
                f"packed tokens of these grids are ({sum(lengths)}, D), got shape {tuple(self.tokens.shape)}"
            )
        images, dim = len(lengths), self.tokens.shape[1]
        if self.prefix is not None and (self.prefix.ndim, self.prefix.shape[0], self.prefix.shape[-1]) != (
            3,
            images,
            dim,
        ):
            raise TokenShapeError(
                f"prefix tokens are (I, P, D) = ({images}, P, {dim}), got shape {tuple(self.prefix.shape)}"
            )
        object.__setattr__(self, "grids", grids)
        object.__setattr__(self, "lengths", lengths)

    @property
    def specs(self) -> list[TokenSpec]:
        """The shape of each image."""
        dim, num_prefix = self.tokens.shape[1], 0 if self.prefix is None else self.prefix.shape[1]
        return [TokenSpec(length, dim, grid, num_prefix) for grid, length in zip(self.grids, self.lengths, strict=True)]

    def require_grids(self) -> list[Grid]:
        """Give the grids back, or refuse a pack in which an image has none.

        Raises:
            TokenShapeError: there is no image, or one has no grid.
        """
        if not self.grids:
            raise TokenShapeError("there is no image among the packed tokens; leave empty packs out")
        return [require_grid(grid) for grid in self.grids]

    def with_tokens(self, tokens: Tensor, prefix: Tensor | None = None) -> PackedTokens:
        """Give other tokens, (M, D'), in the same places, with another prefix (I, P', D') or none."""
        return PackedTokens(tokens, self.grids, self.lengths, prefix)

    def split(self) -> list[VisualTokens]:
        """Give each image's tokens as a batch of one, (1, N, D) with its grid and prefix."""
        parts = self.tokens.split(list(self.lengths))
        prefixes = [None] * len(parts) if self.prefix is None else self.prefix.split(1)
        return [
            VisualTokens(part[None], grid, prefix)
            for part, grid, prefix in zip(parts, self.grids, prefixes, strict=True)
        ]

    def padded(self) -> tuple[Tensor, Tensor]:
        """Give the tokens side by side, (I, L, D), and which are real, (I, L); I images, L the longest."""
        from torch import arange, tensor
        from torch.nn.utils.rnn import pad_sequence

        lengths = list(self.lengths)
        tokens = pad_sequence(list(self.tokens.split(lengths)), batch_first=True)
        real = arange(tokens.shape[1], device=tokens.device) < tensor(lengths, device=tokens.device)[:, None]
        return tokens, real

    @classmethod
    def join(cls, images: Sequence[VisualTokens]) -> PackedTokens:
        """Pack views of any grids or none, each view an image.

        Raises:
            TokenShapeError: there is no image, or the widths or the numbers of prefix tokens differ.
        """
        from torch import cat

        if not images:
            raise TokenShapeError("there is no image among the packed tokens; leave empty packs out")
        counts = {image.spec.num_prefix for image in images}
        if len(counts) > 1:
            raise TokenShapeError(f"images with {sorted(counts)} prefix tokens cannot be packed; drop the prefix first")
        if len({image.tokens.shape[2] for image in images}) > 1:
            widths = ", ".join(str(image.tokens.shape[2]) for image in images)
            raise TokenShapeError(f"packed tokens have one width, got {widths}; pack them behind one connector")
        grids = [image.grid for image in images for _ in range(len(image.tokens))]
        lengths = [image.tokens.shape[1] for image in images for _ in range(len(image.tokens))]
        prefixes = [image.prefix for image in images if image.prefix is not None and image.spec.num_prefix]
        tokens = cat([image.tokens.flatten(0, 1) for image in images])
        return cls(tokens, grids, lengths, cat(prefixes) if prefixes else None)


def require_grid(grid: Grid | None) -> Grid:
    """Give the grid back, or refuse tokens that have none.

    Raises:
        TokenShapeError: the tokens have no grid.
    """
    if grid is None:
        raise TokenShapeError(
            "query tokens have no grid; put spatial connectors before the resampler, or state an encoder's own grid"
        )
    return grid
