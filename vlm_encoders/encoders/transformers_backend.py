"""Vision towers of transformers, each class by its `Tower`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from connectors.tokens import PackedTokens, VisualTokens
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.transformers_load import build_tower, load_tower, require_tower, tower_weights
from vlm_encoders.spec import EncoderSpec

__all__ = ["TransformersEncoder"]


class TransformersEncoder(Encoder):
    """A vision model of transformers, cut behind its feature layer.

    Source: the class in `spec.source`, one of `vlm_encoders.encoders.towers.SOURCES`.

    Args:
        spec: with the class in `source`.
        network: the class's instance with the kept layers, in float32 where `Tower.resamples`.
    """

    def __init__(self, spec: EncoderSpec, network: nn.Module) -> None:
        self._tower = require_tower(spec)
        super().__init__(spec if self._tower.packs_here(spec) else spec.altered(packs=False))
        self.network = network
        self._kept = _Kept()
        for layer, module in self._tower.watched(network, spec).items():
            module.register_forward_hook(_Keeper(self._kept, layer))

    @classmethod
    def build(cls, spec: EncoderSpec, *, pretrained: bool | str, dtype: torch.dtype) -> Self:
        """Build the tower from the spec, and load the weights that belong to it."""
        tower = require_tower(spec)
        if pretrained is False:
            return cls(spec, build_tower(tower, spec, dtype))
        return cls(spec, load_tower(tower, spec, tower_weights(spec, pretrained=pretrained), dtype))

    def forward_features(self, pixel_values: Tensor) -> VisualTokens:
        """Run the kept layers and take the prefix apart."""
        return self._tower.forward(self.network, pixel_values, self.spec, self._kept.here())

    def packed_features(self, views: Sequence[Tensor], kept: Sequence[Tensor] | None) -> PackedTokens:
        """Run the kept layers on views of many sizes."""
        return self._tower.packed(self.network, views, self.spec, self._kept.here(), kept)

    def blocks(self) -> list[nn.Module]:
        """Give the kept layers, first to last."""
        return self._tower.blocks(self.network)


class _Keeper:
    """A hook that keeps what a module returns; an object, so that a copied encoder has hooks of its own."""

    def __init__(self, kept: _Kept, layer: int) -> None:
        self.kept, self.layer = kept, layer

    def __call__(self, _module: nn.Module, _arguments: Any, returned: Any) -> None:
        self.kept.here()[self.layer] = returned


class _Kept:
    """What hooks kept in a forward: each thread's own, so that threads may share an encoder."""

    def __init__(self) -> None:
        self._threads = threading.local()
        self._traced: dict[int, Any] = {}

    def here(self) -> dict[int, Any]:
        """Give what was kept in this thread, or in the trace that torch.compile makes, which knows no threads."""
        if torch.compiler.is_compiling():
            return self._traced
        if not hasattr(self._threads, "kept"):
            self._threads.kept = {}
        kept: dict[int, Any] = self._threads.kept
        return kept

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        """Copy and pickle as an empty one."""
        return _Kept, ()
