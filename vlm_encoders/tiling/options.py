"""Options of a tiler, as text, as JSON or as Python values, held to the types of its fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from connectors.errors import VlmError
from connectors.registry import nearest
from vlm_encoders.tiling.tiler import Tiler

__all__ = ["read_options", "typed_options"]

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    NoneType: "none",
}


class _Grid(tuple[int, ...]):
    """A grid in text, `1x2`, where `1/2` are two numbers."""

    __slots__ = ()


def read_options(name: str, text: str) -> dict[str, Any]:
    """Read `option=value,option=value`, the form that options have in a connector's recipe.

    A value is `none`, true or false, a number, a grid (`1x2`), several numbers or grids (`1x2/2x1`), or a word.

    Raises:
        VlmError: a part is not option=value, or an option stands twice.
    """
    options: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if not (key and equals and value):
            raise VlmError(f"'{pair.strip()}' in tiler '{name}:{text}' is not option=value; write {name}:tile_size=448")
        if key in options:
            raise VlmError(f"option '{key}' stands twice in tiler '{name}:{text}'; keep one")
        options[key] = _parsed(value)
    return options


def typed_options(name: str, tiler: type[Tiler], options: Mapping[str, Any]) -> dict[str, Any]:
    """Hold options to the types of a tiler's fields; lists become tuples, as JSON has only lists.

    Raises:
        VlmError: an option is unknown, or its value of another type.
    """
    known = [field.name for field in fields(tiler) if field.init]
    hints = get_type_hints(tiler)
    typed = {}
    for key, value in options.items():
        if key not in known:
            close = nearest(key, known)
            hint = f"; {close}" if close.startswith("did") else ""
            raise VlmError(f"tiler '{name}' has no option '{key}'; it takes {', '.join(known)}{hint}")
        try:
            typed[key] = _typed(value, hints[key])
        except TypeError:
            raise VlmError(f"tiler '{name}' has {key}={_said(value)}; give {_words(hints[key])}") from None
    return typed


def _parsed(text: str) -> Any:
    lower = text.lower()
    if lower in {"none", "true", "false"}:
        return {"none": None, "true": True, "false": False}[lower]
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"\d+x\d+", text):
        return _Grid(map(int, text.split("x")))
    if "/" in text:
        return tuple(map(_parsed, text.split("/")))
    try:
        return float(text)
    except ValueError:
        return text


def _typed(value: Any, hint: Any) -> Any:
    """Give the value as a field of this type holds it, or raise TypeError."""
    kind, kinds = get_origin(hint), get_args(hint)
    if kind in {Union, UnionType}:
        return _first(value, kinds)
    if kind is Literal:
        if type(value) is str and value in kinds:
            return value
        raise TypeError
    if kind is not tuple:
        if type(value) is hint:
            return value
        if hint is float and type(value) is int:
            return float(value)
        raise TypeError
    if kinds[-1] is Ellipsis:
        # One number or grid in text stands for the list that holds it alone.
        several = value if isinstance(value, (list, tuple)) and not isinstance(value, _Grid) else [value]
        return tuple(_typed(each, kinds[0]) for each in several)
    if not isinstance(value, (list, tuple)) or len(value) != len(kinds):
        raise TypeError
    return tuple(_typed(each, own) for each, own in zip(value, kinds, strict=True))


def _first(value: Any, kinds: tuple[Any, ...]) -> Any:
    for kind in kinds:
        try:
            return _typed(value, kind)
        except TypeError:
            continue
    raise TypeError


def _words(hint: Any) -> str:
    kind, kinds = get_origin(hint), get_args(hint)
    if kind in {Union, UnionType}:
        return " or ".join(map(_words, kinds))
    if kind is Literal:
        return " or ".join(map(str, kinds))
    if kind is not tuple:
        return _WORDS.get(hint, "another value")
    if kinds[-1] is not Ellipsis:
        return "a grid such as 1x2"
    return "grids such as 1x2/2x1" if get_origin(kinds[0]) is tuple else "whole numbers such as 1/2/4"


def _said(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ("x" if isinstance(value, _Grid) else "/").join(map(_said, value)) or "nothing"
    return str(value).lower() if isinstance(value, bool) or value is None else repr(value)
