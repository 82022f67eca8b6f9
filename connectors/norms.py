"""Norms over the width of a token.

Source: Ba et al., https://arxiv.org/abs/1607.06450; Zhang and Sennrich,
https://arxiv.org/abs/1910.07467; Gemma, https://arxiv.org/abs/2403.08295.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from connectors.errors import UnknownNameError, VlmError
from connectors.registry import nearest

__all__ = ["NORMS", "GemmaNorm", "LayerNorm2d", "RMSNorm", "make_norm", "require_eps"]


class RMSNorm(nn.Module):
    """Normalise by the root mean square, in fp32.

    The square of a large fp16 value is infinite, so the norm is taken in fp32 and
    rounded to the input's dtype before the weight, as `Idefics2RMSNorm` does.

    Args:
        dim: D, width of a token.
        eps: added to the mean square.

    Shape: (B, N, D) -> (B, N, D).
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map each token alone."""
        out: Tensor = self.weight * _by_root_mean_square(tokens, self.eps).to(tokens.dtype)
        return out

    def reset_parameters(self) -> None:
        """Start at one."""
        nn.init.ones_(self.weight)


class GemmaNorm(nn.Module):
    """Normalise by the root mean square and scale by one plus the weight, all in fp32.

    Args:
        dim: D, width of a token.
        eps: added to the mean square.

    Shape: (B, N, D) -> (B, N, D).
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map each token alone."""
        normed = _by_root_mean_square(tokens, self.eps)
        return (normed * (1.0 + self.weight.to(normed.dtype))).to(tokens.dtype)

    def reset_parameters(self) -> None:
        """Start at zero, which scales by one."""
        nn.init.zeros_(self.weight)


def _by_root_mean_square(tokens: Tensor, eps: float) -> Tensor:
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the width of each place of a feature map (B, D, R, C)."""

    def forward(self, feature_map: Tensor) -> Tensor:
        """Map (B, D, R, C) to (B, D, R, C)."""
        return super().forward(feature_map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS: dict[str, tuple[Callable[[int, float], nn.Module], float]] = {
    "layer": (nn.LayerNorm, 1e-5),
    "rms": (RMSNorm, 1e-6),
    "gemma": (GemmaNorm, 1e-6),
}
"""Kinds of norm by the word that recipes use, each with its usual eps."""


def make_norm(name: str, kind: str, dim: int, eps: float | None = None) -> nn.Module:
    """Make a norm of one of the `NORMS`.

    Args:
        name: the connector, for the message.
        kind: a key of `NORMS`.
        dim: D, width of a token.
        eps: None for the kind's usual one.

    Raises:
        UnknownNameError: there is no such kind.
        VlmError: eps is not a positive number.
    """
    if not isinstance(kind, str) or kind not in NORMS:
        raise UnknownNameError(f"'{name}' has no norm '{kind}'; {nearest(str(kind), list(NORMS))}")
    make, usual = NORMS[kind]
    if eps is not None:
        require_eps(name, eps)
    return make(dim, usual if eps is None else eps)


def require_eps(name: str, eps: float) -> None:
    """Refuse a number that is not positive and finite to add under a root.

    Args:
        name: the connector, for the message.
        eps: the number.

    Raises:
        VlmError: it is not.
    """
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
        raise VlmError(f"'{name}' has eps={eps}; give a small positive number such as 1e-6")
