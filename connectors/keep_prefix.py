"""Keep the prefix tokens: let the language model see CLS and registers.

Source: BLIP-2, https://arxiv.org/abs/2301.12597, whose Q-Former reads CLS with the patches.
"""

from __future__ import annotations

from typing import Self

import torch

from connectors.base import Connector, Option, register_connector
from connectors.errors import TokenShapeError
from connectors.tokens import TokenSpec, VisualTokens

__all__ = ["KeepPrefix"]


@register_connector("keep_prefix")
class KeepPrefix(Connector):
    """Move the prefix tokens in front of the patch tokens.

    What comes out has no grid, so spatial connectors stand before it. As the
    first link it gives a resampler what BLIP-2 gave its Q-Former.

    Shape: (B, N, D) with prefix (B, P, D) -> (B, P+N, D) without grid.
    """

    source = "BLIP-2, https://arxiv.org/abs/2301.12597"
    used_by = "BLIP-2 and InstructBLIP, in front of the Q-Former"
    choose = "where CLS or registers hold what the question needs, the whole image at a glance for one"

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Join (B, P, D) and (B, N, D) to (B, P+N, D)."""
        self.out_spec(visual.spec)
        parts = [visual.tokens] if visual.prefix is None else [visual.prefix, visual.tokens]
        return VisualTokens(torch.cat(parts, dim=1))

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """Count the prefix among the tokens.

        Raises:
            TokenShapeError: there is no prefix.
        """
        if spec.num_prefix == 0:
            raise TokenShapeError(
                "'keep_prefix' needs prefix tokens, but this encoder has none, or a link before dropped them; "
                "leave keep_prefix out, or move it forward"
            )
        return TokenSpec(spec.num_prefix + spec.num_tokens, spec.dim)

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int) -> Self:
        """Make the link; it has no options."""
        return cls()

    def options(self) -> dict[str, Option]:
        """Give none."""
        return {}
