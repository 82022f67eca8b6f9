"""A norm as a link of its own.

Source: Ba et al., https://arxiv.org/abs/1607.06450; Zhang and Sennrich,
https://arxiv.org/abs/1910.07467; Gemma, https://arxiv.org/abs/2403.08295.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor

from connectors.base import Option, register_connector, require_positive
from connectors.kinds import TokenWise
from connectors.norms import NORMS, make_norm
from connectors.tokens import TokenSpec

__all__ = ["Norm"]


@register_connector("norm")
class Norm(TokenWise):
    """Normalise each token over its width, prefix tokens too.

    Args:
        dim: D, width of the tokens.
        kind: "layer", "rms", or "gemma" (RMS, scaled by one plus the weight).
        eps: added under the root; None for the kind's usual one.

    Shape: (B, N, dim) -> (B, N, dim); grid kept, prefix normalised.

    Raises:
        VlmError: dim is not positive, or eps not a positive number.
        UnknownNameError: there is no such kind.
    """

    maps_prefix = True
    source = "Ba et al., https://arxiv.org/abs/1607.06450"
    used_by = "InternVL, Qwen2-VL, Gemma 3 and BLIP-2, between encoder and connector"
    choose = "in front of the first map where an encoder gives tokens of large or uneven size"

    def __init__(self, dim: int, kind: str = "layer", eps: float | None = None) -> None:
        super().__init__()
        require_positive("norm", dim=dim)
        self.in_dim = self.out_dim = dim
        self.norm = make_norm("norm", kind, dim, eps)
        self.kind, self.eps = kind, NORMS[kind][1] if eps is None else eps

    def change(self, tokens: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim)."""
        out: Tensor = self.norm(tokens)
        return out

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, *, kind: str = "layer", eps: float | None = None) -> Self:
        """Make the norm for the width that comes in."""
        return cls(in_spec.dim, kind, eps)

    def options(self) -> dict[str, Option]:
        """Give the kind, and eps where it is not the kind's usual one."""
        usual = NORMS[self.kind][1]
        return {"kind": self.kind} if self.eps == usual else {"kind": self.kind, "eps": self.eps}
