"""What a connector is, how connectors chain, and how one is registered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any, ClassVar, Self, TypeAlias, TypeVar

import torch
from torch import nn

from connectors.errors import TokenShapeError, VlmError
from connectors.registry import Registry
from connectors.tokens import Grid, PackedTokens, TokenSpec, VisualTokens

__all__ = ["CONNECTORS", "Chain", "Connector", "Option", "list_connectors", "register_connector"]

Option: TypeAlias = int | float | bool | str | Grid
"""A value that a recipe can write: `factor=2`, `activation=gelu`, `grid=8x8`."""

C = TypeVar("C", bound="type[Connector]")


class Connector(nn.Module, ABC):
    """A part between encoder and LLM: visual tokens in, visual tokens out.

    A connector states its output shape without computing (`out_spec`), and its
    `forward` is held to that by `connectors.testing.check_connector`. Connectors
    that keep the width hand prefix tokens on; the others drop them, so that
    `keep_prefix` decides in one place whether the LLM sees them.
    """

    name: ClassVar[str] = ""
    """The registered name, set by `register_connector`."""

    @abstractmethod
    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Map (B, N, D) tokens to the tokens that `out_spec` states."""

    @abstractmethod
    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """State the shape that comes out for `spec`, without computing.

        Raises:
            TokenShapeError: the connector cannot take such tokens.
        """

    @classmethod
    @abstractmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, **options: Any) -> Self:
        """Make the connector for tokens of `in_spec` and an LLM of width `out_dim`.

        Subclasses name their options; the options are what a recipe can say.
        An option that defaults to None means `out_dim`.
        """

    @abstractmethod
    def options(self) -> dict[str, Option]:
        """Give the options from which `build` makes this connector again."""

    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        """Map packed tokens, by default the images of one grid together.

        Raises:
            TokenShapeError: tokens come out without a grid and so cannot be packed.
        """
        images = packed.split()
        places: dict[Grid, list[int]] = {}
        for index, grid in enumerate(packed.grids):
            places.setdefault(grid, []).append(index)
        outputs: list[torch.Tensor] = [packed.tokens] * len(images)
        grids: list[Grid] = list(packed.grids)
        for grid, indices in places.items():
            batch = torch.cat([images[index].tokens for index in indices])
            result = self(VisualTokens(batch, grid))
            # Queries have no place in the image: a pack holds them as one row each.
            out_grid = result.grid or (1, result.tokens.shape[1])
            for row, index in enumerate(indices):
                outputs[index] = result.tokens[row]
                grids[index] = out_grid
        return PackedTokens(torch.cat(outputs), grids)

    def require_dim(self, spec: TokenSpec, dim: int) -> None:
        """Refuse tokens whose width is not the one that this connector was built for.

        Raises:
            TokenShapeError: the widths differ.
        """
        if spec.dim != dim:
            label = self.name or type(self).__name__
            raise TokenShapeError(
                f"'{label}' was built for tokens of width {dim}, got width {spec.dim}; "
                "build it from the encoder's token_spec"
            )


class Chain(Connector):
    """Connectors one after another.

    Args:
        *links: at least one connector; nested chains are joined.

    Shape: as the links, in order.

    Raises:
        VlmError: there is no link.
    """

    def __init__(self, *links: Connector) -> None:
        super().__init__()
        if not links:
            raise VlmError("a chain needs at least one connector; 'linear' is the smallest")
        flat: list[Connector] = []
        for link in links:
            flat.extend(link.connectors if isinstance(link, Chain) else [link])
        self.links = nn.ModuleList(flat)

    @property
    def connectors(self) -> list[Connector]:
        """The links, typed."""
        return [link for link in self.links if isinstance(link, Connector)]

    def forward(self, visual: VisualTokens) -> VisualTokens:
        """Apply each link in turn."""
        for link in self.links:
            visual = link(visual)
        return visual

    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        """Apply each link's packed path in turn."""
        for link in self.connectors:
            packed = link.forward_packed(packed)
        return packed

    def out_spec(self, spec: TokenSpec) -> TokenSpec:
        """State the shape after the last link."""
        for link in self.connectors:
            spec = link.out_spec(spec)
        return spec

    @classmethod
    def build(cls, in_spec: TokenSpec, out_dim: int, **options: Any) -> Self:
        """Refuse: a chain is made of links, or by `build_connector` from a recipe."""
        raise VlmError("a chain has no options of its own; pass links to Chain, or a recipe to build_connector")

    def options(self) -> dict[str, Option]:
        """Give none: each link has its own."""
        return {}


def _accept(point: EntryPoint, loaded: object) -> list[tuple[str, type[Connector]]]:
    if not (isinstance(loaded, type) and issubclass(loaded, Connector)):
        raise VlmError(f"entry point {point.name} = {point.value} is not a Connector class; name the class itself")
    loaded.name = loaded.name or point.name
    return [(loaded.name, loaded)]


CONNECTORS: Registry[type[Connector]] = Registry(
    kind="connector",
    group="vlm_encoders.connectors",
    builtin={
        "avg_pool": "connectors.pooling",
        "keep_prefix": "connectors.keep_prefix",
        "linear": "connectors.linear",
        "mlp": "connectors.mlp",
        "perceiver": "connectors.perceiver",
        "pixel_shuffle": "connectors.pixel_shuffle",
        "qformer": "connectors.qformer",
    },
    accept=_accept,
)


def register_connector(name: str) -> Callable[[C], C]:
    """Register a connector class under an exact recipe name.

    Raises:
        DuplicateNameError: the name is taken.
    """

    def decorate(cls: C) -> C:
        CONNECTORS.register(name, cls, cls.__module__)
        cls.name = name
        return cls

    return decorate


def list_connectors(pattern: str = "*") -> list[str]:
    """List the connector names that match a shell pattern, plugins included."""
    return CONNECTORS.names(pattern)
