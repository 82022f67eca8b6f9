"""Vision models of timm: ViT-like, SAM and staged ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from connectors.errors import UnknownNameError, VlmError
from connectors.registry import nearest
from connectors.tokens import VisualTokens
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.weights import find_weights, load_state, read_json
from vlm_encoders.spec import EncoderSpec

__all__ = ["TimmEncoder", "explain"]


class TimmEncoder(Encoder):
    """A model of timm, cut behind its feature layer.

    Source: timm's `create_model`, `forward_intermediates`, `prune_intermediate_layers`.

    Args:
        spec: with the model's name in `source`.
        network: the model with the kept blocks.
    """

    def __init__(self, spec: EncoderSpec, network: nn.Module) -> None:
        super().__init__(spec)
        if hasattr(network, "neck") and (spec.feature_layer != -1 or not spec.final_norm):
            raise VlmError(f"{spec.name}: its tokens come from the neck; leave feature_layer and final_norm out")
        model: Any = network
        model.prune_intermediate_layers(indices=[-1], prune_norm=not spec.final_norm, prune_head=True)
        if spec.image_size != spec.native_size and hasattr(model, "set_input_size"):
            _set_size(model, spec)
        self.network = network

    @classmethod
    def build(cls, spec: EncoderSpec, *, pretrained: bool | str, dtype: torch.dtype) -> Self:
        """Build the model up to its feature layer, and load its weights strictly."""
        import timm

        arguments: dict[str, Any] = {"num_classes": 0, **dict(spec.options)}
        if spec.kept_layers < spec.num_layers:
            arguments["depth"] = spec.kept_layers
        if pretrained is not False:
            path = find_weights(spec.name, spec.weights, pretrained=pretrained)
            arguments["pretrained_cfg_overlay"] = {"state_dict": _kept_state(spec, path), "num_classes": 0}
        try:
            network = timm.create_model(spec.source, pretrained=pretrained is not False, **arguments)
        except TypeError as error:
            option = "feature_layer" if "'depth'" in str(error) else "the option"
            raise VlmError(f"{spec.name}: timm cannot build it so ({error}); leave {option} out") from error
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:400]
            raise VlmError(f"{spec.name}: weights do not fit: {reason}; give a checkpoint of this encoder") from error
        return cls(spec, network.to(dtype))

    def forward_features(self, pixel_values: Tensor) -> VisualTokens:
        """Run the kept blocks and take the prefix apart."""
        return _tokens(self.network, pixel_values, final_norm=self.spec.final_norm)

    def blocks(self) -> list[nn.Module]:
        """Give the kept blocks, first to last."""
        return _blocks(self.network)


def explain(name: str, source: str) -> EncoderSpec:
    """Make the spec of `timm:<model>` or of a folder that timm's `save_for_hf` wrote.

    The model is built without memory (on the meta device); weights are not fetched.

    Args:
        name: the whole name, which becomes the spec's.
        source: the model's name, with its tag, or the folder.

    Raises:
        UnknownNameError: timm has no such model.
        VlmError: the model's class has no blocks that we can name, or is not supported yet.
    """
    import timm

    folder = Path(source).expanduser()
    config = _read_config(folder, name) if folder.is_dir() else {}
    model_name = config.get("architecture", source)
    if not timm.is_model(model_name):
        raise UnknownNameError(f"timm has no model '{model_name}'; {nearest(model_name, timm.list_models())}")
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in config.get("model_args", {}).items()}
    with torch.device("meta"), torch.no_grad():
        try:
            network: Any = timm.create_model(model_name, **{**options, "num_classes": 0})
        except RuntimeError as error:
            raise UnknownNameError(f"{name}: {error}; the tag is what follows the dot") from error
        data = timm.data.resolve_model_data_config(network.eval(), pretrained_cfg=config.get("pretrained_cfg"))
        size = _own_size(network) or data["input_size"][1:]
        visual, blocks = _probe(network, size, name)
    known = network.pretrained_cfg
    if visual.grid is None or not blocks:
        raise VlmError(
            f"{name}: {type(network).__name__} has no blocks in the way of ViT, Swin or SAM; use another model"
        )
    return EncoderSpec(
        name=name,
        family="timm",
        backend="timm",
        source=model_name,
        weights=str(folder) if config else known.get("hf_hub_id"),
        image_size=(size[0], size[1]),
        stride=size[0] // visual.grid[0],
        dim=visual.tokens.shape[2],
        block_dim=getattr(network, "embed_dim", None),
        heads=getattr(getattr(blocks[0], "attn", None), "num_heads", 0),
        mlp_dim=getattr(getattr(getattr(blocks[0], "mlp", None), "fc1", None), "out_features", 0),
        num_layers=len(blocks),
        num_prefix=visual.spec.num_prefix,
        final_norm=True,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=_filter(data["interpolation"], name),
        resize="squash" if data["crop_mode"] == "squash" else "crop",
        crop_pct=data["crop_pct"],
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        licence=known.get("license") or "",
        reference=known.get("origin_url") or "timm",
        options=tuple(options.items()),
    )


def _probe(network: Any, size: tuple[int, int], name: str) -> tuple[VisualTokens, list[Any]]:
    try:
        network.prune_intermediate_layers(indices=[-1], prune_norm=False, prune_head=True)
        return _tokens(network, torch.zeros(1, 3, *size), final_norm=True), _blocks(network)
    except Exception as error:
        # Not all of timm's classes have ViT's methods, and each that has not fails in its own way.
        kind = type(network).__name__
        raise VlmError(f"{name}: {kind} is not supported yet ({error}); use a ViT, Swin or SAM of timm") from error


def _tokens(network: Any, pixels: Tensor, *, final_norm: bool) -> VisualTokens:
    count = getattr(network, "num_prefix_tokens", None)
    if count is None:
        maps = network.forward_intermediates(
            pixels, indices=[-1], norm=final_norm, output_fmt="NCHW", intermediates_only=True
        )
        return VisualTokens.from_map(maps[0])
    (found,) = network.forward_intermediates(
        pixels, indices=[-1], norm=final_norm, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    tokens, prefix = found if count else (found, None)
    rows, columns = (int(side) for side in network.patch_embed.dynamic_feat_size(pixels.shape[2:]))
    return VisualTokens(tokens, (rows, columns), prefix)


def _blocks(network: Any) -> list[Any]:
    if hasattr(network, "blocks"):
        return list(network.blocks)
    stages = getattr(network, "layers", None) or getattr(network, "stages", None) or []
    return [block for stage in stages for block in getattr(stage, "blocks", [])]


def _kept_state(spec: EncoderSpec, path: Path) -> dict[str, Tensor]:
    """Read the weights without the heads and the blocks behind the feature layer."""
    behind = tuple(f"blocks.{index}." for index in range(spec.kept_layers, spec.num_layers))
    state = load_state(path, spec.name)
    return {key: value for key, value in state.items() if not key.startswith((*behind, "head.", "head_dist."))}


def _set_size(model: Any, spec: EncoderSpec) -> None:
    try:
        model.set_input_size(img_size=spec.image_size)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise VlmError(
            f"{spec.name}: cannot take views of {spec.image_size} px: {error}; leave image_size out"
        ) from error


def _own_size(network: Any) -> tuple[int, int] | None:
    return getattr(getattr(network, "patch_embed", None), "img_size", None)


def _filter(found: str, name: str) -> Any:
    if found not in {"bicubic", "bilinear"}:
        raise VlmError(f"{name}: its interpolation '{found}' is neither bicubic nor bilinear; register a spec instead")
    return found


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "config.json"
    config = read_json(path, name, writer="timm's save_for_hf")
    if "architecture" not in config:
        raise VlmError(f"{name}: '{path}' names no timm architecture; use 'hf:{folder}' for a transformers checkpoint")
    return config
