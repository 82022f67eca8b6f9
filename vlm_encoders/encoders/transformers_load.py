"""Configs and weights of transformers' vision towers, cut and loaded strictly."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from connectors.errors import VlmError
from connectors.registry import nearest
from vlm_encoders.encoders.weights import load_state, weight_files
from vlm_encoders.spec import EncoderSpec

__all__ = ["TOWERS", "Tower", "load_tower", "require_tower", "tower_config"]


@dataclass(frozen=True)
class Tower:
    """How one class of transformers is read.

    Attributes:
        norm: the last norm's attribute; "" where the neck takes its place.
        norm_inside: whether `last_hidden_state` is behind that norm.
        any_size: whether `interpolate_pos_encoding` must be asked for off the native size.
        dropped: keys of full checkpoints that the tower has no use for.
    """

    norm: str
    norm_inside: bool
    any_size: bool
    dropped: str


# What a config and the encoder must agree on, or the numbers are others.
_SHAPE = (
    *("hidden_size", "embed_dim", "patch_size", "image_size", "num_attention_heads", "hidden_act", "layer_norm_eps"),
    *("num_register_tokens", "use_swiglu_ffn", "window_size", "global_attn_indexes", "depths"),
)
_ATTRIBUTES = {"attn_implementation": "_attn_implementation"}
_TEXT = r"(text_model|text_projection|visual_projection|logit_scale|logit_bias)\b"
_IDS = r"|(.*\.)?position_ids$"
TOWERS = {
    "CLIPVisionModel": Tower("post_layernorm", False, True, _TEXT + r"|(vision_model\.)?post_layernorm\." + _IDS),
    "SiglipVisionModel": Tower(
        "post_layernorm", True, True, _TEXT + r"|(vision_model\.)?(head|post_layernorm)\." + _IDS
    ),
    "Dinov2Model": Tower("layernorm", True, False, r"classifier\.|(dinov2\.)?(layernorm\.|embeddings\.mask_token$)"),
    "Dinov2WithRegistersModel": Tower("layernorm", True, False, r"classifier\.|(dinov2_with_registers\.)?layernorm\."),
    "SwinModel": Tower("layernorm", True, False, r"classifier\.|(swin\.)?layernorm\.|pooler\."),
    "SamVisionModel": Tower("", True, False, r"(mask_decoder|prompt_encoder|shared_image_embedding)\."),
}


def require_tower(spec: EncoderSpec) -> None:
    """Refuse what the class cannot do, before anything is built or fetched."""
    if spec.source not in TOWERS:
        raise VlmError(f"{spec.name}: transformers class '{spec.source}' is not one of {', '.join(TOWERS)}")
    if spec.source in {"SamVisionModel", "SwinModel"} and (spec.feature_layer != -1 or not spec.final_norm):
        end = "neck" if spec.source == "SamVisionModel" else "last stage"
        raise VlmError(
            f"{spec.name}: its tokens come from the {end}; feature layer {spec.feature_layer} with "
            f"final_norm={spec.final_norm} is not to be had, leave both out"
        )


def tower_config(spec: EncoderSpec) -> Any:
    """Make the class's config from the spec, with the kept blocks alone."""
    import transformers

    options = {key: list(value) if isinstance(value, tuple) else value for key, value in spec.options}
    config = getattr(transformers, spec.source.replace("Model", "Config"))
    _check_options(spec, config(), options)
    if spec.source == "SwinModel":
        return config(image_size=_side(spec), **options)
    shape: dict[str, object] = {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.kept_layers,
        "num_attention_heads": spec.heads,
        "patch_size": spec.stride,
        "image_size": _side(spec),
    }
    if spec.source.startswith("Dinov2"):
        shape["mlp_ratio"] = spec.mlp_dim // spec.width
    elif spec.source == "SamVisionModel":
        shape |= {"mlp_dim": spec.mlp_dim, "output_channels": spec.dim}
    else:
        shape["intermediate_size"] = spec.mlp_dim
    return config(**(shape | _fixed(spec) | options))


