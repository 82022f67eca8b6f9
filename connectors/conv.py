"""A strided convolution: the neck that brings SAM's large grid down.

Source: Vary, https://arxiv.org/abs/2312.06109; GOT-OCR 2.0,
https://arxiv.org/abs/2409.01704; DeepSeek-OCR, https://arxiv.org/abs/2510.18234,
section 3.2.1; `GotOcr2MultiModalProjector` of transformers.
"""

from __future__ import annotations

from typing import Self

from connectors.base import Connector, Option, register_connector, require_positive
from connectors.errors import TokenShapeError, VlmError
from connectors.init import conv2d
from connectors.tokens import TokenSpec, VisualTokens, require_grid

__all__ = ["Conv"]


@register_connector("conv")
class Conv(Connector):
    """Convolve the grid of tokens, by default with stride 2.

    The necks of Vary, GOT-OCR 2.0 and DeepSeek-OCR are two in a row, each twice as wide:
    `conv:dim=512+conv:dim=1024+linear` behind SAM's 256.

    Args:
        in_dim: D, width of the tokens that come in.
        out_dim: width of the tokens that go out.
        kernel: side of the kernel, tokens.
        stride: step of the kernel, tokens.
        padding: zero tokens around the grid; None for half the kernel.
        bias: whether a bias is added.

    Shape: (B, R*C, in_dim) -> (B, R'*C', out_dim), R' = floor((R + 2*padding - kernel) / stride) + 1
    and C' likewise; prefix dropped.

    Raises:
        VlmError: a width, the kernel or the stride is not positive, or the padding is negative.
    """

    source = "Vary, https://arxiv.org/abs/2312.06109"
    used_by = "Vary, GOT-OCR 2.0 and DeepSeek-OCR, two in a row behind SAM"
    choose = "behind an encoder of a large grid, where neighbours should be mixed as they are merged"

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel: int = 3,
        stride: int = 2,
        padding: int | None = None,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        require_positive("conv", in_dim=in_dim, dim=out_dim, kernel=kernel, stride=stride)
        padding = kernel // 2 if padding is None else padding
        if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
            raise VlmError(f"'conv' has padding={padding}; give a whole number of at least 0")
        self.in_dim, self.out_dim = in_dim, out_dim
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.conv = conv2d(in_dim, out_dim, kernel, stride=stride, padding=padding, bias=bias)
        self.reset_parameters()

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, R*C, in_dim) to (B, R'*C', out_dim)."""
        self.out_spec(visual.spec)
        return VisualTokens.from_map(self.conv(visual.as_map()))

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Give one token for each place of the kernel.

        Raises:
            TokenShapeError: the tokens have another width or no grid, or the kernel has no place.
        """
        self.require_dim(spec, self.in_dim)
        grid = require_grid(spec.grid)
        rows, columns = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in grid)
        if rows < 1 or columns < 1:
            least = self.kernel - 2 * self.padding
            raise TokenShapeError(
                f"'conv' with kernel={self.kernel} and padding={self.padding} takes a grid of at least "
                f"{least}x{least}, got {grid[0]}x{grid[1]}; use a smaller kernel or a larger image"
            )
        return TokenSpec(rows * columns, self.out_dim, (rows, columns))

    @classmethod
    def build(
        cls,
        in_spec: TokenSpec,
        out_dim: int,
        *,
        kernel: int = 3,
        stride: int = 2,
        padding: int | None = None,
        bias: bool = False,
        dim: int | None = None,
    ) -> Self:
        """Make the convolution from the encoder's width to `dim`, by default `out_dim`."""
        return cls(in_spec.dim, out_dim if dim is None else dim, kernel, stride, padding, bias=bias)

    def options(self) -> dict[str, Option]:
        """Give all options; a padding of half the kernel is not told."""
        told: dict[str, Option] = {"kernel": self.kernel, "stride": self.stride}
        if self.padding != self.kernel // 2:
            told["padding"] = self.padding
        return {**told, "bias": self.conv.bias is not None, "dim": self.out_dim}
