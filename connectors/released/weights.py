"""What weights say of a connector, what they do not, and the chain that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from connectors.base import Option
from connectors.chain import Chain
from connectors.errors import VlmError
from connectors.recipe import build_connector
from connectors.released.hints import Hints
from connectors.tokens import TokenSpec

__all__ = ["Plan", "Weights", "link"]

# A grid that every layout's links take, with CLS; the weights depend on neither.
_SIDE, _PREFIX = 240, 1

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What the weights say: the chain to build.

    Attributes:
        recipe: of the chain.
        in_dim: D, width of the tokens that come in.
        out_dim: width of those that go out.
        newline: whether a newline vector came with the connector.
    """

    recipe: str
    in_dim: int
    out_dim: int
    newline: bool = False

    def build(self) -> Chain:
        """Build the chain without memory for its weights."""
        spec = TokenSpec(_SIDE**2, self.in_dim, (_SIDE, _SIDE), _PREFIX)
        with torch.device("meta"):
            chain = build_connector(self.recipe, spec, self.out_dim)
            if self.newline:
                chain.newline = nn.Parameter(torch.empty(self.out_dim))
        return chain


class Weights:
    """The shapes of a connector's tensors under a library's names, and what the weights do not tell.

    Args:
        layout: its name, for messages.
        shapes: by name, without the root.
        hints: what the weights do not tell.
        encoder_dim: of the checkpoint's encoder; None where the file holds the connector alone.
    """

    def __init__(self, layout: str, shapes: Mapping[str, Shape], hints: Hints, encoder_dim: int | None = None) -> None:
        self.layout = layout
        self.hints = hints
        self.shapes = dict(shapes)
        self.encoder_dim = encoder_dim

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str, dims: int = 2) -> Shape:
        """Give the shape of a tensor of `dims` dimensions.

        Raises:
            VlmError: there is none, it has another number of dimensions, or it is empty.
        """
        if name not in self.shapes:
            raise VlmError(f"layout '{self.layout}' needs '{name}', which is missing; load the whole file")
        shape = self.shapes[name]
        if len(shape) != dims:
            raise VlmError(f"'{name}' has shape {shape}, layout '{self.layout}' needs {dims} dimensions")
        if 0 in shape:
            raise VlmError(f"'{name}' has shape {shape} and is empty; gather the weights before they are saved")
        return shape

    def count(self, before: str, inside: str = "") -> int:
        """Count the numbers that stand behind `before` in names that have `inside` somewhere."""
        return len(self.numbers(before, inside))

    def numbers(self, before: str, inside: str = "") -> list[int]:
        """List the numbers that stand behind `before` in names that have `inside` somewhere."""
        behind = [name.removeprefix(before) for name in self.shapes if name.startswith(before) and inside in name]
        return sorted({int(number) for number in (rest.split(".")[0] for rest in behind) if number.isdigit()})

    def has_bias(self, *modules: str) -> bool:
        """Say whether a map has a bias; where one has, all must, which loading holds them to."""
        return any(f"{module}.bias" in self for module in modules)

    def is_gated(self, first: str, last: str) -> bool:
        """Say whether the map `last` takes half of what `first` gives: the other half is a gate."""
        return 2 * self.shape(f"{last}.weight")[1] == self.shape(f"{first}.weight")[0]

    def heads(self, name: str) -> tuple[int, int]:
        """Give the heads that were told and their width, of the rows of the queries' map `name`.

        Raises:
            VlmError: they were not told, or do not divide them.
        """
        wide, _ = self.shape(name)
        heads = self.hints.whole("heads")
        if heads < 1 or wide % heads:
            raise VlmError(f"heads={heads} contradicts the weights: they do not divide the {wide} rows of '{name}'")
        return heads, wide // heads

    def unfolded(self, wide: int, factor: int) -> int:
        """Give the width of the tokens that a fold of `factor` makes `wide`.

        Raises:
            VlmError: the factor contradicts the weights.
        """
        dim, rest = divmod(wide, factor**2) if factor > 0 else (0, 1)
        if rest or dim != (self.encoder_dim or dim or -1):
            has = "" if self.encoder_dim is None else f" and the encoder's {self.encoder_dim}"
            raise VlmError(
                f"factor={factor} contradicts the weights: folded tokens have width {wide}{has}, "
                "which must be the encoder's width times factor**2"
            )
        return dim


def link(name: str, **options: Option) -> str:
    """Write a link and its options as a recipe has them."""
    written = ",".join(f"{key}={_write(value)}" for key, value in options.items())
    return f"{name}:{written}" if written else name


def _write(value: Option) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value[0]}x{value[1]}" if isinstance(value, tuple) else str(value)
