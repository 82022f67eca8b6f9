"""Qwen2-VL's patch merger: norm, fold, MLP.

Source: Qwen2-VL, https://arxiv.org/abs/2409.12191, section 2.1; Qwen2.5-VL,
https://arxiv.org/abs/2502.13923; Qwen3-VL, https://arxiv.org/abs/2511.21631;
`PatchMerger`, `Qwen2_5_VLPatchMerger` and `Qwen3VLVisionPatchMerger` of transformers.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from connectors.base import Connector, Option, register_connector, require_positive
from connectors.blocks import check_on_odd
from connectors.errors import VlmError
from connectors.init import Draw, linear
from connectors.norms import make_norm, require_eps
from connectors.pixel_shuffle import PixelShuffle
from connectors.tokens import PackedTokens, TokenSpec, VisualTokens

__all__ = ["PatchMerger"]


@register_connector("patch_merger")
class PatchMerger(Connector):
    """Normalise each token, fold blocks into one token each, and map them by two layers.

    Tokens come row by row; transformers' Qwen encoders give them block by block.

    Args:
        in_dim: D, width of the tokens that come in.
        out_dim: width of the tokens that go out.
        factor: side of the block, tokens.
        norm: a key of `NORMS`: "layer" as Qwen2-VL, "rms" as Qwen2.5-VL.
        eps: added under the root of the norm.
        norm_after: whether the norm is over the folded token, as in Qwen3-VL's deepstack.
        on_odd: what is done with a grid that the blocks do not divide, one of `ON_ODD`;
            "pad" fills up behind the norm, with zeros that it does not see.

    Shape: (B, R*C, in_dim) -> (B, (R/factor)*(C/factor), out_dim); prefix dropped.

    Raises:
        VlmError: a width or the factor is not positive, eps is not, or the norm would see
            the zeros of "pad".
        UnknownNameError: the norm or on_odd is unknown.
    """

    source = "Qwen2-VL, https://arxiv.org/abs/2409.12191"
    used_by = "Qwen2-VL, Qwen2.5-VL (norm=rms) and Qwen3-VL (norm_after=true in its deepstack)"
    choose = "for encoders of native resolution, whose images give packed tokens of different grids"

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        factor: int = 2,
        norm: str = "layer",
        eps: float = 1e-6,
        *,
        norm_after: bool = False,
        on_odd: str = "error",
    ) -> None:
        super().__init__()
        require_positive("patch_merger", in_dim=in_dim, dim=out_dim, factor=factor)
        check_on_odd("patch_merger", on_odd)
        require_eps("patch_merger", eps)
        if norm_after and on_odd == "pad":
            raise VlmError(
                "'patch_merger' has on_odd=pad and norm_after=true, so the norm would see the zeros; "
                "use on_odd=crop or on_odd=resize"
            )
        self.in_dim, self.out_dim = in_dim, out_dim
        self.kind, self.eps, self.norm_after = norm, eps, norm_after
        width = in_dim * factor**2
        self.norm = make_norm("patch_merger", norm, width if norm_after else in_dim, eps)
        self.fold = PixelShuffle(factor, on_odd)
        self.layers = nn.Sequential(linear(width, width), nn.GELU(), linear(width, out_dim))
        self.reset_parameters()

    def init_weights(self, draw: Draw) -> None:
        """Start maps at N(0, 0.02) with zero biases, as transformers starts Qwen2-VL and its followers."""
        draw.modules(self, std=0.02)

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, R*C, in_dim) to (B, (R/factor)*(C/factor), out_dim)."""
        self.out_spec(visual.spec)
        folded = self.fold(VisualTokens(self._before(visual.tokens), visual.grid))
        return VisualTokens(self._behind(folded.tokens), folded.grid)

    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        """Map (M, in_dim) to (M', out_dim) at once."""
        self.require_dim(TokenSpec(1, packed.tokens.shape[1]), self.in_dim)
        folded = self.fold.forward_packed(packed.with_tokens(self._before(packed.tokens)))
        return folded.with_tokens(self._behind(folded.tokens))

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Shrink the grid, change the width."""
        self.require_dim(spec, self.in_dim)
        folded = self.fold.out_spec(spec)
        return TokenSpec(folded.num_tokens, self.out_dim, folded.grid)

    @classmethod
    def build(
        cls,
        in_spec: TokenSpec,
        out_dim: int,
        *,
        factor: int = 2,
        norm: str = "layer",
        eps: float = 1e-6,
        norm_after: bool = False,
        on_odd: str = "error",
        dim: int | None = None,
    ) -> Self:
        """Make the merger from the encoder's width to `dim`, by default `out_dim`."""
        width = out_dim if dim is None else dim
        return cls(in_spec.dim, width, factor, norm, eps, norm_after=norm_after, on_odd=on_odd)

    def options(self) -> dict[str, Option]:
        """Give all options."""
        return {
            "factor": self.fold.factor,
            "norm": self.kind,
            "eps": self.eps,
            "norm_after": self.norm_after,
            "on_odd": self.fold.on_odd,
            "dim": self.out_dim,
        }

    def _before(self, tokens: Tensor) -> Tensor:
        out: Tensor = tokens if self.norm_after else self.norm(tokens)
        return out

    def _behind(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.layers(self.norm(tokens) if self.norm_after else tokens)
        return out
