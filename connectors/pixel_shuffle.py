"""Pixel shuffle: fewer, wider tokens, and nothing lost.

Source: InternVL 1.5, https://arxiv.org/abs/2404.16821, section 3.1; Idefics3,
https://arxiv.org/abs/2408.12637, section 3.
"""

from __future__ import annotations

from typing import Self

from connectors.base import Connector, Option, register_connector, require_positive
from connectors.blocks import check_on_odd, fit, fold_grid, gather_blocks
from connectors.tokens import PackedTokens, TokenSpec, VisualTokens, require_grid

__all__ = ["PixelShuffle"]


@register_connector("pixel_shuffle")
class PixelShuffle(Connector):
    """Fold each `factor` x `factor` block of tokens into one wider token.

    Channels of a folded token run (row in block, column in block, D), as in the
    released InternVL and Idefics3 weights; `torch.nn.functional.pixel_unshuffle`
    orders them otherwise.

    Args:
        factor: side of the block, tokens.
        on_odd: what is done with a grid that the blocks do not divide, one of `ON_ODD`;
            "pad" leaves zeros in the folded tokens at the edge, which a norm behind
            sees, as VILA's does: "resize" instead, or norm first as `patch_merger`.
        transposed: whether folded tokens run column by column, as in InternVL's first
            version (`ps_version` "v1"); their grid is then (C/factor, R/factor).

    Shape: (B, R*C, D) -> (B, (R/factor)*(C/factor), D*factor**2); prefix dropped.

    Raises:
        VlmError: factor is not positive.
        UnknownNameError: on_odd is unknown.
    """

    source = "InternVL 1.5, https://arxiv.org/abs/2404.16821"
    used_by = "InternVL 1.2 to 3, Idefics3, SmolVLM, nanoVLM and Llama 4, each with an MLP or a matrix behind it"
    choose = "to cut the tokens by four or nine and leave what to keep to the map behind it"

    def __init__(self, factor: int = 2, on_odd: str = "error", *, transposed: bool = False) -> None:
        super().__init__()
        require_positive("pixel_shuffle", factor=factor)
        check_on_odd("pixel_shuffle", on_odd)
        self.factor, self.on_odd, self.transposed = factor, on_odd, transposed

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, R*C, D) to (B, (R/factor)*(C/factor), D*factor**2)."""
        out = self.out_spec(visual.spec)
        fitted = fit(visual, self.factor, self.on_odd)
        rows, columns = require_grid(fitted.grid)
        batch, _, dim = visual.tokens.shape
        size = self.factor
        blocks = fitted.tokens.reshape(batch, rows // size, size, columns // size, size, dim)
        order = (0, 3, 1, 2, 4, 5) if self.transposed else (0, 1, 3, 2, 4, 5)
        return VisualTokens(blocks.permute(order).reshape(batch, out.num_tokens, out.dim), out.grid)

    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        """Map (M, D) to (M', D*factor**2) by one gather."""
        blocks, _, grids = gather_blocks(packed, self.factor, self.on_odd)
        folded = PackedTokens(blocks.flatten(1), grids)
        if not self.transposed:
            return folded
        return PackedTokens.join([VisualTokens.from_map(image.as_map().mT) for image in folded.split()])

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Shrink the grid, widen the tokens."""
        rows, columns = fold_grid(require_grid(spec.grid), self.factor, self.on_odd)
        grid = (columns, rows) if self.transposed else (rows, columns)
        return TokenSpec(rows * columns, spec.dim * self.factor**2, grid)

    @classmethod
    def build(
        cls, in_spec: TokenSpec, out_dim: int, *, factor: int = 2, on_odd: str = "error", transposed: bool = False
    ) -> Self:
        """Make the fold; it fits every width."""
        return cls(factor, on_odd, transposed=transposed)

    def options(self) -> dict[str, Option]:
        """Give all options."""
        return {"factor": self.factor, "on_odd": self.on_odd, "transposed": self.transposed}
