"""What a layout is: the names of one library for one connector, and how a recipe follows from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from connectors.base import Option
from connectors.released.hints import Hint, Hints
from connectors.released.keys import Pair
from connectors.released.weights import Plan, Weights

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """The names of one library for one connector.

    Attributes:
        name: of the layout.
        source: the class or file that saves so.
        used_by: released models.
        roots: what may stand in front of every name; the first is how the library's files have it.
        parts: beginnings of names, behind the root, that are the connector's; one that does
            not end in a dot is a whole name.
        marks: names that are all there in such a file.
        pairs: their names and ours.
        plan: reads the recipe from the weights.
        hints: what the weights do not tell, by name.
        never: beginnings of names that are in no such file, the encoder's part included.
        fits: a last look, where two layouts have the same names.
        encoder: names of a tensor of the encoder whose first dimension is its width.
        constants: names that hold the numbers 0, 1, 2, ..., in a tensor (1, length), with the length.
        old_constants: the same in files of older versions of the library; checked and not written.
        prepare: drops what a hint says to leave out, before anything else is done.
    """

    name: str
    source: str
    used_by: str
    roots: tuple[str, ...]
    parts: tuple[str, ...]
    marks: tuple[str, ...]
    pairs: Sequence[Pair]
    plan: Callable[[Weights], Plan]
    hints: Mapping[str, Hint] = field(default_factory=dict)
    never: tuple[str, ...] = ()
    fits: Callable[[Weights], bool] | None = None
    encoder: tuple[str, ...] = ()
    constants: Mapping[str, int] = field(default_factory=dict)
    old_constants: Mapping[str, int] = field(default_factory=dict)
    prepare: Callable[[Mapping[str, Tensor], Hints], dict[str, Tensor]] | None = None

    def holds(self, name: str) -> bool:
        """Say whether a name, without its root, is the connector's."""
        return any(name.startswith(part) if part.endswith(".") else name == part for part in self.parts)

    def hinted(self, given: Mapping[str, Option]) -> Hints:
        """Give the hints, over the usual ones.

        Raises:
            VlmError: a value is of another kind than the usual one.
        """
        return Hints(self.name, self.hints, given)

    def plan_of(self, shapes: Mapping[str, tuple[int, ...]], hints: Hints, encoder_dim: int | None = None) -> Plan:
        """Read the chain from the shapes of the connector's tensors.

        Raises:
            VlmError: a tensor is missing or of another kind, or a hint is missing or contradicts.
        """
        return self.plan(Weights(self.name, shapes, hints, encoder_dim))
