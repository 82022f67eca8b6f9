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

__all__ = ["CONNECTORS", "Chain", "Connector", "Option", "list_connectors", "register_connector", "require_positive"]

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

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Keep a subclass of a registered connector from passing for its parent."""
        super().__init_subclass__(**kwargs)
        cls.name = cls.__dict__.get("name", "")

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
    def build(cls, in_spec: TokenSpec, out_dim: int, *args: Any, **options: Any) -> Self:
        """Make the connector for tokens of `in_spec` and an LLM of width `out_dim`.

        Subclasses name their options, keyword only, in place of `*args` and
        `**options`; these are what a recipe can say. An option `dim` that
        defaults to None means `out_dim`.
        """

    @abstractmethod
    def options(self) -> dict[str, Option]:
        """Give the options from which `build` makes this connector again."""

    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        """Map packed tokens, by default the images of one grid together.

        What comes out without a grid is packed as one row, (1, N).

        Raises:
            TokenShapeError: the connector cannot take tokens of one of the grids.
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
    def build(cls, in_spec: TokenSpec, out_dim: int, *args: Any, **options: Any) -> Self:
        """Refuse: a chain is made of links, or by `build_connector` from a recipe."""
        raise VlmError("a chain has no options of its own; pass links to Chain, or a recipe to build_connector")

    def options(self) -> dict[str, Option]:
        """Give none: each link has its own."""
        return {}


def require_positive(name: str, **values: int) -> None:
    """Refuse options that are not whole numbers of at least 1.

    Args:
        name: the connector, for the message.
        **values: the options.

    Raises:
        VlmError: a value is not a positive whole number.
    """
    for option, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise VlmError(f"'{name}' has {option}={value}; give a whole number of at least 1")


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
