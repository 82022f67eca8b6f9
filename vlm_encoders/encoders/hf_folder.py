"""`hf:` names: an encoder read from a folder's or repository's own config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connectors.errors import VlmError
from vlm_encoders.encoders.weights import read_json, snapshot
from vlm_encoders.spec import EncoderSpec, as_size

__all__ = ["explain"]


@dataclass(frozen=True)
class _Family:
    """A transformers class: its table defaults, and the config entries that change its numbers."""

    name: str
    source: str
    feature_layer: int
    final_norm: bool
    resize: str
    entries: tuple[str, ...]


_ACT = ("hidden_act", "layer_norm_eps")
_DINO = (*_ACT, "qkv_bias", "layerscale_value", "use_swiglu_ffn")
_CLIP = _Family("clip", "CLIPVisionModel", -2, False, "crop", _ACT)
_SIGLIP = _Family("siglip", "SiglipVisionModel", -1, True, "squash", _ACT)
_SAM_ENTRIES = (*_ACT, "qkv_bias", "window_size", "global_attn_indexes", "use_abs_pos", "use_rel_pos")
_SAM = _Family("sam", "SamVisionModel", -1, True, "pad", _SAM_ENTRIES)
_STAGES = ("patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias")
_SWIN_ENTRIES = (*_ACT, *_STAGES, "use_absolute_embeddings", "drop_path_rate")
_REGISTERS = (*_DINO, "num_register_tokens")
_FAMILIES = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "dinov2": _Family("dinov2", "Dinov2Model", -1, True, "crop", _DINO),
    "dinov2_with_registers": _Family("dinov2", "Dinov2WithRegistersModel", -1, True, "crop", _REGISTERS),
    "swin": _Family("swin", "SwinModel", -1, True, "squash", _SWIN_ENTRIES),
    "sam": _SAM,
    "sam_vision_model": _SAM,
}
_FILTERS = {2: "bilinear", 3: "bicubic"}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_COLOURS = {"clip": _OPENAI, "siglip": _HALF}


def explain(name: str, source: str) -> EncoderSpec:
    """Make the spec of `hf:<hub id or folder>`; weights are not fetched.

    Args:
        name: the whole name, which becomes the spec's.
        source: the hub id or folder behind `hf:`.

    Raises:
        VlmError: there is no config.json, or its model_type is none that we read.
    """
    path = Path(source).expanduser()
    folder = path if path.is_dir() else snapshot(source, name, weights=False)
    raw = read_json(folder / "config.json", name)
    family = _FAMILIES.get(raw.get("model_type", ""))
    if family is None:
        raise VlmError(
            f"{name}: model_type '{raw.get('model_type')}' of its config.json is none of {', '.join(_FAMILIES)}; "
            "give one of these, or use timm:"
        )
    import transformers

    config = getattr(transformers, family.source.replace("Model", "Config")).from_pretrained(folder)
    shape = _swin_shape(config) if family.name == "swin" else _vit_shape(config)
    entries = tuple((entry, _plain(getattr(config, entry))) for entry in family.entries if hasattr(config, entry))
    return EncoderSpec(
        name=name,
        family=family.name,
        backend="transformers",
        source=family.source,
        weights=source,
        feature_layer=family.feature_layer,
        final_norm=family.final_norm,
        trained_size=as_size(config.image_size, name),
        options=entries,
        **shape,
        **_preprocessing(folder, family, config.image_size, name),
    )


def _vit_shape(config: Any) -> dict[str, Any]:
    width = config.hidden_size
    prefixes = {"CLIPVisionConfig": 1, "Dinov2Config": 1}
    registers = getattr(config, "num_register_tokens", None)
    mlp = getattr(config, "mlp_dim", None) or getattr(config, "intermediate_size", None)
    return {
        "stride": config.patch_size,
        "dim": getattr(config, "output_channels", width),
        "block_dim": width,
        "heads": config.num_attention_heads,
        "mlp_dim": mlp or int(width * config.mlp_ratio),
        "num_layers": config.num_hidden_layers,
        "num_prefix": prefixes.get(type(config).__name__, 0) if registers is None else 1 + registers,
    }


def _swin_shape(config: Any) -> dict[str, Any]:
    stages = len(config.depths)
    return {
        "stride": config.patch_size * 2 ** (stages - 1),
        "dim": config.embed_dim * 2 ** (stages - 1),
        "block_dim": config.embed_dim,
        "heads": config.num_heads[0],
        "mlp_dim": int(config.embed_dim * config.mlp_ratio),
        "num_layers": sum(config.depths),
    }


def _preprocessing(folder: Path, family: _Family, side: int, name: str) -> dict[str, Any]:
    """Read how images are made into pixels, or fall back on the family's way."""
    found: dict[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file():
        found = read_json(folder / "preprocessor_config.json", name)
    elif (folder / "processor_config.json").is_file():
        found = read_json(folder / "processor_config.json", name).get("image_processor", {})
    colours = _COLOURS.get(family.name, _IMAGENET)
    resample = found.get("resample", 2 if family.name == "sam" else 3)
    if resample not in _FILTERS:
        raise VlmError(f"{name}: resample {resample} of its preprocessor is neither 2 (bilinear) nor 3 (bicubic)")
    return {
        "mean": tuple(found.get("image_mean", colours["mean"])),
        "std": tuple(found.get("image_std", colours["std"])),
        "interpolation": _FILTERS[resample],
        **_placing(found, family, side, name),
    }


def _placing(found: dict[str, Any], family: _Family, side: int, name: str) -> dict[str, Any]:
    size = found.get("size", side)
    if isinstance(size, int):
        # Old files hold one number: a side to cover for the croppers, a square for the others.
        size = {"shortest_edge": size} if family.resize == "crop" else {"height": size, "width": size}
    if family.resize == "pad":
        longest = size.get("longest_edge") or size.get("height") or side
        return {"image_size": as_size(longest, name), "resize": "pad"}
    if "height" in size and not found.get("do_center_crop", False):
        return {"image_size": (size["height"], size["width"]), "resize": "squash"}
    shortest = size.get("shortest_edge") or min(size["height"], size["width"])
    crop = found.get("crop_size", shortest) if found.get("do_center_crop", True) else shortest
    crop = crop if isinstance(crop, int) else (crop["height"], crop["width"])
    goal = as_size(crop, name)
    return {"image_size": goal, "resize": "crop", "crop_pct": min(goal) / shortest}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
