"""Encoders by name: the table, plugins, and names that a library or folder explains."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectors.errors import UnknownNameError, VlmError
from connectors.registry import Registry
from connectors.tokens import Grid
from vlm_encoders.spec import EncoderSpec, Layers, Resize

if TYPE_CHECKING:
    import torch

    from vlm_encoders.encoder import Encoder

__all__ = ["build_encoder", "chosen_spec", "create_encoder", "encoder_spec", "list_encoders", "register_encoder"]

_TABLES = (
    "vlm_encoders.encoders.clip",
    "vlm_encoders.encoders.openclip",
    "vlm_encoders.encoders.siglip",
    "vlm_encoders.encoders.dinov2",
    "vlm_encoders.encoders.dinov3",
    "vlm_encoders.encoders.vit",
    "vlm_encoders.encoders.deit",
    "vlm_encoders.encoders.internvit",
    "vlm_encoders.encoders.aimv2",
    "vlm_encoders.encoders.mlcd",
    "vlm_encoders.encoders.beit",
    "vlm_encoders.encoders.ijepa",
    "vlm_encoders.encoders.swin",
    "vlm_encoders.encoders.eva",
    "vlm_encoders.encoders.pe",
    "vlm_encoders.encoders.convnext",
    "vlm_encoders.encoders.hiera",
    "vlm_encoders.encoders.naflexvit",
    "vlm_encoders.encoders.sam",
    "vlm_encoders.encoders.sam2",
    "vlm_encoders.encoders.sam3",
    "vlm_encoders.encoders.dinov3_convnext",
    "vlm_encoders.encoders.siglip2_naflex",
    "vlm_encoders.encoders.radio",
    "vlm_encoders.encoders.pixtral",
    "vlm_encoders.encoders.qwen",
)
_BACKENDS = {
    "transformers": "vlm_encoders.encoders.transformers_backend:TransformersEncoder",
    "timm": "vlm_encoders.encoders.timm_backend:TimmEncoder",
    "open_clip": "vlm_encoders.encoders.open_clip_backend:OpenClipEncoder",
}
_EXPLAINERS = {
    "hf": "vlm_encoders.encoders.hf_folder:explain",
    "timm": "vlm_encoders.encoders.timm_backend:explain",
    "open_clip": "vlm_encoders.encoders.open_clip_backend:explain",
}
_JOINTS = {
    "fused": "vlm_encoders.encoders.fused_spec:explain",
    "multiscale": "vlm_encoders.encoders.multiscale_spec:explain",
}


def register_encoder(*specs: EncoderSpec) -> None:
    """Register encoders under their exact names.

    Raises:
        DuplicateNameError: a name is taken.
    """
    registry = _registry()
    for spec in specs:
        registry.register(spec.name, spec, f"{spec.backend} '{spec.source}'")


def list_encoders(pattern: str = "*", family: str | None = None) -> list[str]:
    """List the encoder names that match a shell pattern, plugins included.

    Args:
        pattern: of the name, such as "*-l-14*".
        family: only of this family.
    """
    registry = _registry()
    return [name for name in registry.names(pattern) if family is None or registry.get(name).family == family]


def encoder_spec(name: str, *, revision: str | None = None) -> EncoderSpec:
    """Find an encoder's spec by its exact name.

    Args:
        name: a registered name, `timm:<model or folder>`, `open_clip:<arch>/<tag>` or
            `hf:<hub id or folder>`, which may import their library; or a joint of these,
            `fused:<name>+<name>` or `multiscale:<name>`, see `encoders.joint_name`.
        revision: commit, tag or branch of a hub repository whose config an `hf:` name stands for.

    Raises:
        UnknownNameError: nothing has this name; the nearest names are given.
    """
    if not isinstance(name, str):
        raise VlmError(f"an encoder is known by its name, got a {type(name).__name__}; give a string")
    prefix, colon, rest = name.partition(":")
    # A joint may hold options between its word and the colon.
    joint, bracket, _ = prefix.partition("[")
    spec: EncoderSpec
    if joint in _JOINTS and (colon or bracket):
        spec = _load(_JOINTS[joint])(name)
    elif colon and prefix in _EXPLAINERS:
        pinned = {"revision": revision} if prefix == "hf" and revision else {}
        spec = _load(_EXPLAINERS[prefix])(name, rest, **pinned)
    elif colon and prefix.isidentifier() and name not in _registry().names():
        doors = ", ".join(f"{door}:" for door in (*_EXPLAINERS, *_JOINTS))
        raise UnknownNameError(f"no encoder '{name}'; a name with a colon begins with one of {doors}")
    else:
        spec = _registry().get(name)
    return spec


def chosen_spec(
    name: str,
    *,
    image_size: int | Grid | None = None,
    feature_layer: Layers | None = None,
    final_norm: bool | None = None,
    fields: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> EncoderSpec:
    """Find a spec and change it as `create_encoder` does before it builds.

    Args:
        name: as in `encoder_spec`.
        image_size: as in `create_encoder`.
        feature_layer: as in `create_encoder`.
        final_norm: as in `create_encoder`.
        fields: fields of the spec to be set, such as `resize`.
        options: build arguments of the backend, over those of the spec.

    Raises:
        UnknownNameError: nothing has this name.
        VlmError: the size or the layer does not fit the encoder.
    """
    spec = encoder_spec(name, revision=(fields or {}).get("revision"))
    if image_size is not None:
        spec = spec.resized(image_size)
    spec = spec.at_layer(feature_layer, final_norm=final_norm)
    merged = tuple({**dict(spec.options), **(options or {})}.items())
    return spec.altered(options=merged, **(fields or {}))


def build_encoder(spec: EncoderSpec, *, pretrained: bool | str, dtype: torch.dtype) -> Encoder:
    """Build the encoder of a spec as it stands, in eval mode; its origin stays empty.

    Raises:
        VlmError: the weights or options do not fit, or the depth is not the spec's.
    """
    backend: type[Encoder] = _load(_BACKENDS.get(spec.backend, spec.backend))
    encoder = backend.build(spec, pretrained=pretrained, dtype=dtype).eval()
    built = len(encoder.blocks())
    if built != spec.kept_layers:
        raise VlmError(
            f"{spec.name}: {built} blocks were built, its spec says {spec.kept_layers}; choose the depth by "
            "feature_layer, or register a spec of that depth"
        )
    return encoder


def create_encoder(
    name: str,
    *,
    pretrained: bool | str | Path = True,
    image_size: int | Grid | None = None,
    feature_layer: Layers | None = None,
    final_norm: bool | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    resize: Resize | None = None,
    exact_pixels: bool = False,
    **options: Any,
) -> Encoder:
    """Build an encoder up to its feature layer.

    Args:
        name: as in `encoder_spec`.
        pretrained: True for the released weights, False for random ones, or a local
            folder or file that holds them.
        image_size: one side or (height, width) of a view, px; None for the spec's own.
        feature_layer: the layer whose output is used, from the end, -1 the last; several
            are joined channel by channel; None for the spec's own.
        final_norm: whether the network's last norm, or its neck, is applied; None for the
            spec's own at its own feature layer, and no norm at another.
        dtype: of the parameters, such as "bfloat16"; None for float32.
        attn_implementation: "sdpa", "eager" or another that the library has; None for its own choice.
        revision: commit, tag or branch of the weights on the hub; None for the spec's own,
            else the cached or newest main.
        resize: how images become views, as in `EncoderSpec`; None for the spec's own.
        exact_pixels: make pixels bit-equal to the library's Pillow path; slower.
        **options: build arguments of the backend, over those of the spec.

    Raises:
        UnknownNameError: nothing has this name.
        VlmError: the size, the layer or the weights do not fit the encoder.
    """
    import torch

    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    chosen_pixels = {"resize": resize, "revision": revision, "exact_pixels": exact_pixels or None}
    fields: dict[str, Any] = {key: value for key, value in chosen_pixels.items() if value is not None}
    spec = chosen_spec(
        name,
        image_size=image_size,
        feature_layer=feature_layer,
        final_norm=final_norm,
        fields=fields,
        options=options,
    )
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise VlmError(f"{name}: '{dtype}' is no dtype; use float32, bfloat16 or float16")
    if revision is not None and pretrained is not True:
        raise VlmError(
            f"{name}: revision '{revision}' is of weights on the hub, pretrained={pretrained} is not; leave one out"
        )
    # The backends say themselves where weights are to be had; a plugin may forget to ask.
    if pretrained is True and spec.weights is None and not spec.encodings and spec.backend not in _BACKENDS:
        raise VlmError(f"{name}: no released weights are known; pass pretrained=False or a folder or file with weights")
    weights = str(pretrained) if isinstance(pretrained, Path) else pretrained
    encoder = build_encoder(spec, pretrained=weights, dtype=chosen)
    encoder.origin = {
        "name": name,
        "pretrained": weights,
        **spec.choices,
        "dtype": str(chosen).removeprefix("torch."),
        **fields,
        **options,
    }
    return encoder


def _accept(point: EntryPoint, loaded: object) -> list[tuple[str, EncoderSpec]]:
    specs = [loaded] if isinstance(loaded, EncoderSpec) else list(loaded) if isinstance(loaded, Iterable) else []
    found = [(spec.name, spec) for spec in specs if isinstance(spec, EncoderSpec)]
    if not found or len(found) != len(specs):
        raise VlmError(f"entry point {point.name} = {point.value} is neither an EncoderSpec nor several of them")
    return found


@cache
def _registry() -> Registry[EncoderSpec]:
    registry: Registry[EncoderSpec] = Registry("encoder", "vlm_encoders.encoders", {}, _accept)
    for table in _TABLES:
        for spec in importlib.import_module(table).SPECS:
            registry.register(spec.name, spec, table)
    return registry


def _load(target: str) -> Any:
    module, colon, attribute = target.partition(":")
    if not colon:
        raise VlmError(f"backend '{target}' is none of {', '.join(_BACKENDS)}, nor 'package.module:EncoderClass'")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise VlmError(f"backend '{target}' cannot be loaded: {error}; install what it needs") from error
