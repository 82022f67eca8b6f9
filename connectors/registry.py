"""Exact names for encoders and connectors: no substrings, no silent duplicates."""

from __future__ import annotations

import difflib
import importlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from connectors.errors import DuplicateNameError, UnknownNameError, VlmError

__all__ = ["Registry", "nearest"]

T = TypeVar("T")
_SHOWN = 12


def nearest(name: str, known: list[str]) -> str:
    """Say which known names are close to `name`, as the end of a sentence."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if not close and name:
        # get_close_matches is blind to a short name inside a long one, such as "mlp" in "mlp2x_gelu".
        lower = name.lower()
        close = [candidate for candidate in known if lower in candidate.lower() or candidate.lower() in lower][:3]
    return f"did you mean {' or '.join(close)}?" if close else _known(known)


def _known(known: list[str]) -> str:
    if not known:
        return "none are known"
    turns: Counter[str] = Counter()

    def turn(name: str) -> int:
        word = re.split("[-_.]", name)[0]
        turns[word] += 1
        return turns[word]

    # One of each first word comes before a second of any: many names often begin alike.
    shown = sorted(sorted(sorted(known), key=turn)[:_SHOWN])
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return f"known are {', '.join(shown)}{more}"


class Registry(Generic[T]):
    """Names to things, built in, registered in code, or brought by an installed plugin.

    Args:
        kind: what is registered, as the word in messages.
        group: the entry point group that plugins use.
        builtin: name -> module that registers it when imported.
        accept: turns what an entry point loads into (name, thing) pairs.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        builtin: Mapping[str, str],
        accept: Callable[[EntryPoint, object], list[tuple[str, T]]],
    ) -> None:
        self.kind = kind
        self.group = group
        self._builtin = dict(builtin)
        self._accept = accept
        self._things: dict[str, T] = {}
        self._origin: dict[str, str] = {}
        self._plugins_loaded = False

    def register(self, name: str, thing: T, origin: str) -> None:
        """Register `thing` under an exact name.

        Args:
            name: the exact name.
            thing: what the name stands for.
            origin: the module that registers it, for messages and for built-in names.

        Raises:
            VlmError: the name is empty or holds a sign that a recipe or a backend prefix uses.
            DuplicateNameError: the name is taken.
        """
        if not name or any(sign in name for sign in "+,:= \n"):
            raise VlmError(f"{self.kind} name {name!r} is empty or holds a space or one of '+,:='; pick another")
        taken = self._origin.get(name, self._builtin.get(name))
        if name in self._things or (taken is not None and taken != origin):
            raise DuplicateNameError(f"{self.kind} '{name}' is registered already, by {taken}; pick another name")
        self._things[name] = thing
        self._origin[name] = origin

    def get(self, name: str) -> T:
        """Find a thing by its exact name.

        Raises:
            UnknownNameError: nothing has this name; the nearest names are given.
        """
        if name not in self._things and name in self._builtin:
            importlib.import_module(self._builtin[name])
        if name not in self._things:
            self._load_plugins()
        if name not in self._things:
            raise UnknownNameError(f"no {self.kind} '{name}'; {nearest(name, self.names())}")
        return self._things[name]

    def names(self, pattern: str = "*") -> list[str]:
        """List the names that match a shell pattern, sorted, plugins included."""
        self._load_plugins()
        known = {*self._things, *self._builtin}
        return sorted(name for name in known if fnmatchcase(name, pattern))

    def _load_plugins(self) -> None:
        if self._plugins_loaded:
            return
        for point in entry_points(group=self.group):
            try:
                loaded = point.load()
            except Exception as error:
                # Loading runs the plugin's own module, which may fail in any way.
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise UnknownNameError(
                    f"plugin '{point.name}' = {point.value} cannot be loaded: {reason}; repair or uninstall it"
                ) from error
            for name, thing in self._accept(point, loaded):
                if self._things.get(name) is not thing:
                    self.register(name, thing, point.value)
        self._plugins_loaded = True
