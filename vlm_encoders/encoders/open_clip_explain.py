"""Specs of OpenCLIP's vision towers by architecture, with or without the tag of released weights."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

from connectors.errors import UnknownNameError, VlmError
from connectors.registry import nearest
from vlm_encoders.encoders.openclip import OPEN_CLIP_TABLE
from vlm_encoders.encoders.timm_explain import explain_model
from vlm_encoders.spec import EncoderSpec, Resize, Stage, as_size

__all__ = ["architecture", "explain", "open_clip_names", "trunk_options"]

_RESIZES: dict[str, Resize] = {"shortest": "crop", "squash": "squash"}
_CROPS = {"crop": "center", "squash": "squash"}


def open_clip_names() -> list[str]:
    """List all architectures, alone and with each tag; each is an encoder by `open_clip:<name>`."""
    import open_clip

    tagged = {arch: open_clip.list_pretrained_tags_by_model(arch) for arch in open_clip.list_models()}
    return [name for arch, tags in tagged.items() for name in (arch, *(f"{arch}/{tag}" for tag in tags))]


@cache
def explain(name: str, source: str) -> EncoderSpec:
    """Make the spec of `open_clip:<arch>` or `open_clip:<arch>/<tag>`; nothing is fetched.

    Towers that a CLS token or an average pools are read one block before the end, as in
    LLaVA; those under an attention pool, and staged ones, at their end, behind the last
    norm if they have one.

    Args:
        name: the whole name, which becomes the spec's.
        source: the architecture, and the tag of its weights if there are any.

    Raises:
        UnknownNameError: OpenCLIP has no such architecture or tag.
        VlmError: the weights want other pixels than this package makes.
    """
    import open_clip

    arch, slash, tag = source.partition("/")
    config = architecture(arch, name)
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if slash and tag not in tags:
        raise UnknownNameError(f"{name}: '{arch}' has no weights '{tag}'; {nearest(tag, tags)}")
    released = open_clip.get_pretrained_cfg(arch, tag) if tag else {}
    pixels = _pixels(name, released)
    fields = _trunk(name, config, pixels) if config["vision_cfg"].get("timm_model_name") else _native(config, released)
    return EncoderSpec(
        name=name,
        family="clip",
        backend="open_clip",
        source=arch,
        # The last part of a hub entry is a file's name, or empty.
        weights="/".join(released.get("hf_hub", "").split("/")[:2]) or None,
        reference="https://github.com/mlfoundations/open_clip",
        **fields,
        **pixels,
    )


def architecture(arch: str, name: str) -> dict[str, Any]:
    """Give OpenCLIP's config of an architecture.

    Raises:
        UnknownNameError: there is no such architecture.
    """
    import open_clip

    config: dict[str, Any] | None = open_clip.get_model_config(arch)
    if config is None:
        raise UnknownNameError(
            f"{name}: OpenCLIP has no architecture '{arch}'; {nearest(arch, open_clip.list_models())}"
        )
    return config


def trunk_options(vision: dict[str, Any]) -> dict[str, Any]:
    """Give the arguments of timm's `create_model` with which OpenCLIP builds a trunk."""
    options = {"drop_path_rate": vision.get("timm_drop_path"), "patch_drop_rate": vision.get("patch_dropout") or None}
    if vision.get("timm_proj") not in {"linear", "mlp"}:
        # It decides whether the last norm stands before the pool.
        options["global_pool"] = vision.get("timm_pool", "avg")
    return {key: value for key, value in options.items() if value is not None}


def _pixels(name: str, released: dict[str, Any]) -> dict[str, Any]:
    from open_clip.transform import PreprocessCfg

    found = {**dataclasses.asdict(PreprocessCfg()), **released}
    resize = _RESIZES.get(found["resize_mode"])
    if resize is None:
        raise VlmError(f"{name}: its resize mode '{found['resize_mode']}' is neither shortest nor squash")
    return {
        "mean": tuple(found["mean"]),
        "std": tuple(found["std"]),
        "interpolation": found["interpolation"],
        "resize": resize,
    }


def _native(config: dict[str, Any], released: dict[str, Any]) -> dict[str, Any]:
    import open_clip

    vision = open_clip.CLIPVisionCfg(**config["vision_cfg"])
    common = {"image_size": as_size(vision.image_size, "open_clip"), "parameters": _parameters(config)}
    if not isinstance(vision.layers, int):
        width = vision.width
        # The first is the stem, as in OpenCLIP's own count.
        stages = (Stage(width, 4), *(Stage(width * 2**power, 2**power) for power in (2, 3, 4, 5)))
        return {**common, "stages": stages, "num_layers": 5, "dim": width * 32, "stride": 32}
    # The weights know how they were trained; the architecture's own flag may not.
    quick_gelu = config.get("quick_gelu", False) or released.get("quick_gelu", False)
    return {
        **common,
        "stride": vision.patch_size,
        "dim": vision.width,
        "heads": vision.width // vision.head_width,
        "mlp_dim": int(vision.width * vision.mlp_ratio),
        "num_layers": vision.layers,
        "num_prefix": 1,
        "prefix_kinds": ("cls",),
        "feature_layer": -2,
        "positions": OPEN_CLIP_TABLE,
        "options": (("quick_gelu", quick_gelu),),
    }


def _parameters(config: dict[str, Any]) -> int:
    """Count the weights of a tower of OpenCLIP's own without its pool and projection, on the meta device."""
    import torch
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    with torch.device("meta"):
        tower = _build_vision_tower(
            config["embed_dim"], CLIPVisionCfg(**{**config["vision_cfg"], "attentional_pool": False})
        )
    sizes = {name: parameter.numel() for name, parameter in tower.named_parameters()}
    return sum(size for name, size in sizes.items() if name != "proj" and not name.startswith("attnpool."))


def _trunk(name: str, config: dict[str, Any], pixels: dict[str, Any]) -> dict[str, Any]:
    vision = config["vision_cfg"]
    size = as_size(vision["image_size"], name)
    data = {**pixels, "input_size": (3, *size), "crop_pct": 1.0, "crop_mode": _CROPS[pixels["resize"]]}
    spec = explain_model(name, vision["timm_model_name"], trunk_options(vision), data)
    if vision.get("timm_pool") == "token":
        spec = spec.at_layer(-2)
    ours = {"name", "family", "backend", "source", "weights", "licence", "reference", *pixels}
    told = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return {key: value for key, value in told.items() if key not in ours}
