"""The C-Abstractor: convolutions around a pooling to a fixed grid.

Parameters: `before.i` and `after.i` are RegNet blocks with `conv1`, `norm1` (1x1), `conv2`,
`norm2` (3x3, a channel alone), `se.fc1`, `se.fc2`, `conv3`, `norm3` (1x1) and, where the
width changes, `shortcut.conv`, `shortcut.norm`; `mlp.0`, `mlp.2` ...; `eos`.

Source: Honeybee, https://arxiv.org/abs/2312.06742, and its code; RegNet,
https://arxiv.org/abs/2003.13678, as timm has it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from connectors.base import Connector, Option, register_connector, require_positive
from connectors.errors import VlmError
from connectors.init import Draw, conv2d, linear
from connectors.norms import LayerNorm2d
from connectors.targets import check_grid
from connectors.tokens import Grid, TokenSpec, VisualTokens, require_grid

__all__ = ["CAbstractor", "RegBlock", "SqueezeExcite", "pool_to"]


class SqueezeExcite(nn.Module):
    """Scale each channel by what all channels are on average over the map.

    Args:
        dim: D, width of the map.
        hidden: width between.
        activation: between the two maps.
        gate: behind them; gives the scale.

    Shape: (B, D, R, C) -> (B, D, R, C).
    """

    def __init__(self, dim: int, hidden: int, activation: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.fc1 = conv2d(dim, hidden, 1)
        self.activation = activation
        self.fc2 = conv2d(hidden, dim, 1)
        self.gate = gate

    def forward(self, feature_map: Tensor) -> Tensor:
        """Map (B, D, R, C) to (B, D, R, C)."""
        mean = feature_map.mean((2, 3), keepdim=True)
        scale: Tensor = self.gate(self.fc2(self.activation(self.fc1(mean))))
        return feature_map * scale


class RegBlock(nn.Module):
    """A RegNet block: 1x1, 3x3 for each channel alone, squeeze and excite, 1x1, and a shortcut.

    Args:
        in_dim: D, width of the map that comes in.
        out_dim: width of the map that goes out.

    Shape: (B, in_dim, R, C) -> (B, out_dim, R, C).
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv1 = conv2d(in_dim, out_dim, 1, bias=False)
        self.norm1 = LayerNorm2d(out_dim)
        self.conv2 = conv2d(out_dim, out_dim, 3, padding=1, groups=out_dim, bias=False)
        self.norm2 = LayerNorm2d(out_dim)
        # A quarter of the width that comes in, not of the block's own.
        self.se = SqueezeExcite(out_dim, max(1, round(in_dim / 4)), nn.SiLU(), nn.Sigmoid())
        self.conv3 = conv2d(out_dim, out_dim, 1, bias=False)
        self.norm3 = LayerNorm2d(out_dim)
        narrows = OrderedDict(conv=conv2d(in_dim, out_dim, 1, bias=False), norm=LayerNorm2d(out_dim))
        self.shortcut = nn.Identity() if in_dim == out_dim else nn.Sequential(narrows)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Map (B, in_dim, R, C) to (B, out_dim, R, C)."""
        inner = F.silu(self.norm1(self.conv1(feature_map)))
        inner = self.se(F.silu(self.norm2(self.conv2(inner))))
        return F.silu(self.norm3(self.conv3(inner)) + self.shortcut(feature_map))


@register_connector("c_abstractor")
class CAbstractor(Connector):
    """Mix neighbouring tokens by convolutions, pool them to a fixed grid, mix again, project.

    Honeybee adds learned positions before it: `position+c_abstractor`.

    Args:
        in_dim: D, width of the tokens that come in.
        out_dim: width of the tokens that go out.
        grid: (rows, columns) that go out, from any grid; one that is smaller is repeated,
            as adaptive pooling does.
        hidden: width of the convolutions.
        depth: blocks before and again behind the pooling; 0 pools alone.
        mlp_depth: number of linear maps at the end.
        eos: learned tokens put behind those of the grid; the output has no grid then.

    Shape: (B, R*C, in_dim) -> (B, R'*C' + eos, out_dim); prefix dropped.

    Raises:
        VlmError: an option is not positive, or depth or eos are negative.
    """

    source = "Honeybee, https://arxiv.org/abs/2312.06742"
    used_by = "Honeybee"
    choose = "for a fixed number of tokens that keep their places, where position in the image matters"

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        grid: Grid = (12, 12),
        hidden: int = 1024,
        depth: int = 3,
        mlp_depth: int = 2,
        *,
        eos: int = 0,
    ) -> None:
        super().__init__()
        self.grid = check_grid("c_abstractor", grid)
        require_positive("c_abstractor", in_dim=in_dim, dim=out_dim, hidden=hidden, mlp_depth=mlp_depth)
        for word, value in (("depth", depth), ("eos", eos)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise VlmError(f"'c_abstractor' has {word}={value}; give a whole number, 0 or more")
        self.in_dim, self.out_dim, self.num_eos = in_dim, out_dim, eos
        self._options: dict[str, Option] = {"hidden": hidden, "depth": depth, "mlp_depth": mlp_depth}
        width = hidden if depth else in_dim
        self.before = nn.Sequential(*(RegBlock(width if index else in_dim, width) for index in range(depth)))
        self.after = nn.Sequential(*(RegBlock(width, width) for _ in range(depth)))
        layers: list[nn.Module] = [linear(width, out_dim)]
        for _ in range(1, mlp_depth):
            layers += [nn.SiLU(), linear(out_dim, out_dim)]
        self.mlp = nn.Sequential(*layers)
        self.eos = nn.Parameter(torch.empty(eos, out_dim)) if eos else None
        self.reset_parameters()

    def init_weights(self, draw: Draw) -> None:
        """Start convolutions and maps at N(0, 0.02) with zero biases, as Honeybee's code does."""
        draw.modules(self, std=0.02)
        if self.eos is not None:
            draw.trunc_normal(self.eos, 0.02)

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, R*C, in_dim) to (B, R'*C' + eos, out_dim)."""
        out = self.out_spec(visual.spec)
        feature_map = self.after(pool_to(self.before(visual.as_map()), self.grid))
        tokens: Tensor = self.mlp(VisualTokens.from_map(feature_map).tokens)
        if self.eos is not None:
            tokens = torch.cat([tokens, self.eos.expand(tokens.shape[0], -1, -1)], dim=1)
        return VisualTokens(tokens, out.grid)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Give the grid that was chosen, and no grid where learned tokens follow it."""
        self.require_dim(spec, self.in_dim)
        require_grid(spec.grid)
        rows, columns = self.grid
        return TokenSpec(rows * columns + self.num_eos, self.out_dim, None if self.num_eos else self.grid)

    @classmethod
    def build(
        cls,
        in_spec: TokenSpec,
        out_dim: int,
        *,
        grid: Grid = (12, 12),
        hidden: int = 1024,
        depth: int = 3,
        mlp_depth: int = 2,
        eos: int = 0,
        dim: int | None = None,
    ) -> Self:
        """Make the abstractor from the encoder's width to `dim`, by default `out_dim`."""
        return cls(in_spec.dim, out_dim if dim is None else dim, grid, hidden, depth, mlp_depth, eos=eos)

    def options(self) -> dict[str, Option]:
        """Give all options."""
        return {"grid": self.grid, **self._options, "eos": self.num_eos, "dim": self.out_dim}


def pool_to(feature_map: Tensor, grid: Grid) -> Tensor:
    """Average (B, D, R, C) to (B, D, *grid), as `adaptive_avg_pool2d`."""
    rows, columns = feature_map.shape[2:]
    # Whole blocks take avg_pool2d: the adaptive one has no deterministic gradient on CUDA.
    if rows % grid[0] == 0 and columns % grid[1] == 0:
        return F.avg_pool2d(feature_map, (rows // grid[0], columns // grid[1]))
    return F.adaptive_avg_pool2d(feature_map, grid)
