"""Nested token counts: one model, and how many tokens an image costs is chosen when it runs.

Source: Matryoshka Multimodal Models (M3), https://arxiv.org/abs/2405.17430, section 3.1,
pools the grid behind the projector; Matryoshka Query Transformer (MQT),
https://arxiv.org/abs/2405.19315, section 3.2, keeps the first queries.
"""

from __future__ import annotations

from typing import Self

from torch import nn

from connectors.base import Connector, Numbers, Option, register_connector, require_positive
from connectors.blocks import check_on_odd
from connectors.errors import TokenShapeError, VlmError
from connectors.pooling import AvgPool
from connectors.tokens import PackedTokens, TokenSpec, VisualTokens

__all__ = ["Matryoshka", "choose_level"]

_LEVELS = Numbers((1, 2, 4))


@register_connector("matryoshka")
class Matryoshka(Connector):
    """Average blocks of the grid, or keep the first queries, by a level chosen at run time.

    Level L averages blocks of L x L tokens, M3's nested sets; of tokens without a grid it
    keeps the first N/L, MQT's. Level 1 keeps every token. M3 is
    `mlp+matryoshka:levels=1/2/4/8/24` on a 24x24 grid. MQT's queries do not see each other,
    which makes its first ones the same whatever follows; behind a resampler whose queries
    do, those that are left out still shaped the others.

    A training loop chooses: M3 runs every level of each batch and averages the losses, MQT
    draws one a step. No forward draws, because the placeholders of a batch are counted
    before it runs, by workers that would not see the draw. Choose, then make the processor
    and its loader anew: both count when they are made.

    The level is no weight: a state dict and a recipe do not hold it, and a new link stands
    at the first of its levels.

    Args:
        levels: what can be chosen, each at least 1, the default first.
        on_odd: what is done where a level does not divide the grid, one of `ON_ODD`: "pad"
            averages what is there of the last blocks; the number of queries is rounded up
            by "pad", down by "crop", to the nearest by "resize".

    Shape: (B, R*C, D) -> (B, (R/L)*(C/L), D); without grid (B, N, D) -> (B, N/L, D); prefix kept.

    Raises:
        VlmError: there is no level, one is not positive, or one stands twice.
        UnknownNameError: on_odd is another word.
    """

    source = "M3, https://arxiv.org/abs/2405.17430; MQT, https://arxiv.org/abs/2405.19315"
    used_by = "LLaVA-1.5-M3 and LLaVA-NeXT-M3; MQT-LLaVA"
    choose = "where one model must serve several token budgets"

    def __init__(self, levels: Numbers | int = _LEVELS, on_odd: str = "error") -> None:
        super().__init__()
        self.levels = Numbers(levels)
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise VlmError(f"'matryoshka' has levels={self.levels}; give each level once, for example levels=1/2/4")
        for level in self.levels:
            require_positive("matryoshka", levels=level)
        check_on_odd("matryoshka", on_odd)
        self.on_odd = on_odd
        # They hold no weights, so a plain dict does.
        self._pools = {level: AvgPool(level, on_odd=on_odd) for level in self.levels}
        self.level = self.levels[0]

    def choose_level(self, level: int) -> None:
        """Set the level that `out_spec` and `forward` follow from now on.

        Raises:
            VlmError: the level is not one of those that can be chosen.
        """
        if level not in self.levels:
            known = ", ".join(map(str, self.levels))
            raise VlmError(f"'matryoshka' has no level {level}; choose one of {known}, or build it with that level")
        self.level = level

    def counts(self, spec: TokenSpec) -> dict[int, int]:
        """Give the tokens that each level leaves of `spec`, the prefix not counted.

        Raises:
            TokenShapeError: a level cannot take such tokens.
        """
        return {level: self._out_spec(spec, level).num_tokens for level in self.levels}

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, R*C, D) to (B, (R/L)*(C/L), D), or (B, N, D) to (B, N/L, D)."""
        out = self.out_spec(visual.spec)
        if out.grid is None:
            return VisualTokens(visual.tokens[:, : out.num_tokens], None, visual.prefix)
        if self.level == 1:
            return visual
        pooled: VisualTokens = self._pools[self.level](visual)
        return pooled

    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        """Map (M, D) to (M/L**2, D), or (M/L, D) where images are queries."""
        if self.level == 1:
            return packed
        if None in packed.grids:
            return super().forward_packed(packed)
        return self._pools[self.level].forward_packed(packed)

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """State the shape at the level that is chosen.

        Raises:
            TokenShapeError: the level does not divide the grid or the queries, and on_odd
                is "error".
        """
        return self._out_spec(spec, self.level)

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, *, levels: Numbers = _LEVELS, on_odd: str = "error") -> Self:
        """Make the link for tokens on a grid or for queries; it fits every width."""
        link = cls(levels, on_odd)
        # A level that cannot take the tokens is told now, not when it is chosen.
        link.counts(in_spec)
        return link

    def options(self) -> dict[str, Option]:
        """Give the levels and on_odd; which level is chosen is no option."""
        return {"levels": self.levels, "on_odd": self.on_odd}

    def _out_spec(self, spec: TokenSpec, level: int) -> TokenSpec:
        if spec.grid is None:
            return TokenSpec(self._kept(spec.num_tokens, level), spec.dim, None, spec.num_prefix)
        return self._pools[level].out_spec(spec)

    def _kept(self, number: int, level: int) -> int:
        ways = {
            "pad": -(-number // level),
            "crop": number // level,
            "resize": max(1, (2 * number + level) // (2 * level)),
        }
        kept = number // level if number % level == 0 else ways.get(self.on_odd, 0)
        if kept == 0:
            told = ", ".join(f"on_odd={way} keeps {count or 'none'}" for way, count in ways.items())
            raise TokenShapeError(
                f"level {level} does not divide {number} queries; {told}, or choose another number of queries"
            )
        return kept


def choose_level(model: nn.Module, level: int) -> None:
    """Choose a level for every `Matryoshka` in a chain or a whole model, or for none of them.

    Args:
        model: a connector, or a model that holds one.
        level: one of the link's levels.

    Raises:
        VlmError: there is no such link, or one of them does not have the level.
    """
    links = [module for module in model.modules() if isinstance(module, Matryoshka)]
    if not links:
        raise VlmError(
            f"there is no matryoshka link to set to level {level}; add one to the recipe, for example mlp+matryoshka"
        )
    # One that refuses comes first, so that none is changed then.
    for link in sorted(links, key=lambda link: level in link.levels):
        link.choose_level(level)
