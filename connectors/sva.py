"""The Spatial Vision Aggregator: each place reads the windows of several encoders there.

Parameters: `queries`; `towers.i` with `0`, `2` (maps) and `3` (norm); `groups.g.l`, layer l of query
group g, with `context_proj`, `in_proj`, `positions.i` where fold i is above 1, `q_norm`, `q_proj`,
`k_norms.i`, `k_projs.i`, `v_norms.i`, `v_projs.i`, `out_proj`, `norm`, `ffn.0`, `ffn.2`; `mlp.0`, `mlp.2`.

Source: Cambrian-1, https://arxiv.org/abs/2406.16860, and its code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from connectors.base import Connector, Numbers, Option, register_connector, require_positive
from connectors.errors import TokenShapeError, VlmError
from connectors.init import Draw, linear
from connectors.region_attention import attend_region, require_heads
from connectors.tokens import PackedTokens, TokenSpec, VisualTokens

__all__ = ["SVALayer", "SpatialVisionAggregator"]


class SVALayer(nn.Module):
    """One query at each place reads the image as a whole and the towers' windows at its place.

    Args:
        dim: D, width of queries and tokens.
        heads: of the attention.
        folds: side of each tower's window, tokens.

    Shape: queries (..., D), context (..., D), windows (..., fold**2, D) -> (..., D).
    """

    def __init__(self, dim: int, heads: int, folds: Sequence[int]) -> None:
        super().__init__()
        self.heads = heads
        self.context_proj = linear(dim, dim, bias=False)
        self.in_proj = linear(2 * dim, dim, bias=False)
        windows = {str(tower): fold**2 for tower, fold in enumerate(folds) if fold > 1}
        self.positions = nn.ParameterDict({key: torch.empty(count, dim) for key, count in windows.items()})
        self.q_norm, self.q_proj = nn.LayerNorm(dim), linear(dim, dim, bias=False)
        self.k_norms, self.v_norms = (nn.ModuleList(nn.LayerNorm(dim) for _ in folds) for _ in range(2))
        self.k_projs, self.v_projs = (nn.ModuleList(linear(dim, dim, bias=False) for _ in folds) for _ in range(2))
        self.out_proj = linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(linear(dim, dim, bias=False), nn.GELU(), linear(dim, dim, bias=False))

    def forward(self, queries: Tensor, context: Tensor, windows: Sequence[Tensor]) -> Tensor:
        """Map (..., D) to (..., D)."""
        keys, values = self._read(windows)
        both = torch.broadcast_tensors(queries, self.context_proj(context))
        asks = self.in_proj(torch.cat(both, dim=-1))
        found = self.out_proj(attend_region(self.q_proj(self.q_norm(asks)), keys, values, self.heads))
        out: Tensor = queries + self.ffn(self.norm(asks + found))
        return out

    def _read(self, windows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        keys, values = [], []
        for tower, window in enumerate(windows):
            placed = window + self.positions[str(tower)] if str(tower) in self.positions else window
            keys.append(self.k_projs[tower](self.k_norms[tower](placed)))
            values.append(self.v_projs[tower](self.v_norms[tower](placed)))
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)


@register_connector("sva")
class SpatialVisionAggregator(Connector):
    """Let a learned query at each place read the windows of several encoders there.

    A token that comes in holds, tower after tower, the fold x fold window of that tower at its
    place, folded as `pixel_shuffle` does. The encoder `fused[fold=true]:A+B+C` gives such tokens.
    Cambrian-1's query groups may have grids of their own, all resized to one in the end; here
    they share the grid that comes in.

    Args:
        in_dim: width of the tokens that come in: the sum of fold**2 * width over the towers.
        out_dim: width of the tokens that go out.
        widths: D of each tower, by default one tower as wide as the tokens allow.
        folds: side of each tower's window, tokens, by default 1 each.
        hidden: width of the queries and of each tower's projected tokens.
        heads: of the attention.
        depth: layers of each query group, each with weights of its own.
        groups: learned queries at each place, joined by channel in the end.

    Shape: (B, N, in_dim) -> (B, N, out_dim); grid kept, prefix dropped.

    Raises:
        VlmError: an option is not positive, the heads do not divide `hidden`, or there are
            not as many folds as widths.
        TokenShapeError: towers of these widths and folds do not make tokens of width `in_dim`.
    """

    source = "Cambrian-1, https://arxiv.org/abs/2406.16860"
    used_by = "Cambrian-1, which has further such layers inside the LLM"
    choose = "for several encoders of different grids, where joining them by channel costs too much width"

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        widths: Sequence[int] | None = None,
        folds: Sequence[int] | None = None,
        *,
        hidden: int = 1024,
        heads: int = 16,
        depth: int = 3,
        groups: int = 1,
    ) -> None:
        super().__init__()
        require_positive("sva", in_dim=in_dim, dim=out_dim, hidden=hidden, depth=depth, groups=groups)
        require_heads("sva", hidden, heads)
        self.in_dim, self.out_dim = in_dim, out_dim
        self.widths, self.folds = _towers(in_dim, widths, folds)
        self._options: dict[str, Option] = {"hidden": hidden, "heads": heads, "depth": depth, "groups": groups}
        self.queries = nn.Parameter(torch.empty(groups, hidden))
        self.towers = nn.ModuleList(
            nn.Sequential(linear(width, hidden), nn.GELU(), linear(hidden, hidden), nn.LayerNorm(hidden))
            for width in self.widths
        )
        self.groups = nn.ModuleList(
            nn.ModuleList(SVALayer(hidden, heads, self.folds) for _ in range(depth)) for _ in range(groups)
        )
        self.mlp = nn.Sequential(linear(groups * hidden, out_dim), nn.GELU(), linear(out_dim, out_dim))
        self.reset_parameters()

    def init_weights(self, draw: Draw) -> None:
        """Start positions at N(0, 1) and queries at N(0, 1 / sqrt(out_dim)), as Cambrian's code does."""
        draw.modules(self)
        draw.normal(self.queries, 1 / math.sqrt(self.out_dim))
        for module in self.modules():
            if isinstance(module, SVALayer):
                for positions in module.positions.values():
                    draw.normal(positions)

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, N, in_dim) to (B, N, out_dim)."""
        self.out_spec(visual.spec)
        windows = self._windows(visual.tokens)
        context = windows[0].mean((1, 2)).unsqueeze(1)
        return VisualTokens(self._aggregate(windows, context), visual.grid)

    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        """Map (M, in_dim) to (M, out_dim) at once; each image has a context of its own."""
        self.require_dim(TokenSpec(1, packed.tokens.shape[1]), self.in_dim)
        if not packed.grids:
            raise TokenShapeError("there is no image among the packed tokens; leave empty packs out")
        windows = self._windows(packed.tokens)
        images = windows[0].split(list(packed.lengths))
        context = torch.cat([image.mean((0, 1)).expand(len(image), -1) for image in images])
        return packed.with_tokens(self._aggregate(windows, context))

    def _windows(self, tokens: Tensor) -> list[Tensor]:
        """Give each tower's window of tokens, (..., fold**2, hidden)."""
        parts = tokens.split([width * fold**2 for width, fold in zip(self.widths, self.folds, strict=True)], dim=-1)
        each = zip(self.towers, parts, self.widths, strict=True)
        return [tower(part.unflatten(-1, (-1, width))) for tower, part, width in each]

    def _aggregate(self, windows: Sequence[Tensor], context: Tensor) -> Tensor:
        """Map windows (..., fold**2, hidden) and context (..., hidden) to (..., out_dim)."""
        found = []
        for query, layers in zip(self.queries, self.groups, strict=True):
            queries = query
            for layer in layers:  # type: ignore[attr-defined]
                queries = layer(queries, context, windows)
            found.append(queries)
        out: Tensor = self.mlp(torch.cat(found, dim=-1))
        return out

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Keep the tokens and their grid, change the width."""
        self.require_dim(spec, self.in_dim)
        return TokenSpec(spec.num_tokens, self.out_dim, spec.grid)

    @classmethod
    def build(
        cls,
        in_spec: TokenSpec,
        out_dim: int,
        *,
        widths: Numbers | None = None,
        folds: Numbers | None = None,
        hidden: int = 1024,
        heads: int = 16,
        depth: int = 3,
        groups: int = 1,
        dim: int | None = None,
    ) -> Self:
        """Make the aggregator from the encoders' joined width to `dim`, by default `out_dim`."""
        width = out_dim if dim is None else dim
        return cls(in_spec.dim, width, widths, folds, hidden=hidden, heads=heads, depth=depth, groups=groups)

    def options(self) -> dict[str, Option]:
        """Give all options; what the width that comes in says alone is not told."""
        told: dict[str, Option] = {"widths": self.widths} if len(self.widths) > 1 else {}
        if set(self.folds) != {1}:
            told["folds"] = self.folds
        return {**told, **self._options, "dim": self.out_dim}


