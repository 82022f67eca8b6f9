"""Names of joints of encoders, read and written.

    fused:A+B                      two parts or more, parted by "+"
    fused[fuse=interleave]:A+B     options of the joint, in brackets behind its word
    fused[fold=true]:A+B           finer grids folded into wider tokens of the first one's grid
    fused:A[image_size=448]+B      options of a part, in brackets behind its name
    multiscale[scales=1/2/3]:A     one network at several scales
    fused:(multiscale:A)+(hf:x+y)  a part in parentheses: its text is one whole name

Between parentheses "+" and brackets part nothing, so that a folder with such a letter, or a joint of
"+" inside another, can be named; only parentheses themselves must pair up. Brackets behind a name belong to
the innermost one: `multiscale:A[...]` gives options to A, `(multiscale:A)[...]` to the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from connectors.errors import VlmError

__all__ = ["JointName", "PartName", "Value", "is_joint", "map_places", "parse_joint", "write_joint"]

Value: TypeAlias = bool | int | float | str | tuple[int, ...]

_HEAD = re.compile(r"(fused|multiscale)(?:\[([^\[\]]*)\])?:(.*)", re.DOTALL)
# A revision of digits alone is no number.
_TEXTS = frozenset({"attn_implementation", "fuse", "pretrained", "resampling", "resize", "revision"})
_SIZES = frozenset({"grid", "image_size"})
_FORMS = "fused:NAME+NAME, fused[option=value]:NAME[option=value]+NAME or multiscale:NAME"


@dataclass(frozen=True)
class PartName:
    """One part: a whole name as `encoder_spec` takes it, and what stands in brackets behind it."""

    name: str
    options: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class JointName:
    """A joint's name taken apart.

    Attributes:
        kind: "fused" or "multiscale".
        options: of the joint itself.
        parts: in order.
    """

    kind: str
    options: Mapping[str, Value]
    parts: tuple[PartName, ...]


def is_joint(name: str) -> bool:
    """Say whether a name is that of a joint."""
    return re.match(r"(fused|multiscale)[:\[]", name) is not None


def parse_joint(name: str) -> JointName:
    """Take a joint's name apart.

    Raises:
        VlmError: it cannot be read.
    """
    head = _HEAD.fullmatch(name)
    if head is None:
        raise VlmError(f"'{name}' is no joint of encoders; write {_FORMS}")
    kind, options, rest = head.groups()
    parts = tuple(_part(text.strip(), name) for text in _split(rest, name))
    return JointName(kind, _options(options, name), parts)


def write_joint(joint: JointName) -> str | None:
    """Write what `parse_joint` reads again; None where an option or a name has no written form."""
    parts = [_write_part(part) for part in joint.parts]
    head = _write_options(joint.options)
    if head is None or None in parts:
        return None
    return f"{joint.kind}{head}:{'+'.join(filter(None, parts))}"


def map_places(name: str, change: Callable[[str], str]) -> str:
    """Give an encoder's name with each folder in it changed, those inside a joint too.

    Args:
        name: as `encoder_spec` takes it.
        change: is given what stands behind `hf:` and `timm:`, and each `pretrained` in brackets.
    """
    if not is_joint(name):
        door, colon, place = name.partition(":")
        return f"{door}:{change(place)}" if colon and door in {"hf", "timm"} else name
    joint = parse_joint(name)
    parts = []
    for part in joint.parts:
        options = dict(part.options)
        if "pretrained" in options:
            options["pretrained"] = change(str(options["pretrained"]))
        parts.append(PartName(map_places(part.name, change), options))
    return write_joint(replace(joint, parts=tuple(parts))) or name


def _split(text: str, name: str) -> list[str]:
    parts, inside, bracketed = [""], 0, False
    for letter in text:
        if letter in "()" and not bracketed:
            inside += 1 if letter == "(" else -1
        elif letter in "[]" and not inside:
            if bracketed == (letter == "["):
                raise VlmError(f"'{name}': brackets do not pair up; put a name that holds one into parentheses")
            bracketed = letter == "["
        if inside < 0:
            break
        if letter == "+" and not inside and not bracketed:
            parts.append("")
        else:
            parts[-1] += letter
    if inside or bracketed:
        raise VlmError(f"'{name}': brackets or parentheses do not pair up; close each one that is open")
    return parts


def _part(text: str, name: str) -> PartName:
    if text.startswith("("):
        end = _closing(text)
        inner, rest = text[1:end], text[end + 1 :]
    elif is_joint(text):
        inner, rest = text, ""
    else:
        start = text.find("[") % (len(text) + 1)
        inner, rest = text[:start], text[start:]
    if not inner.strip():
        raise VlmError(f"'{name}' has an empty part; write {_FORMS}")
    if rest and not (rest.startswith("[") and rest.find("]") == len(rest) - 1):
        raise VlmError(f"'{name}': behind '{inner}' stands '{rest}'; put options into one pair of brackets there")
    return PartName(inner.strip(), _options(rest[1:-1], name))


def _closing(text: str) -> int:
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(text)


def _options(text: str | None, name: str) -> dict[str, Value]:
    options: dict[str, Value] = {}
    for option in text.split(",") if text else ():
        key, equals, value = (piece.strip() for piece in option.partition("="))
        if not (key and equals and value):
            raise VlmError(f"'{name}': option '{option.strip()}' is not option=value; write [option=value,...]")
        if key in options:
            raise VlmError(f"'{name}' gives option '{key}' twice; give it once")
        options[key] = value if key in _TEXTS else _parse_value(value)
    return options


def _parse_value(text: str) -> Value:
    if text in {"true", "false"}:
        return text == "true"
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(r"\d+(x\d+)+", text):
        return tuple(map(int, text.split("x")))
    if re.fullmatch(r"-?\d+(/-?\d+)+", text):
        return tuple(map(int, text.split("/")))
    if re.fullmatch(r"-?(\d+\.\d*|\.\d+|\d+(\.\d*)?e-?\d+)", text):
        return float(text)
    return text


def _write_part(part: PartName) -> str | None:
    options = _write_options(part.options)
    if options is None:
        return None
    bare = not is_joint(part.name) and not set(part.name) & set("+[](),")
    try:
        whole = part.name if bare else f"({part.name})"
        return f"{whole}{options}" if _split(whole, whole) == [whole] and part.name.strip() == part.name else None
    except VlmError:
        return None


def _write_options(options: Mapping[str, object]) -> str | None:
    written = []
    for key, given in options.items():
        value = tuple(given) if isinstance(given, list) else given
        text = _write_value(key, value)
        read = text if key in _TEXTS else _parse_value(text)
        if set(text) & set("[],") or text != text.strip() or read != value or type(read) is not type(value):
            return None
        written.append(f"{key}={text}")
    return f"[{','.join(written)}]" if written else ""


def _write_value(key: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ("x" if key in _SIZES else "/").join(map(str, value))
    return str(value).replace("e+", "e")
