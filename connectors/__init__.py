"""Connectors between an image encoder and a language model; needs torch alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from connectors.base import Connector, Numbers, list_connectors, register_connector
    from connectors.c_abstractor import CAbstractor
    from connectors.chain import Chain, Wrapper
    from connectors.conv import Conv
    from connectors.errors import DuplicateNameError, TokenShapeError, UnknownNameError, VlmError
    from connectors.flamingo import FlamingoResampler
    from connectors.gated_mlp import GatedMLP
    from connectors.instruct_qformer import InstructQFormer
    from connectors.keep_prefix import KeepPrefix
    from connectors.ldp import LDP, LDPv2
    from connectors.linear import Linear
    from connectors.matryoshka import Matryoshka, choose_level
    from connectors.mlp import MLP
    from connectors.norm import Norm
    from connectors.patch_merger import PatchMerger
    from connectors.perceiver import PerceiverResampler
    from connectors.pixel_shuffle import PixelShuffle
    from connectors.pooled_projector import PooledProjector
    from connectors.pooling import AvgPool, MaxPool
    from connectors.position import Position
    from connectors.qformer import QFormer
    from connectors.recipe import build_connector, parse_recipe, recipe_of
    from connectors.released import load_released, released_layouts, to_released
    from connectors.residual import Residual
    from connectors.resize import Resize
    from connectors.sva import SpatialVisionAggregator
    from connectors.token_packer import TokenPacker
    from connectors.tokens import Grid, PackedTokens, TokenSpec, VisualTokens
    from connectors.tome import TokenMerging

__all__ = [
    "LDP",
    "MLP",
    "AvgPool",
    "CAbstractor",
    "Chain",
    "Connector",
    "Conv",
    "DuplicateNameError",
    "FlamingoResampler",
    "GatedMLP",
    "Grid",
    "InstructQFormer",
    "KeepPrefix",
    "LDPv2",
    "Linear",
    "Matryoshka",
    "MaxPool",
    "Norm",
    "Numbers",
    "PackedTokens",
    "PatchMerger",
    "PerceiverResampler",
    "PixelShuffle",
    "PooledProjector",
    "Position",
    "QFormer",
    "Residual",
    "Resize",
    "SpatialVisionAggregator",
    "TokenMerging",
    "TokenPacker",
    "TokenShapeError",
    "TokenSpec",
    "UnknownNameError",
    "VisualTokens",
    "VlmError",
    "Wrapper",
    "build_connector",
    "choose_level",
    "list_connectors",
    "load_released",
    "parse_recipe",
    "recipe_of",
    "register_connector",
    "released_layouts",
    "to_released",
]

_HOME = {
    "base": ("Connector", "Numbers", "list_connectors", "register_connector"),
    "c_abstractor": ("CAbstractor",),
    "chain": ("Chain", "Wrapper"),
    "conv": ("Conv",),
    "errors": ("DuplicateNameError", "TokenShapeError", "UnknownNameError", "VlmError"),
    "flamingo": ("FlamingoResampler",),
    "gated_mlp": ("GatedMLP",),
    "instruct_qformer": ("InstructQFormer",),
    "keep_prefix": ("KeepPrefix",),
    "ldp": ("LDP", "LDPv2"),
    "linear": ("Linear",),
    "matryoshka": ("Matryoshka", "choose_level"),
    "mlp": ("MLP",),
    "norm": ("Norm",),
    "patch_merger": ("PatchMerger",),
    "perceiver": ("PerceiverResampler",),
    "pixel_shuffle": ("PixelShuffle",),
    "pooled_projector": ("PooledProjector",),
    "pooling": ("AvgPool", "MaxPool"),
    "position": ("Position",),
    "qformer": ("QFormer",),
    "recipe": ("build_connector", "parse_recipe", "recipe_of"),
    "released": ("load_released", "released_layouts", "to_released"),
    "residual": ("Residual",),
    "resize": ("Resize",),
    "sva": ("SpatialVisionAggregator",),
    "token_packer": ("TokenPacker",),
    "tokens": ("Grid", "PackedTokens", "TokenSpec", "VisualTokens"),
    "tome": ("TokenMerging",),
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
