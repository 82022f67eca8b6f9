"""TokenPacker: coarse tokens that read the fine ones of their own region.

Parameters: `q_proj`, `k_proj.0`, `k_proj.2`, `v_proj.0`, `v_proj.2`, `q_norm`, `k_norm`,
`v_norm`, `attention.{q,k,v,out}_proj`, `mlp.0`, `mlp.2`.

Source: TokenPacker, https://arxiv.org/abs/2407.02392, and its code.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from connectors.base import Connector, Option, register_connector, require_positive
from connectors.blocks import check_on_odd, fit, fold_grid, gather_blocks
from connectors.errors import TokenShapeError
from connectors.init import Draw, linear
from connectors.region_attention import RegionAttention, require_heads
from connectors.tokens import PackedTokens, TokenSpec, VisualTokens, require_grid

__all__ = ["TokenPacker"]


@register_connector("token_packer")
class TokenPacker(Connector):
    """Shrink the grid by bilinear resizing, and let each token read the block that it stands for.

    TokenPacker gives the tokens of four layers: an encoder with `feature_layer=-13/-9/-3/-2`,
    then `token_packer:levels=4`.

    Args:
        in_dim: D, width of the tokens that come in, all levels together.
        out_dim: width of the tokens that go out.
        factor: side of a block, tokens.
        levels: layers of the encoder that a token joins channel by channel, of one width each;
            the last one is resized and asks, all are read.
        hidden: width of the attention.
        heads: of the attention, by default one for each 128 of `hidden`.
        on_odd: what is done with a grid that the blocks do not divide, one of `ON_ODD`; "pad"
            reads and resizes the tokens that a block at the edge really holds.

    Shape: (B, R*C, in_dim) -> (B, (R/factor)*(C/factor), out_dim); prefix dropped.

    Raises:
        VlmError: an option is not positive, or the heads do not divide `hidden`.
        TokenShapeError: the levels do not divide the width.
        UnknownNameError: `on_odd` is another word.
    """

    source = "TokenPacker, https://arxiv.org/abs/2407.02392"
    used_by = "TokenPacker and TokenPacker-HD"
    choose = (
        "for a fourth of the tokens or fewer where fine detail must survive, best with several layers of the encoder"
    )

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        factor: int = 2,
        levels: int = 1,
        *,
        hidden: int = 1024,
        heads: int | None = None,
        on_odd: str = "error",
    ) -> None:
        super().__init__()
        require_positive("token_packer", in_dim=in_dim, dim=out_dim, factor=factor, levels=levels, hidden=hidden)
        usual = max(1, hidden // 128)
        heads = usual if heads is None else heads
        require_heads("token_packer", hidden, heads)
        check_on_odd("token_packer", on_odd)
        if in_dim % levels:
            raise TokenShapeError(
                f"'token_packer' has levels={levels}, which do not divide the width {in_dim}; "
                "give the number of layers that the encoder joins"
            )
        self.in_dim, self.out_dim, self.factor, self.level_dim = in_dim, out_dim, factor, in_dim // levels
        self.on_odd = on_odd
        self._options: dict[str, Option] = {"factor": factor, "levels": levels, "hidden": hidden}
        if heads != usual:
            self._options["heads"] = heads
        self.q_proj = linear(self.level_dim, hidden, bias=False)
        self.k_proj = nn.Sequential(linear(in_dim, hidden), nn.GELU(), linear(hidden, hidden))
        self.v_proj = nn.Sequential(linear(in_dim, hidden), nn.GELU(), linear(hidden, hidden))
        self.q_norm, self.k_norm, self.v_norm = (nn.LayerNorm(hidden, eps=1e-6) for _ in range(3))
        self.attention = RegionAttention(hidden, heads)
        self.mlp = nn.Sequential(linear(hidden, out_dim), nn.GELU(), linear(out_dim, out_dim))
        self.reset_parameters()

    def init_weights(self, draw: Draw) -> None:
        """Start maps at N(0, 0.02), cut, with zero biases; the attention has a start of its own."""
        self.attention.init_weights(draw)
        maps = nn.ModuleList((self.q_proj, self.k_proj, self.v_proj, self.mlp))
        for module in maps.modules():
            if isinstance(module, nn.Linear):
                draw.trunc_normal(module.weight, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for norm in (self.q_norm, self.k_norm, self.v_norm):
            norm.reset_parameters()

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, R*C, in_dim) to (B, (R/factor)*(C/factor), out_dim)."""
        out = self.out_spec(visual.spec)
        rows, columns = require_grid(out.grid)
        blocks, real = self._blocks(visual), None
        if self.on_odd == "pad" and visual.grid != (rows * self.factor, columns * self.factor):
            held = visual.tokens.new_ones(1, visual.tokens.shape[1], 1)
            real = self._blocks(VisualTokens(held, visual.grid)).squeeze(-1) > 0
        return VisualTokens(self._pack(blocks, real), out.grid)

    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        """Map (M, in_dim) to (M', out_dim), the blocks of all images at once."""
        self.require_dim(TokenSpec(1, packed.tokens.shape[1]), self.in_dim)
        blocks, real, grids = gather_blocks(packed, self.factor, self.on_odd)
        return PackedTokens(self._pack(blocks, real), grids)

    def _blocks(self, visual: VisualTokens) -> Tensor:
        """Give the blocks of the fitted grid, (B, M, factor**2, D)."""
        fitted = fit(visual, self.factor, self.on_odd)
        rows, columns = require_grid(fitted.grid)
        shape = (rows // self.factor, self.factor, columns // self.factor, self.factor)
        blocks: Tensor = fitted.tokens.unflatten(1, shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return blocks

    def _pack(self, blocks: Tensor, real: Tensor | None) -> Tensor:
        """Map blocks (..., factor**2, in_dim), of whose tokens those that are `real` count, to (..., out_dim)."""
        query = self.q_norm(self.q_proj(self._shrink(blocks[..., -self.level_dim :], real)))
        read = self.attention(query, self.k_norm(self.k_proj(blocks)), self.v_norm(self.v_proj(blocks)), real)
        out: Tensor = self.mlp(read)
        return out

    def _shrink(self, blocks: Tensor, real: Tensor | None) -> Tensor:
        """Make one token of each block (..., factor**2, D): (..., D)."""
        # A grid shrunk bilinearly by a whole factor has the mean of the middle tokens of each block.
        first, count = (self.factor - 1) // 2, 2 - self.factor % 2
        wide = torch.promote_types(blocks.dtype, torch.float32)
        if real is None:
            middle = blocks.unflatten(-2, (self.factor, self.factor))
            middle = middle.narrow(-3, first, count).narrow(-2, first, count)
            coarse: Tensor = middle.mean((-3, -2), dtype=wide)
            return coarse.to(blocks.dtype)
        side = torch.arange(self.factor, device=blocks.device)
        inside = (side >= first) & (side < first + count)
        asked = real & (inside[:, None] & inside).flatten()
        # A block whose middle is all padding is the mean of what it holds.
        weights = torch.where(asked.any(-1, keepdim=True), asked, real).to(wide).unsqueeze(-1)
        coarse = (blocks * weights).sum(-2) / weights.sum(-2)
        return coarse.to(blocks.dtype)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Shrink the grid, change the width."""
        self.require_dim(spec, self.in_dim)
        rows, columns = fold_grid(require_grid(spec.grid), self.factor, self.on_odd)
        return TokenSpec(rows * columns, self.out_dim, (rows, columns))

    @classmethod
    def build(
        cls,
        in_spec: TokenSpec,
        out_dim: int,
        *,
        factor: int = 2,
        levels: int = 1,
        hidden: int = 1024,
        heads: int | None = None,
        on_odd: str = "error",
        dim: int | None = None,
    ) -> Self:
        """Make the packer from the encoder's width to `dim`, by default `out_dim`."""
        width = out_dim if dim is None else dim
        return cls(in_spec.dim, width, factor, levels, hidden=hidden, heads=heads, on_odd=on_odd)

    def options(self) -> dict[str, Option]:
        """Give all options; the usual heads of the width are not told."""
        return {**self._options, "on_odd": self.on_odd, "dim": self.out_dim}
