"""MobileVLM's lightweight down-sample projectors, of both versions.

Parameters of `ldp`: `mlp.0`, `mlp.2`; `blocks.i` with `depthwise`, `norm1`, `se.fc1`, `se.fc2`,
`pointwise`, `norm2`. Of `ldp_v2`: `mlp.0`, `mlp.2`, `peg`.

Source: MobileVLM, https://arxiv.org/abs/2312.16886; MobileVLM V2,
https://arxiv.org/abs/2402.03766; both as in their code, the blocks of the first
as torchvision's MobileNetV3 has them.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

from connectors.base import Connector, Option, register_connector, require_positive
from connectors.c_abstractor import SqueezeExcite, pool_to
from connectors.init import conv2d, linear
from connectors.norms import LayerNorm2d
from connectors.targets import check_grid
from connectors.tokens import Grid, TokenSpec, VisualTokens, require_grid

__all__ = ["LDP", "LDPBlock", "LDPv2"]


class LDPBlock(nn.Module):
    """A block of MobileNetV3 without expansion: 3x3 for each channel alone, squeeze and excite, 1x1.

    Args:
        dim: D, width of the map.
        stride: of the 3x3 convolution; with 1 the map that came in is added.

    Shape: (B, D, R, C) -> (B, D, ceil(R / stride), ceil(C / stride)).
    """

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.depthwise = conv2d(dim, dim, 3, stride=stride, padding=1, groups=dim, bias=False)
        self.norm1 = LayerNorm2d(dim)
        self.se = SqueezeExcite(dim, _multiple_of_8(dim // 4), nn.ReLU(), nn.Hardsigmoid())
        self.pointwise = conv2d(dim, dim, 1, bias=False)
        self.norm2 = LayerNorm2d(dim)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Map (B, D, R, C) to (B, D, ceil(R / stride), ceil(C / stride))."""
        inner = self.se(F.hardswish(self.norm1(self.depthwise(feature_map))))
        out: Tensor = self.norm2(self.pointwise(inner))
        return out + feature_map if self.stride == 1 else out


@register_connector("ldp")
class LDP(Connector):
    """Project each token, mix neighbours by convolutions, and halve both sides of the grid.

    Args:
        in_dim: D, width of the tokens that come in.
        out_dim: width of the tokens that go out.

    Shape: (B, R*C, in_dim) -> (B, ceil(R/2)*ceil(C/2), out_dim); prefix dropped.

    Raises:
        VlmError: a width is not positive.
    """

    source = "MobileVLM, https://arxiv.org/abs/2312.16886"
    used_by = "MobileVLM"
    choose = "for a quarter of the tokens from an LLM on a phone; `ldp_v2` does it with fewer parameters"

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        require_positive("ldp", in_dim=in_dim, dim=out_dim)
        self.in_dim, self.out_dim = in_dim, out_dim
        self.mlp = nn.Sequential(linear(in_dim, out_dim), nn.GELU(), linear(out_dim, out_dim))
        self.blocks = nn.Sequential(LDPBlock(out_dim, 1), LDPBlock(out_dim, 2))
        self.reset_parameters()

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, R*C, in_dim) to (B, ceil(R/2)*ceil(C/2), out_dim)."""
        self.out_spec(visual.spec)
        projected = VisualTokens(self.mlp(visual.tokens), visual.grid)
        return VisualTokens.from_map(self.blocks(projected.as_map()))

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Halve both sides, odd ones rounded up."""
        self.require_dim(spec, self.in_dim)
        rows, columns = (-(-side // 2) for side in require_grid(spec.grid))
        return TokenSpec(rows * columns, self.out_dim, (rows, columns))

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, *, dim: int | None = None) -> Self:
        """Make the projector from the encoder's width to `dim`, by default `out_dim`."""
        return cls(in_spec.dim, out_dim if dim is None else dim)

    def options(self) -> dict[str, Option]:
        """Give the width."""
        return {"dim": self.out_dim}


@register_connector("ldp_v2")
class LDPv2(Connector):
    """Project each token, average to a fixed grid, and add what a 3x3 convolution makes of that.

    Args:
        in_dim: D, width of the tokens that come in.
        out_dim: width of the tokens that go out.
        grid: (rows, columns) that go out, from any grid; one that is smaller is repeated,
            as adaptive pooling does.

    Shape: (B, R*C, in_dim) -> (B, R'*C', out_dim); prefix dropped.

    Raises:
        VlmError: a width or a side of the grid is not positive.
    """

    source = "MobileVLM V2, https://arxiv.org/abs/2402.03766"
    used_by = "MobileVLM V2"
    choose = "for few tokens at hardly more than an MLP's parameters"

    def __init__(self, in_dim: int, out_dim: int, grid: Grid = (12, 12)) -> None:
        super().__init__()
        self.grid = check_grid("ldp_v2", grid)
        require_positive("ldp_v2", in_dim=in_dim, dim=out_dim)
        self.in_dim, self.out_dim = in_dim, out_dim
        self.mlp = nn.Sequential(linear(in_dim, out_dim), nn.GELU(), linear(out_dim, out_dim))
        self.peg = conv2d(out_dim, out_dim, 3, padding=1, groups=out_dim)
        self.reset_parameters()

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, R*C, in_dim) to (B, R'*C', out_dim)."""
        self.out_spec(visual.spec)
        projected = VisualTokens(self.mlp(visual.tokens), visual.grid)
        pooled = pool_to(projected.as_map(), self.grid)
        return VisualTokens.from_map(self.peg(pooled) + pooled)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Give the grid that was chosen."""
        self.require_dim(spec, self.in_dim)
        require_grid(spec.grid)
        rows, columns = self.grid
        return TokenSpec(rows * columns, self.out_dim, self.grid)

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, *, grid: Grid = (12, 12), dim: int | None = None) -> Self:
        """Make the projector from the encoder's width to `dim`, by default `out_dim`."""
        return cls(in_spec.dim, out_dim if dim is None else dim, grid)

    def options(self) -> dict[str, Option]:
        """Give the grid and the width."""
        return {"grid": self.grid, "dim": self.out_dim}


def _multiple_of_8(width: int) -> int:
    """Round as MobileNets round their widths: to the nearest multiple of 8, not below 90 %."""
    rounded = max(8, (width + 4) // 8 * 8)
    return rounded + 8 if 10 * rounded < 9 * width else rounded
