"""What weights do not tell, and what was told of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from connectors.base import Option
from connectors.errors import VlmError

__all__ = ["Hint", "Hints"]


@dataclass(frozen=True)
class Hint:
    """Something that the weights do not tell.

    Attributes:
        link: the link whose option it is, by its label; "" for what a file may lack or is
            to be left out of it, which is True or False.
        usual: the value of the released models, or the one that is named when asking.
        asked: whether it must be given; else `usual` is taken.
    """

    link: str
    usual: Option
    asked: bool = False


def _need(name: str, value: Option, usual: Option) -> str | None:
    """Say what a hint must be that it is not."""
    # A text goes into the recipe, where a comma or a colon would begin another option.
    if isinstance(value, str) and not re.fullmatch(r"\w+", value):
        return "one word"
    if isinstance(value, tuple) and isinstance(usual, tuple):
        right = len(value) == len(usual) and all(type(each) is int and each > 0 for each in value)
        return None if right else f"{len(usual)} whole numbers of at least 1"
    if name == "eps" and isinstance(value, int | float) and not 0 < value < 1:
        return "a small number above 0"
    return None


class Hints:
    """The hints that were given, over the usual ones.

    Args:
        layout: whose hints they are, for messages.
        known: the hints that it takes.
        given: by name; those that are not known are left to `strict.check_hints`.

    Raises:
        VlmError: a value is of another kind than the usual one, or cannot be what it is for.
    """

    def __init__(self, layout: str, known: Mapping[str, Hint], given: Mapping[str, Option]) -> None:
        self.layout, self.known = layout, known
        self._given = {name: value for name, value in given.items() if name in known}
        for name, value in self._given.items():
            usual = known[name].usual
            if type(value) is not type(usual) and not (type(usual) is float and type(value) is int):
                raise VlmError(f"layout '{layout}' has the hint {name}={value!r}; give it as {name}={usual!r}")
            if (need := _need(name, value, usual)) is not None:
                raise VlmError(f"layout '{layout}' has the hint {name}={value!r}, which must be {need}, as {usual!r}")

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def __getitem__(self, name: str) -> Option:
        """Give a hint.

        Raises:
            VlmError: it was not given and must be.
        """
        hint = self.known[name]
        if name in self._given:
            return self._given[name]
        if hint.asked:
            raise VlmError(
                f"weights of layout '{self.layout}' do not tell {name}; pass {name}={hint.usual!r}, "
                "as the released models have it, or what your model's config says"
            )
        return hint.usual

    def whole(self, name: str) -> int:
        """Give a hint that is a whole number."""
        value = self[name]
        assert isinstance(value, int)
        return value
