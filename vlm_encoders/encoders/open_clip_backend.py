"""Vision towers of OpenCLIP: its own ViTs and ResNets, and its trunks of timm."""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from connectors.errors import VlmError
from connectors.tokens import VisualTokens
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.open_clip_explain import architecture, explain, open_clip_names
from vlm_encoders.encoders.open_clip_trunk import OpenClipTrunk
from vlm_encoders.encoders.open_clip_weights import load_native
from vlm_encoders.encoders.timm_network import REFUSALS
from vlm_encoders.resample import join_channels
from vlm_encoders.spec import EncoderSpec

__all__ = ["OpenClipEncoder", "explain", "open_clip_names"]

_STEM = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")


class OpenClipEncoder(Encoder):
    """A ViT or ResNet of OpenCLIP's own, cut behind its feature layer.

    Source: open_clip's `VisionTransformer` and `ModifiedResNet`, by `forward_intermediates`.

    Args:
        spec: with the architecture's name in `source`.
        network: the tower with the kept layers.
    """

    def __init__(self, spec: EncoderSpec, network: nn.Module) -> None:
        super().__init__(spec)
        self.network = network

    @classmethod
    def build(cls, spec: EncoderSpec, *, pretrained: bool | str, dtype: torch.dtype) -> Self:
        """Build the tower up to its feature layer, and load its weights strictly."""
        config = architecture(spec.source, spec.name)
        if config["vision_cfg"].get("timm_model_name"):
            return cast("Self", OpenClipTrunk.build(spec, pretrained=pretrained, dtype=dtype))
        network = _cut(_tower(spec, config), spec)
        if pretrained is not False:
            load_native(network, spec, pretrained=pretrained)
        return cls(spec, network.to(dtype))

    def forward_features(self, pixel_values: Tensor) -> VisualTokens:
        """Run the kept layers and join those that are used, prefix apart."""
        spec, network = self.spec, cast("Any", self.network)
        places = [spec.num_layers + layer for layer in spec.layers]
        order = sorted(places)
        found = network.forward_intermediates(
            pixel_values,
            indices=order,
            stop_early=True,
            normalize_intermediates=spec.final_norm,
            intermediates_only=True,
            output_fmt="NCHW" if spec.stages else "NLC",
            output_extra_tokens=not spec.stages,
        )
        tokens = found["image_intermediates"]
        if spec.stages:
            parts = [VisualTokens.from_map(tokens[order.index(place)]) for place in places]
        else:
            grid, prefix = spec.token_spec().grid, found["image_intermediates_prefix"]
            parts = [VisualTokens(tokens[at], grid, prefix[at]) for at in map(order.index, places)]
        return parts[0] if len(parts) == 1 else join_channels(parts)

    def blocks(self) -> list[nn.Module]:
        """Give the kept layers, first to last: blocks, or the stem and the stages of a ResNet."""
        network: Any = self.network
        if not self.spec.stages:
            return list(network.transformer.resblocks)
        # A list holds the stem's modules without taking them from the network.
        stem = nn.ModuleList([getattr(network, name) for name in _STEM])
        return [stem, *(getattr(network, f"layer{stage}") for stage in range(1, self.spec.kept_layers))]


def _tower(spec: EncoderSpec, config: dict[str, Any]) -> Any:
    """Build the tower, without a pool and with the kept blocks alone if it is a ViT."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    options = dict(spec.options)
    if options.pop("attn_implementation", None) not in {None, "sdpa"}:
        raise VlmError(f"{spec.name}: OpenCLIP's own towers have one attention alone; leave attn_implementation out")
    quick_gelu = bool(options.pop("quick_gelu", config.get("quick_gelu", False)))
    vision = {**config["vision_cfg"], **options}
    pooled = vision.get("attentional_pool", False)
    if spec.final_norm and (pooled or spec.stages):
        where = "stands behind its attention pool" if pooled else "is not to be found"
        raise VlmError(f"{spec.name}: the last norm {where}; pass final_norm=False")
    if spec.stages:
        vision |= {"image_size": spec.native_size[0]}
    else:
        vision |= {"image_size": spec.image_size, "layers": spec.kept_layers, "attentional_pool": False}
    try:
        return _build_vision_tower(config["embed_dim"], CLIPVisionCfg(**vision), quick_gelu)
    except REFUSALS as error:
        reason = " ".join(str(error).split())[:300]
        raise VlmError(f"{spec.name}: OpenCLIP cannot build it so ({reason}); leave the options out") from error


def _cut(network: Any, spec: EncoderSpec) -> Any:
    """Drop the head, the norm if it is not used, and the stages behind the feature layer."""
    if not spec.stages:
        network.prune_intermediate_layers([-1], prune_norm=not spec.final_norm)
        return network
    network.attnpool = None
    for stage in range(spec.kept_layers, spec.num_layers):
        setattr(network, f"layer{stage}", nn.Identity())
    return network
