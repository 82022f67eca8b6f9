"""What is known of a connector: its options, what its example costs, and its own words."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import get_type_hints

from connectors.base import CONNECTORS, Connector
from connectors.recipe import build_connector, connector_options
from connectors.tokens import TokenSpec
from vlm_encoders.budget import measure_connector
from vlm_encoders.report.connector_examples import LLM_DIM, Example, connector_example
from vlm_encoders.report.docstring import meanings

__all__ = ["ConnectorCard", "ConnectorOption", "connector_card"]

_WIDTH = "width of the tokens that go out, by default the LLM's"


@dataclass(frozen=True)
class ConnectorOption:
    """One option of a recipe.

    Attributes:
        name: as a recipe writes it.
        default: as a recipe writes it; "" where there is none.
        kind: int, float, bool, str, Grid or Numbers.
        meaning: from the docstring of the class.
    """

    name: str
    default: str
    kind: str
    meaning: str


@dataclass(frozen=True)
class ConnectorCard:
    """What is known of one connector.

    Attributes:
        name: the registered one.
        cls: its class.
        summary: the first line of its docstring.
        options: in order.
        example: how it is used.
        out: what its example makes of one view.
        parameters: of the example's whole chain.
        own_parameters: of the connector alone.
        flops: of the example's whole chain, one view.
    """

    name: str
    cls: type[Connector]
    summary: str
    options: tuple[ConnectorOption, ...]
    example: Example
    out: TokenSpec
    parameters: int
    own_parameters: int
    flops: int


def connector_card(name: str) -> ConnectorCard:
    """Measure the example of a connector and read the rest from its class; nothing is computed.

    Raises:
        UnknownNameError: no connector has this name.
        VlmError: a plugin's connector cannot be built with its defaults.
    """
    import torch

    cls = CONNECTORS.get(name)
    example = connector_example(name)
    out, parameters, flops = measure_connector(example.recipe, example.tokens, LLM_DIM)
    with torch.device("meta"):
        links = build_connector(example.recipe, example.tokens, LLM_DIM).connectors
    own = sum(parameter.numel() for link in links if link.name == name for parameter in link.parameters())
    text = inspect.getdoc(cls) or ""
    return ConnectorCard(
        name=name,
        cls=cls,
        summary=text.partition("\n")[0].rstrip("."),
        options=tuple(_options(cls, text)),
        example=example,
        out=out,
        parameters=parameters,
        own_parameters=own,
        flops=flops,
    )


def _options(cls: type[Connector], text: str) -> list[ConnectorOption]:
    hints = get_type_hints(cls.build)
    said = meanings(text)
    return [
        ConnectorOption(
            name=option,
            default=_written(default),
            kind=_kind(hints[option]),
            meaning=said.get(option) or (_WIDTH if option == "dim" else ""),
        )
        for option, default in connector_options(cls).items()
    ]


def _kind(hint: object) -> str:
    if isinstance(hint, type) and hint.__name__ != "tuple":
        return hint.__name__
    return str(hint).replace("tuple[int, int]", "Grid").replace("connectors.base.", "").replace(" | None", "")


def _written(default: object) -> str:
    if default is None:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if type(default) is tuple:
        return "x".join(map(str, default))
    return str(default)
