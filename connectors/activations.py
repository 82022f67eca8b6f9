"""Activations by the word that recipes use, and the gate that keeps its product in range.

Source: Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415 (GELU); Shazeer,
https://arxiv.org/abs/2002.05202 (gated maps).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from connectors.errors import UnknownNameError
from connectors.registry import nearest

__all__ = ["ACTIVATIONS", "QuickGELU", "gated", "make_activation", "saturate"]


class QuickGELU(nn.Module):
    """Give the sigmoid approximation of GELU that CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Map each value alone."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


def make_activation(name: str, activation: str) -> nn.Module:
    """Make one of the `ACTIVATIONS`.

    Args:
        name: the connector, for the message.
        activation: a key of `ACTIVATIONS`.

    Raises:
        UnknownNameError: there is no such activation.
    """
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        found = nearest(str(activation), list(ACTIVATIONS))
        raise UnknownNameError(f"'{name}' has no activation '{activation}'; {found}")
    return ACTIVATIONS[activation]()


def gated(gate: Tensor, value: Tensor) -> Tensor:
    """Multiply two tensors value by value; in fp16 the product saturates instead of becoming infinite.

    Two values of 256 already pass the end of fp16, 65504, and encoders give larger ones;
    one infinity makes NaN of the whole token in the next map.
    """
    if gate.dtype is not torch.float16:
        return gate * value
    # fp32 holds the product of two fp16 values exactly, so that all others round as in fp16.
    return saturate(gate.float() * value.float())


def saturate(tensor: Tensor) -> Tensor:
    """Round to fp16, or leave in fp16, with infinities at its largest number, 65504; all others are as they were."""
    limit = torch.finfo(torch.float16).max
    return tensor.clamp(-limit, limit).to(torch.float16)
