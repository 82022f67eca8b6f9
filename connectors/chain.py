"""Connectors one after another, as one connector."""

from __future__ import annotations

from typing import Any, Self, cast

from torch import nn

from connectors.base import Connector, Option
from connectors.errors import VlmError
from connectors.init import Draw
from connectors.tokens import PackedTokens, TokenSpec, VisualTokens

__all__ = ["Chain", "Wrapper"]

_SEED_STEP = 1_000_003


class Chain(Connector):
    """Connectors one after another.

    Args:
        *links: at least one connector; nested chains are joined. The newline that one of them
            has is the chain's.

    Shape: as the links, in order.

    Raises:
        VlmError: there is no link, or two of them have a newline.
    """

    def __init__(self, *links: Connector) -> None:
        super().__init__()
        if not links:
            raise VlmError("a chain needs at least one connector; 'linear' is the smallest")
        for link in links:
            if not isinstance(link, Connector):
                raise VlmError(f"a chain is made of connectors, got {type(link).__name__}; subclass Connector for it")
        flat: list[Connector] = []
        for link in links:
            flat.extend(link.connectors if isinstance(link, Chain) else [link])
        self.links = nn.ModuleList(flat)
        self.extra_inputs = tuple(dict.fromkeys(name for link in flat for name in link.extra_inputs))
        newlines = {id(link.newline): link.newline for link in links if link.newline is not None}
        if len(newlines) > 1:
            raise VlmError(f"{len(newlines)} links have a newline, a chain has one; set it to None on the others")
        self.newline = next(iter(newlines.values()), None)

    @property
    def connectors(self) -> list[Connector]:
        """The links, typed; one that was wrapped in place, by a compiler or an adapter, is among them."""
        return [cast("Connector", link) for link in self.links]

    def forward(self, visual: VisualTokens, **extra: Any) -> VisualTokens:
        """Apply each link in turn; `extra` goes to the links that name it in `extra_inputs`.

        Raises:
            VlmError: no link takes an extra input.
        """
        if not isinstance(visual, VisualTokens):
            raise VlmError(f"a chain takes VisualTokens(tokens, grid), got {type(visual).__name__}; wrap the tokens")
        if unknown := extra.keys() - set(self.extra_inputs):
            known = ", ".join(self.extra_inputs) or "none"
            raise VlmError(f"no link takes the input '{min(unknown)}'; this chain takes beside the tokens: {known}")
        for link in self.connectors:
            visual = link(visual, **{name: extra[name] for name in link.extra_inputs if name in extra})
        return visual

    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        """Apply each link's packed path in turn."""
        if not isinstance(packed, PackedTokens):
            raise VlmError(f"forward_packed takes PackedTokens(tokens, grids), got {type(packed).__name__}")
        for link in self.connectors:
            packed = link.forward_packed(packed)
        return packed

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """State the shape after the last link."""
        for link in self.connectors:
            spec = link.out_spec(spec)
        return spec

    def reset_parameters(self, seed: int = 0) -> None:
        """Draw the initial weights of each link again, from seeds far enough apart that no two links start alike."""
        for index, link in enumerate(self.connectors):
            link.reset_parameters(seed + _SEED_STEP * index)

    def init_weights(self, draw: Draw) -> None:
        """Let each link draw its own, in order."""
        for link in self.connectors:
            link.init_weights(draw)

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, *args: Any, **options: Any) -> Self:
        """Refuse: a chain is made of links, or by `build_connector` from a recipe."""
        raise VlmError("a chain has no options of its own; pass links to Chain, or a recipe to build_connector")

    def options(self) -> dict[str, Option]:
        """Give none: each link has its own."""
        return {}


class Wrapper(Connector):
    """A connector around a chain of its own: in a recipe, `name:options(recipe)`.

    Its `build` takes the chain as the keyword `inner`, which `options` leaves out.

    Args:
        inner: the chain.
    """

    def __init__(self, inner: Chain) -> None:
        super().__init__()
        self.inner = inner
        self.extra_inputs = inner.extra_inputs

    def init_weights(self, draw: Draw) -> None:
        """Let the inner chain draw its own."""
        self.inner.init_weights(draw)

    @classmethod
    def inner_dim(cls, in_spec: TokenSpec, out_dim: int) -> int:
        """Give the width that links of the inner chain take for the LLM's, by default that of the tokens."""
        return in_spec.dim
