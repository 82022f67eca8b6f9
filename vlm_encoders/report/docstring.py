"""What docstrings say of options."""

from __future__ import annotations

import inspect
import re

__all__ = ["class_meanings", "meanings"]


def meanings(text: str) -> dict[str, str]:
    """Read the `Args:` or `Attributes:` of a docstring in Google's style, indented as `inspect.cleandoc` leaves it."""
    block = re.search(r"^(?:Args|Attributes):\n((?:[ \t]+.*\n?|\n)*)", text, re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", block[1], re.MULTILINE) if block else []
    return {name: " ".join(meaning.split()).rstrip(".") for name, meaning in entries}


def class_meanings(cls: type) -> dict[str, str]:
    """Read the docstrings of a class and of its parents, whose words hold where it has none of its own."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        found |= meanings(inspect.cleandoc(vars(each).get("__doc__") or ""))
    return found