def _towers(in_dim: int, widths: Sequence[int] | None, folds: Sequence[int] | None) -> tuple[Numbers, Numbers]:
    """Give widths and folds of the towers, or refuse those that do not make `in_dim`."""
    folds = Numbers(folds if folds is not None else [1] * len(Numbers(widths or 1)))
    for fold in folds:
        require_positive("sva", folds=fold)
    if widths is None and len(folds) == 1:
        if in_dim % folds[0] ** 2:
            raise TokenShapeError(
                f"'sva' has folds={folds}, and a window of {folds[0] ** 2} tokens does not divide width {in_dim}; "
                "give the side of the window that the encoder folds"
            )
        widths = [in_dim // folds[0] ** 2]
    widths = Numbers(widths or ())
    if len(widths) != len(folds):
        raise VlmError(
            f"'sva' has {len(widths)} widths and {len(folds)} folds; give one of each for each tower, "
            "for example widths=1024/1536,folds=1/2"
        )
    for width in widths:
        require_positive("sva", widths=width)
    total = sum(width * fold**2 for width, fold in zip(widths, folds, strict=True))
    if total != in_dim:
        raise TokenShapeError(
            f"'sva' has widths={widths} and folds={folds}, which make tokens of width {total}, and width {in_dim} "
            "comes in; give the width of each tower and the side of its window"
        )
    return widths, folds
