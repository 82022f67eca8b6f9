"""A chain of connectors written as one string: `pixel_shuffle:factor=2+mlp`.

Links are joined by `+`; a link is a registered name, then options after a colon:
`qformer:queries=32,layers=6+linear`. A value is an int, a float, true or false, a
grid (`8x8`), or a word.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

from connectors.base import CONNECTORS, Chain, Connector, Option
from connectors.errors import TokenShapeError, VlmError
from connectors.registry import nearest
from connectors.tokens import TokenSpec

_WORDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    tuple: "a grid such as 8x8",
}

__all__ = ["build_connector", "connector_options", "parse_recipe", "recipe_of"]


def parse_recipe(recipe: str) -> list[tuple[str, dict[str, Option]]]:
    """Read a recipe as (name, options) pairs, without building anything.

    Raises:
        VlmError: the string is not a recipe.
        UnknownNameError: a name is not registered.
    """
    if not recipe.strip():
        raise VlmError("the connector recipe is empty; write for example mlp or pixel_shuffle:factor=2+mlp")
    links = []
    for text in recipe.split("+"):
        name, _, rest = text.strip().partition(":")
        CONNECTORS.get(name)
        options: dict[str, Option] = {}
        for pair in filter(None, rest.split(",")):
            key, equals, value = (piece.strip() for piece in pair.partition("="))
            if not (key and equals and value):
                raise VlmError(f"'{pair}' in recipe '{recipe}' is not option=value; write for example {name}:factor=2")
            if key in options:
                raise VlmError(f"option '{key}' stands twice in '{text}'; keep one")
            options[key] = _parse_value(value)
        links.append((name, options))
    return links


def build_connector(recipe: str, in_spec: TokenSpec, out_dim: int) -> Chain:
    """Build the chain of a recipe, each link sized from the one before.

    Args:
        recipe: links joined by `+`, as `pixel_shuffle:factor=2+mlp`.
        in_spec: the encoder's tokens.
        out_dim: H, width of the LLM.

    Raises:
        VlmError: the recipe cannot be read, or an option is unknown or wrong.
        TokenShapeError: a link cannot take the tokens, or the chain does not end at `out_dim`.
    """
    links: list[Connector] = []
    spec = in_spec
    for name, options in parse_recipe(recipe):
        cls = CONNECTORS.get(name)
        known = connector_options(cls)
        for key, value in options.items():
            if key not in known:
                hint = nearest(key, list(known)) if known else "it takes none"
                raise VlmError(f"connector '{name}' has no option '{key}'; {hint}")
            _require_kind(name, key, value, known[key])
        link = cls.build(spec, out_dim, **options)
        links.append(link)
        spec = link.out_spec(spec)
    if spec.dim != out_dim:
        raise TokenShapeError(
            f"'{recipe}' ends at width {spec.dim}, the LLM takes {out_dim}; end it with mlp or linear"
        )
    return Chain(*links)


def recipe_of(connector: Connector, out_dim: int) -> str:
    """Write a connector as the recipe that builds it again for the same input.

    Args:
        connector: a registered connector, or a chain of them.
        out_dim: H, width of the LLM; options equal to it are left to the default.

    Raises:
        VlmError: a link is not registered, so no recipe can name it.
    """
    links = connector.connectors if isinstance(connector, Chain) else [connector]
    return "+".join(_write_link(link, out_dim) for link in links)


def connector_options(cls: type[Connector]) -> Mapping[str, object]:
    """Give the options of a connector class and their defaults, in order."""
    parameters = inspect.signature(cls.build).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


def _require_kind(name: str, key: str, value: Option, default: object) -> None:
    kind = type(default)
    fits = type(value) is kind or (kind is float and type(value) is int)
    if kind in _WORDS and not fits:
        raise VlmError(f"'{name}' has {key}={_write_value(value)}; give {_WORDS[kind]}")


def _write_link(link: Connector, out_dim: int) -> str:
    if not link.name:
        raise VlmError(f"{type(link).__name__} has no registered name; decorate it with @register_connector('name')")
    defaults = {**connector_options(type(link))}
    if "dim" in defaults and defaults["dim"] is None:
        defaults["dim"] = out_dim
    options = link.options().items()
    written = [f"{key}={_write_value(value)}" for key, value in options if value != defaults[key]]
    return f"{link.name}:{','.join(written)}" if written else link.name


def _parse_value(text: str) -> Option:
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if match := re.fullmatch(r"(\d+)x(\d+)", text):
        return int(match[1]), int(match[2])
    try:
        return float(text)
    except ValueError:
        return text


def _write_value(value: Option) -> str:
    if isinstance(value, tuple):
        return f"{value[0]}x{value[1]}"
    # `1e+20` would read as two links.
    return str(value).lower() if isinstance(value, bool) else str(value).replace("e+", "e")
