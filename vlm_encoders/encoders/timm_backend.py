"""Any model of timm, cut behind its feature layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from connectors.tokens import PackedTokens, VisualTokens
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.timm_explain import explain, timm_names
from vlm_encoders.encoders.timm_network import read_arguments, read_layers
from vlm_encoders.encoders.timm_pack import read_by_size, read_packed, reads_sequences
from vlm_encoders.encoders.timm_plan import Plan, kept_network, plan_network
from vlm_encoders.encoders.timm_weights import load_weights, read_weights
from vlm_encoders.resample import join_channels
from vlm_encoders.spec import EncoderSpec

__all__ = ["TimmEncoder", "explain", "timm_names"]


class TimmEncoder(Encoder):
    """A model of timm, cut behind its feature layer.

    Source: timm's `create_model`, `forward_intermediates`, `prune_intermediate_layers`.

    Args:
        spec: with the model's name in `source`.
        network: the model as `plan` cuts it.
        plan: what was kept of it.
    """

    def __init__(self, spec: EncoderSpec, network: nn.Module, plan: Plan) -> None:
        super().__init__(spec)
        self.network = network
        self._plan = plan
        self._arguments = read_arguments(network, norm=spec.final_norm, grid=plan.grid)

    @classmethod
    def build(cls, spec: EncoderSpec, *, pretrained: bool | str, dtype: torch.dtype) -> Self:
        """Build the model up to its feature layer, and load its weights strictly."""
        plan = plan_network(spec)
        state = None if pretrained is False else read_weights(spec, plan, pretrained=pretrained)
        network = kept_network(spec, plan)
        if state is not None:
            load_weights(network, spec, state)
        return cls(spec, network.to(dtype), plan)

    def forward_features(self, pixel_values: Tensor) -> VisualTokens:
        """Run the kept layers and join those that are used, prefix apart."""
        plan = self._plan
        found = read_layers(self.network, pixel_values, plan.places, grid=plan.grid, arguments=self._arguments)
        return found[0] if len(found) == 1 else join_channels(found)

    def packed_features(self, views: Sequence[Tensor], kept: Sequence[Tensor] | None) -> PackedTokens:
        """Run the kept layers on views of many sizes: NaFlexViT's on all together, others' size by size."""
        if reads_sequences(self.network):
            return read_packed(self.network, views, kept, self._plan.places, self.spec)
        return read_by_size(self.forward_features, views, kept, self.spec)

    def blocks(self) -> list[nn.Module]:
        """Give what each kept layer adds to those before: a block, a stage, or a list of modules."""
        return [_gather(self.network, paths) for paths in self._plan.layers]


def _gather(network: nn.Module, paths: tuple[str, ...]) -> nn.Module:
    parameters, fixed = dict(network.named_parameters()), dict(network.named_buffers())
    alone = [parameters[path] for path in paths if path in parameters]
    modules = [network.get_submodule(path) for path in paths if path not in parameters and path not in fixed]
    if len(modules) == 1 and not alone:
        return modules[0]
    # A list holds the modules without taking them from the network.
    return nn.ModuleList([*modules, nn.ParameterList(alone)] if alone else modules)
