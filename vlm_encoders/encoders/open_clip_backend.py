"""Vision towers of OpenCLIP."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from connectors.errors import UnknownNameError, VlmError
from connectors.registry import nearest
from connectors.tokens import VisualTokens
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.weights import find_weights, load_state
from vlm_encoders.spec import EncoderSpec, Resize

__all__ = ["OpenClipEncoder", "explain"]

_RESIZES: dict[str, Resize] = {"shortest": "crop", "squash": "squash"}
# OpenCLIP builds a text tower with every vision tower; this one weighs nothing.
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


class OpenClipEncoder(Encoder):
    """A ViT tower of OpenCLIP, cut behind its feature layer.

    Source: open_clip's `VisionTransformer.forward_intermediates`.

    Args:
        spec: with the architecture's name in `source`.
        network: the tower with the kept blocks.
    """

    def __init__(self, spec: EncoderSpec, network: nn.Module) -> None:
        super().__init__(spec)
        tower: Any = network
        tower.prune_intermediate_layers([-1], prune_norm=not spec.final_norm)
        self.network = network

    @classmethod
    def build(cls, spec: EncoderSpec, *, pretrained: bool | str, dtype: torch.dtype) -> Self:
        """Build the tower up to its feature layer, and load its weights strictly."""
        import open_clip

        config = _architecture(spec.source, spec.name)
        options = dict(spec.options)
        quick_gelu = bool(options.pop("quick_gelu", config.get("quick_gelu", False)))
        vision = {**config["vision_cfg"], **options, "layers": spec.kept_layers, "image_size": spec.image_size}
        try:
            clip = open_clip.CLIP(config["embed_dim"], vision, _NO_TEXT, quick_gelu=quick_gelu)
        except TypeError as error:
            raise VlmError(f"{spec.name}: OpenCLIP cannot build it so ({error}); leave the option out") from error
        if pretrained is not False:
            _load(clip, spec, pretrained=pretrained)
        return cls(spec, clip.visual.to(dtype))

    def forward_features(self, pixel_values: Tensor) -> VisualTokens:
        """Run the kept blocks and take the prefix apart."""
        network: Any = self.network
        found = network.forward_intermediates(
            pixel_values,
            indices=[-1],
            normalize_intermediates=self.spec.final_norm,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        (tokens,), (prefix,) = found["image_intermediates"], found["image_intermediates_prefix"]
        return VisualTokens(tokens, self.token_spec.grid, prefix)

    def blocks(self) -> list[nn.Module]:
        """Give the kept blocks, first to last."""
        network: Any = self.network
        return list(network.transformer.resblocks)


def explain(name: str, source: str) -> EncoderSpec:
    """Make the spec of `open_clip:<arch>/<tag>`; nothing is built or fetched.

    Args:
        name: the whole name, which becomes the spec's.
        source: the architecture and the tag of its weights.

    Raises:
        UnknownNameError: OpenCLIP has no such architecture or tag.
        VlmError: the tower is no ViT of OpenCLIP's own.
    """
    import open_clip

    arch, _, tag = source.partition("/")
    config = _architecture(arch, name)
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if tag not in tags:
        raise UnknownNameError(f"{name}: '{arch}' has no weights '{tag}'; {nearest(tag, tags)}")
    weights = open_clip.get_pretrained_cfg(arch, tag)
    vision = open_clip.CLIPVisionCfg(**config["vision_cfg"])
    resize = _RESIZES.get(weights.get("resize_mode", "shortest"))
    if resize is None:
        raise VlmError(f"{name}: its resize mode '{weights['resize_mode']}' is neither shortest nor squash")
    side = vision.image_size
    # The last part of a hub entry is a file's name, or empty.
    hub_id = "/".join(weights.get("hf_hub", "").split("/")[:2])
    quick_gelu = config.get("quick_gelu", False) or weights.get("quick_gelu", False)
    return EncoderSpec(
        name=name,
        family="clip",
        backend="open_clip",
        source=arch,
        weights=hub_id or None,
        image_size=(side, side) if isinstance(side, int) else tuple(side),
        stride=vision.patch_size,
        dim=vision.width,
        heads=vision.width // vision.head_width,
        mlp_dim=int(vision.width * vision.mlp_ratio),
        num_layers=vision.layers,
        num_prefix=1,
        feature_layer=-2,
        mean=tuple(weights["mean"]),
        std=tuple(weights["std"]),
        interpolation=weights["interpolation"],
        resize=resize,
        reference="https://github.com/mlfoundations/open_clip",
        options=(("quick_gelu", quick_gelu),),
    )


def _architecture(arch: str, name: str) -> dict[str, Any]:
    import open_clip

    config: dict[str, Any] | None = open_clip.get_model_config(arch)
    if config is None:
        raise UnknownNameError(
            f"{name}: OpenCLIP has no architecture '{arch}'; {nearest(arch, open_clip.list_models())}"
        )
    vision = config["vision_cfg"]
    if vision.get("timm_model_name"):
        raise VlmError(f"{name}: its tower is timm's; use 'timm:{vision['timm_model_name']}'")
    if not isinstance(vision.get("layers"), int):
        raise VlmError(f"{name}: '{arch}' is no ViT, so its tokens have no blocks to be read at; use a ViT")
    return config


def _load(clip: Any, spec: EncoderSpec, *, pretrained: bool | str) -> None:
    """Load the vision tower strictly, without the blocks behind the feature layer."""
    from open_clip.model import resize_pos_embed

    path = find_weights(spec.name, spec.weights, pretrained=pretrained)
    behind = tuple(f"visual.transformer.resblocks.{index}." for index in range(spec.kept_layers, spec.num_layers))
    state = load_state(path, spec.name)
    state = {key: value for key, value in state.items() if key.startswith("visual.") and not key.startswith(behind)}
    if not state:
        raise VlmError(f"{spec.name}: weights in '{path}' hold no 'visual.' tower; give an OpenCLIP checkpoint")
    resize_pos_embed(state, clip)
    try:
        clip.visual.load_state_dict({key.removeprefix("visual."): value for key, value in state.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise VlmError(f"{spec.name}: weights do not fit: {reason}; give a checkpoint of this encoder") from error
