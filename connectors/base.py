"""What a connector is, and how one is registered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint
from typing import Any, ClassVar, Self, TypeAlias, TypeVar

import torch
from torch import nn

from connectors.errors import TokenShapeError, VlmError
from connectors.init import Draw, is_drawing
from connectors.registry import Registry
from connectors.tokens import Grid, PackedTokens, TokenSpec, VisualTokens
from connectors.tree import register_visual_tokens

__all__ = ["CONNECTORS", "Connector", "Numbers", "Option", "list_connectors", "register_connector", "require_positive"]


class Numbers(tuple[int, ...]):
    """Whole numbers that a recipe writes with slashes: `levels=1/2/4`; one alone is written plain."""

    __slots__ = ()

    def __new__(cls, values: int | Iterable[int] = ()) -> Self:
        """Take one number or several."""
        return super().__new__(cls, (values,) if isinstance(values, int) else values)

    def __str__(self) -> str:
        """Write them as a recipe does."""
        return "/".join(map(str, self))


Option: TypeAlias = int | float | bool | str | Grid | Numbers
"""A value that a recipe can write: `factor=2`, `activation=gelu`, `grid=8x8`, `levels=1/2/4`."""

C = TypeVar("C", bound="type[Connector]")

register_visual_tokens()


class Connector(nn.Module, ABC):
    """A part between encoder and LLM: visual tokens in, visual tokens out.

    A connector states its output shape without computing (`out_spec`), and its
    `forward` is held to that by `connectors.testing.check_connector`. Connectors
    that keep the width hand prefix tokens on; the others drop them, so that
    `keep_prefix` decides in one place whether the LLM sees them.
    """

    name: ClassVar[str] = ""
    """The registered name, set by `register_connector`."""

    source: ClassVar[str] = ""
    """The paper, with its address."""

    used_by: ClassVar[str] = ""
    """Released models that have it, as words for a table."""

    choose: ClassVar[str] = ""
    """When to choose it, in a sentence."""

    extra_inputs: tuple[str, ...] = ()
    """Keywords of `forward` beside the tokens; a chain hands them on."""

    newline: nn.Parameter | None
    """The learned vector (H,) at row ends, which a layout of tiles places and no `forward` reads; None without one."""

    def __init__(self) -> None:
        super().__init__()
        # Registered here, so that it is trained, moved and saved with the connector.
        self.register_parameter("newline", None)

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

    def reset_parameters(self, seed: int = 0) -> None:
        """Draw the initial weights again; the global generator is neither read nor moved."""
        if is_drawing():
            self.init_weights(Draw(seed))

    def init_weights(self, draw: Draw) -> None:
        """Draw every parameter in place; a connector with parameters of its own says how.

        By default linear maps and convolutions start as PyTorch starts them.
        """
        draw.modules(self)

    def forward_packed(self, packed: PackedTokens) -> PackedTokens:
        """Map packed tokens, by default the images of one grid together; the prefix as `forward` does.

        Raises:
            TokenShapeError: the connector cannot take tokens of one of the grids.
        """
        images = packed.split()
        places: dict[TokenSpec, list[int]] = {}
        for index, spec in enumerate(packed.specs):
            places.setdefault(spec, []).append(index)
        found: dict[int, VisualTokens] = {}
        for spec, indices in places.items():
            tokens = torch.cat([images[index].tokens for index in indices])
            prefix = None if packed.prefix is None else packed.prefix[indices]
            out = PackedTokens.join([self(VisualTokens(tokens, spec.grid, prefix))])
            found |= dict(zip(indices, out.split(), strict=True))
        return PackedTokens.join([found[index] for index in range(len(images))])

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
        "c_abstractor": "connectors.c_abstractor",
        "conv": "connectors.conv",
        "flamingo": "connectors.flamingo",
        "gated_mlp": "connectors.gated_mlp",
        "instruct_qformer": "connectors.instruct_qformer",
        "keep_prefix": "connectors.keep_prefix",
        "ldp": "connectors.ldp",
        "ldp_v2": "connectors.ldp",
        "linear": "connectors.linear",
        "matryoshka": "connectors.matryoshka",
        "max_pool": "connectors.pooling",
        "mlp": "connectors.mlp",
        "norm": "connectors.norm",
        "patch_merger": "connectors.patch_merger",
        "perceiver": "connectors.perceiver",
        "pixel_shuffle": "connectors.pixel_shuffle",
        "pooled_projector": "connectors.pooled_projector",
        "position": "connectors.position",
        "qformer": "connectors.qformer",
        "residual": "connectors.residual",
        "resize": "connectors.resize",
        "sva": "connectors.sva",
        "token_packer": "connectors.token_packer",
        "tome": "connectors.tome",
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
