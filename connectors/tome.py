"""Token merging: tokens that are alike become their mean.

Source: Token Merging (ToMe), https://arxiv.org/abs/2210.09461, section 3, with the tokens
themselves for its attention keys, which a connector does not see.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from connectors.base import Connector, Option, register_connector, require_positive
from connectors.errors import TokenShapeError
from connectors.tokens import TokenSpec, VisualTokens

__all__ = ["TokenMerging", "merge_once"]


@register_connector("tome")
class TokenMerging(Connector):
    """Merge the tokens of each view that are most alike until `tokens` are left.

    In rounds: every second token looks for the one of the others that points most nearly
    its way, and the pairs that are most alike become one, the mean of all tokens that went
    into them. A round merges at most half of the tokens, so 576 become 64 in four. Of equal
    similarities the one that stands first counts.

    Args:
        tokens: number of tokens that go out, at most those that come in.

    Shape: (B, N, D) -> (B, tokens, D) without grid, in the order of the places of those
    that others were merged into; prefix kept, never merged.

    Raises:
        VlmError: tokens is not positive.
    """

    source = "ToMe, https://arxiv.org/abs/2210.09461"
    used_by = "encoders sped up by ToMe; behind an encoder as here in no model that we know"
    choose = "for any number of tokens without a parameter, where large plain areas may cost little"

    def __init__(self, tokens: int = 64) -> None:
        super().__init__()
        require_positive("tome", tokens=tokens)
        self.tokens = tokens

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, N, D) to (B, tokens, D)."""
        self.out_spec(visual.spec)
        left = visual.tokens.shape[1]
        if left == self.tokens:
            return VisualTokens(visual.tokens, None, visual.prefix)
        with _exact(visual.tokens.device.type):
            tokens = visual.tokens.to(torch.promote_types(visual.tokens.dtype, torch.float32))
            sizes = tokens.new_ones(tokens.shape[:2])
            while left > self.tokens:
                merged = min(left - self.tokens, left // 2)
                tokens, sizes = merge_once(tokens, sizes, merged)
                left -= merged
        return VisualTokens(tokens.to(visual.tokens.dtype), None, visual.prefix)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Give the number of tokens, without grid.

        Raises:
            TokenShapeError: there are fewer.
        """
        if spec.num_tokens < self.tokens:
            raise TokenShapeError(
                f"'tome' merges to {self.tokens} tokens, only {spec.num_tokens} come in; "
                f"use at most tokens={spec.num_tokens}, or a larger image"
            )
        return TokenSpec(self.tokens, spec.dim, None, spec.num_prefix)

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, *, tokens: int = 64) -> Self:
        """Make the merging; it fits every width."""
        return cls(tokens)

    def options(self) -> dict[str, Option]:
        """Give the number of tokens."""
        return {"tokens": self.tokens}


def merge_once(tokens: Tensor, sizes: Tensor, merged: int) -> tuple[Tensor, Tensor]:
    """Merge the `merged` most alike of the even tokens into odd ones, by size-weighted mean.

    Args:
        tokens: (B, N, D) in fp32 or fp64.
        sizes: (B, N), how many tokens went into each.
        merged: at most N // 2.

    Returns:
        (B, N - merged, D) and their sizes, in the order of places.
    """
    number = tokens.shape[1]
    target, gone = _pairs(tokens.detach(), merged)
    index = (~gone).cumsum(1) - 1
    index = torch.where(gone, index.gather(1, target), index)
    places = torch.arange(number - merged, device=tokens.device)
    # A product with what goes where, not a scatter: its sums run in one order on every device.
    weights = torch.where(index[:, None] == places[:, None], sizes[:, None], 0.0)
    sums = weights.sum(-1)
    return (weights / sums[..., None]) @ tokens, sums


def _pairs(tokens: Tensor, merged: int) -> tuple[Tensor, Tensor]:
    """Give for each token where it would go, (B, N), and whether it does, (B, N) with `merged` true a row."""
    number = tokens.shape[1]
    directions = F.normalize(tokens, dim=-1)
    alike, nearest = (directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)).max(-1)
    order = alike.sort(dim=-1, descending=True, stable=True).indices
    first = order.argsort(dim=-1) < merged
    target, gone = (each.repeat_interleave(2, dim=1)[:, :number] for each in (2 * nearest + 1, first))
    even = torch.arange(number, device=tokens.device) % 2 == 0
    return target, gone & even


def _exact(device: str) -> AbstractContextManager[object]:
    """Hold autocast off: similarities rounded to half precision would be equal by the dozen."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
