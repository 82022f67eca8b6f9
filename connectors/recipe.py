"""A chain of connectors written as one string: `pixel_shuffle:factor=2+mlp`.

Links are joined by `+`; a link is a registered name, then options after a colon:
`qformer:queries=32,layers=6+linear`. A value is an int, a float, true or false, a
grid (`8x8`), whole numbers (`1/2/4`), or a word. A link around a chain of its own has
that chain's recipe in parentheses at its end: `residual(norm+mlp)+linear`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch

from connectors.base import CONNECTORS, Connector, Numbers, Option
from connectors.chain import Chain, Wrapper
from connectors.errors import TokenShapeError, VlmError
from connectors.init import undrawn
from connectors.registry import nearest
from connectors.tokens import TokenSpec

_WORDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    tuple: "a grid such as 8x8",
    Numbers: "whole numbers such as 1/2/4",
}
_INNER = "inner"
_SEEDS = 2**62
# No recipe is as long; it bounds numbers and nesting, which Python cannot read without end.
_LONGEST = 1000

__all__ = ["build_connector", "connector_options", "parse_recipe", "recipe_of"]


def parse_recipe(recipe: str) -> list[tuple[str, dict[str, Option]]]:
    """Read a recipe as (name, options) pairs, without building anything.

    The recipe in a link's parentheses is its option `inner`, as text.

    Raises:
        VlmError: the string is not a recipe.
        UnknownNameError: a name is not registered.
    """
    if not isinstance(recipe, str):
        raise VlmError(f"a connector recipe is a text, got {type(recipe).__name__}; write for example mlp")
    if len(recipe) > _LONGEST:
        raise VlmError(f"the connector recipe has {len(recipe)} characters; write at most {_LONGEST}")
    if not recipe.strip():
        raise VlmError("the connector recipe is empty; write for example mlp or pixel_shuffle:factor=2+mlp")
    links = []
    for text, inner in _split_links(recipe):
        name, _, rest = (piece.strip() for piece in text.partition(":"))
        if not name:
            raise VlmError(f"a link in recipe '{recipe}' has no name; write for example mlp, or residual(norm)+mlp")
        wraps = issubclass(CONNECTORS.get(name), Wrapper)
        if wraps != (inner is not None):
            wrong = f"wraps a recipe: write {name}(mlp)" if wraps else "wraps nothing: leave the parentheses out"
            raise VlmError(f"'{name}' in recipe '{recipe}' {wrong}")
        options: dict[str, Option] = {}
        for pair in filter(None, rest.split(",")):
            key, equals, value = (piece.strip() for piece in pair.partition("="))
            if not (key and equals and value):
                known = ", ".join(connector_options(CONNECTORS.get(name))) or "none"
                raise VlmError(f"'{pair}' in recipe '{recipe}' is not option=value; '{name}' has the options {known}")
            if wraps and key == _INNER:
                raise VlmError(f"'{name}' takes its recipe in parentheses: write {name}({value})")
            if key in options:
                raise VlmError(f"option '{key}' stands twice in '{text}'; keep one")
            options[key] = _parse_value(value)
        if inner is not None:
            parse_recipe(inner)
            options[_INNER] = inner
        links.append((name, options))
    return links


def build_connector(recipe: str, in_spec: TokenSpec, out_dim: int, *, seed: int | None = 0) -> Chain:
    """Build the chain of a recipe, each link sized from the one before.

    Args:
        recipe: links joined by `+`, as `pixel_shuffle:factor=2+mlp`.
        in_spec: the encoder's tokens.
        out_dim: H, width of the LLM.
        seed: of the initial weights; the global generator is neither read nor moved. None
            leaves them undrawn, for weights that are loaded next.

    Raises:
        VlmError: the recipe cannot be read, or an option is unknown or wrong.
        TokenShapeError: a link cannot take the tokens, or the chain does not end at `out_dim`.
    """
    if not isinstance(in_spec, TokenSpec):
        raise VlmError(f"in_spec is the encoder's TokenSpec(num_tokens, dim, grid), got {in_spec!r}")
    if isinstance(out_dim, bool) or not isinstance(out_dim, int):
        raise VlmError(f"out_dim is the width of the LLM as a whole number, got {out_dim!r}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or abs(seed) >= _SEEDS):
        raise VlmError(f"seed={seed!r} draws no weights; give a whole number below {_SEEDS:,}, or None")
    # A plugin may draw in its __init__, from the global generator.
    with torch.random.fork_rng(devices=[]), undrawn():
        chain, spec = _build(recipe, in_spec, out_dim)
    if spec.dim != out_dim:
        raise TokenShapeError(
            f"'{recipe}' ends at width {spec.dim}, the LLM takes {out_dim}; end it with mlp or linear"
        )
    if seed is not None:
        chain.reset_parameters(seed)
    return chain


def _build(recipe: str, spec: TokenSpec, out_dim: int) -> tuple[Chain, TokenSpec]:
    links: list[Connector] = []
    for name, options in parse_recipe(recipe):
        cls = CONNECTORS.get(name)
        known = connector_options(cls)
        for key, value in options.items():
            if key == _INNER and issubclass(cls, Wrapper):
                continue
            if key not in known:
                hint = nearest(key, list(known)) if known else "it takes none"
                raise VlmError(f"connector '{name}' has no option '{key}'; {hint}")
            _require_kind(cls, key, value)
        given: dict[str, Any] = dict(options)
        if issubclass(cls, Wrapper):
            given[_INNER], _ = _build(str(options[_INNER]), spec, cls.inner_dim(spec, out_dim))
        link = _make(cls, spec, out_dim, given)
        links.append(link)
        spec = link.out_spec(spec)
    return Chain(*links), spec


def _make(cls: type[Connector], spec: TokenSpec, out_dim: int, options: dict[str, Any]) -> Connector:
    try:
        return cls.build(spec, out_dim, **options)
    except VlmError:
        raise
    except (RuntimeError, OverflowError, TypeError, MemoryError) as error:
        # The allocator says in its own words that a number is too large.
        reason = " ".join(str(error).split("\n")[0].split())
        raise VlmError(f"'{cls.name}' cannot be built with {options} for width {spec.dim}: {reason}") from error


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
    options = {each.name: each.default for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}
    if issubclass(cls, Wrapper):
        options.pop(_INNER, None)
    return options


def _split_links(recipe: str) -> list[tuple[str, str | None]]:
    """Cut at each `+` outside parentheses; give each link and what stands in its parentheses."""
    texts, depth, start = [], 0, 0
    for index, sign in enumerate(recipe):
        depth += (sign == "(") - (sign == ")")
        if depth < 0:
            break
        if sign == "+" and depth == 0:
            texts.append(recipe[start:index])
            start = index + 1
    if depth:
        raise VlmError(
            f"the parentheses in recipe '{recipe}' do not match; write for example residual(norm+mlp)+linear"
        )
    links: list[tuple[str, str | None]] = []
    for text in [*texts, recipe[start:]]:
        head, opened, rest = text.strip().partition("(")
        if opened and not rest.endswith(")"):
            raise VlmError(f"'{text.strip()}' goes on behind its parentheses; join links by +")
        links.append((head, rest[:-1] if opened else None))
    return links


def _require_kind(cls: type[Connector], key: str, value: Option) -> None:
    hint = get_type_hints(cls.build)[key]
    kinds = {get_origin(each) or each for each in (get_args(hint) if isinstance(hint, UnionType) else (hint,))}
    if type(value) not in kinds and not (type(value) is int and kinds & {float, Numbers}):
        words = " or ".join(_WORDS[kind] for kind in _WORDS if kind in kinds)
        raise VlmError(f"'{cls.name}' has {key}={_write_value(value)}; give {words}")


def _write_link(link: Connector, out_dim: int) -> str:
    if not link.name:
        raise VlmError(f"{type(link).__name__} has no registered name; decorate it with @register_connector('name')")
    defaults = {**connector_options(type(link))}
    if "dim" in defaults and defaults["dim"] is None:
        defaults["dim"] = out_dim
    options = link.options().items()
    written = [f"{key}={_write_value(value)}" for key, value in options if value != defaults[key]]
    # Widths of an inner chain are written out: `inner_dim` needs the tokens that came, which a link does not keep.
    inner = f"({recipe_of(link.inner, 0)})" if isinstance(link, Wrapper) else ""
    return f"{link.name}:{','.join(written)}{inner}" if written else f"{link.name}{inner}"


def _parse_value(text: str) -> Option:
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if match := re.fullmatch(r"(\d+)x(\d+)", text):
        return int(match[1]), int(match[2])
    if re.fullmatch(r"\d+(/\d+)+", text):
        return Numbers(map(int, text.split("/")))
    try:
        return float(text)
    except ValueError:
        return text


def _write_value(value: Option) -> str:
    if isinstance(value, Numbers):
        return str(value)
    if isinstance(value, tuple):
        return f"{value[0]}x{value[1]}"
    # `1e+20` would read as two links.
    return str(value).lower() if isinstance(value, bool) else str(value).replace("e+", "e")