def _check_options(spec: EncoderSpec, config: Any, options: dict[str, Any]) -> None:
    """Refuse a misspelt option: a config would keep it and nobody would read it."""
    for option in options:
        if not hasattr(config, _ATTRIBUTES.get(option, option)):
            known = [key for key in config.to_dict() if not key.startswith("_")]
            raise VlmError(f"{spec.name}: {spec.source} has no option '{option}'; {nearest(option, known)}")


def _fixed(spec: EncoderSpec) -> dict[str, object]:
    """Give the config entries that drop heads, for random and loaded weights alike."""
    if spec.source == "SiglipVisionModel":
        return {"vision_use_head": False}
    return {"use_mask_token": False} if spec.source == "Dinov2Model" else {}


def _side(spec: EncoderSpec) -> int:
    # SAM's position tables have the size that it is built for; the others interpolate.
    height, width = spec.image_size if spec.source == "SamVisionModel" else spec.native_size
    if height != width:
        raise VlmError(f"{spec.name}: transformers builds it for square views alone, got {height}x{width}; use a side")
    return height


def load_tower(model: Any, spec: EncoderSpec, path: Path, dtype: torch.dtype, extra: dict[str, Any]) -> nn.Module:
    """Load the kept blocks strictly: every weight found, and every other one accounted for."""
    from safetensors import SafetensorError

    folder = path.parent if path.is_file() else path
    if not (folder / "config.json").is_file():
        raise VlmError(f"{spec.name}: folder '{folder}' has no config.json; transformers' save_pretrained writes one")
    weight_files(path, spec.name)
    if spec.source == "SamVisionModel" and spec.image_size != spec.native_size:
        raise VlmError(
            f"{spec.name}: SAM's released weights fit views of {spec.native_size} px alone, got {spec.image_size}; "
            "leave image_size out, pass pretrained=False, or use timm:samvit_base_patch16.sa1b"
        )
    config = model.config_class.from_pretrained(folder, **_fixed(spec))
    wanted = tower_config(spec)
    _compare(config, wanted, spec, folder)
    if spec.source != "SwinModel":
        config.num_hidden_layers = spec.kept_layers
    for option, _ in spec.options:
        setattr(config, _ATTRIBUTES.get(option, option), getattr(wanted, _ATTRIBUTES.get(option, option)))
    where = {"state_dict": load_state(path, spec.name)} if path.is_file() else {"local_files_only": True}
    try:
        with _quiet():
            network, report = model.from_pretrained(
                None if path.is_file() else folder,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                **where,
                **extra,
            )
    except (RuntimeError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        raise VlmError(f"{spec.name}: weights in '{path}' cannot be loaded: {reason}") from error
    _check_report(report, spec, path)
    result: nn.Module = network
    return result


def _check_report(report: dict[str, Any], spec: EncoderSpec, path: Path) -> None:
    """Refuse weights that are missing, or left over though they are no head and no cut block."""
    behind = "|".join(str(index) for index in range(spec.kept_layers, spec.num_layers))
    cut = rf"|(.*\.)?layers?\.({behind})\." if behind else ""
    dropped = re.compile(TOWERS[spec.source].dropped + cut)
    norm = TOWERS[spec.source].norm
    needed = [key for key in report["missing_keys"] if spec.final_norm or not key.startswith(f"{norm}.")]
    unexpected = [key for key in report["unexpected_keys"] if not dropped.match(key)]
    if needed or unexpected:
        raise VlmError(
            f"{spec.name}: weights in '{path}' do not fit {spec.source}: {_few('missing', needed)}, "
            f"{_few('unexpected', unexpected)}; give a checkpoint of this encoder"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' report of dropped heads to ourselves: `_check_report` reads it."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _compare(found: Any, expected: Any, spec: EncoderSpec, folder: Path) -> None:
    """Refuse a checkpoint of another shape, by what its config says."""
    for key in _SHAPE:
        theirs, ours = getattr(found, key, None), getattr(expected, key, None)
        if theirs != ours:
            raise VlmError(
                f"{spec.name}: '{folder}' has {key} {theirs}, the encoder has {ours}; "
                f"use 'hf:{folder}' to take the folder as it is"
            )


def _few(kind: str, keys: list[str]) -> str:
    keys = sorted(keys)
    return f"{len(keys)} {kind}" + (f" ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "")
