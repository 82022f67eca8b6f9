"""OpenCLIP's towers whose trunk is a model of timm: EVA, SigLIP, ConvNeXt, PE and others."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Self

import torch

from vlm_encoders.encoders.open_clip_explain import architecture
from vlm_encoders.encoders.open_clip_weights import read_visual
from vlm_encoders.encoders.timm_backend import TimmEncoder
from vlm_encoders.encoders.timm_plan import kept_network, plan_network
from vlm_encoders.encoders.timm_weights import fit_weights
from vlm_encoders.spec import EncoderSpec

__all__ = ["OpenClipTrunk"]


class OpenClipTrunk(TimmEncoder):
    """The trunk of a tower of OpenCLIP, cut behind its feature layer.

    Source: open_clip's `TimmModel`, whose tokens are those of its `trunk`.
    """

    @classmethod
    def build(cls, spec: EncoderSpec, *, pretrained: bool | str, dtype: torch.dtype) -> Self:
        """Build the trunk up to its feature layer, and load its weights strictly."""
        model = architecture(spec.source, spec.name)["vision_cfg"]["timm_model_name"]
        trunk = dataclasses.replace(spec, backend="timm", source=model)
        plan = plan_network(trunk)
        network = kept_network(trunk, plan)
        if pretrained is not False:
            state, _ = read_visual(spec, SimpleNamespace(trunk=network), pretrained=pretrained)
            # Behind the trunk stands OpenCLIP's own pool and projection.
            state = {key.removeprefix("trunk."): one for key, one in state.items() if not key.startswith("head.")}
            fit_weights(network, trunk, plan, state, pretrained=pretrained)
        return cls(spec, network.to(dtype), plan)
