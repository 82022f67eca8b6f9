"""Connectors between an image encoder and a language model; needs torch alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from connectors.base import Chain, Connector, list_connectors, register_connector
    from connectors.errors import DuplicateNameError, TokenShapeError, UnknownNameError, VlmError
    from connectors.keep_prefix import KeepPrefix
    from connectors.linear import Linear
    from connectors.mlp import MLP
    from connectors.perceiver import PerceiverResampler
    from connectors.pixel_shuffle import PixelShuffle
    from connectors.pooling import AvgPool
    from connectors.qformer import QFormer
    from connectors.recipe import build_connector, parse_recipe, recipe_of
    from connectors.tokens import Grid, PackedTokens, TokenSpec, VisualTokens

__all__ = [
    "MLP",
    "AvgPool",
    "Chain",
    "Connector",
    "DuplicateNameError",
    "Grid",
    "KeepPrefix",
    "Linear",
    "PackedTokens",
    "PerceiverResampler",
    "PixelShuffle",
    "QFormer",
    "TokenShapeError",
    "TokenSpec",
    "UnknownNameError",
    "VisualTokens",
    "VlmError",
    "build_connector",
    "list_connectors",
    "parse_recipe",
    "recipe_of",
    "register_connector",
]

_HOME = {
    "base": ("Chain", "Connector", "list_connectors", "register_connector"),
    "errors": ("DuplicateNameError", "TokenShapeError", "UnknownNameError", "VlmError"),
    "keep_prefix": ("KeepPrefix",),
    "linear": ("Linear",),
    "mlp": ("MLP",),
    "perceiver": ("PerceiverResampler",),
    "pixel_shuffle": ("PixelShuffle",),
    "pooling": ("AvgPool",),
    "qformer": ("QFormer",),
    "recipe": ("build_connector", "parse_recipe", "recipe_of"),
    "tokens": ("Grid", "PackedTokens", "TokenSpec", "VisualTokens"),
}
_MODULE = {name: f"connectors.{module}" for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a name from its module on first use, so that the package itself is light."""
    if name not in _MODULE:
        raise AttributeError(f"module 'connectors' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    """List the public names, imported or not, for completion."""
    return __all__
