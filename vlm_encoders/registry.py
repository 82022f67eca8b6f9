"""Encoders by name: the table, plugins, and names that a library or folder explains."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectors.errors import VlmError
from connectors.registry import Registry
from connectors.tokens import Grid
from vlm_encoders.spec import EncoderSpec

if TYPE_CHECKING:
    import torch

    from vlm_encoders.encoder import Encoder

__all__ = ["create_encoder", "encoder_spec", "list_encoders", "register_encoder"]

_TABLES = (
    "vlm_encoders.encoders.clip",
    "vlm_encoders.encoders.siglip",
    "vlm_encoders.encoders.dinov2",
    "vlm_encoders.encoders.swin",
    "vlm_encoders.encoders.sam",
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


def encoder_spec(name: str) -> EncoderSpec:
    """Find an encoder's spec by its exact name.

    Args:
        name: a registered name, `timm:<model or folder>`, `open_clip:<arch>/<tag>` or
            `hf:<hub id or folder>`. The last three may import their library.

    Raises:
        UnknownNameError: nothing has this name; the nearest names are given.
    """
    prefix, colon, rest = name.partition(":")
    if not colon or prefix not in _EXPLAINERS:
        return _registry().get(name)
    spec: EncoderSpec = _load(_EXPLAINERS[prefix])(name, rest)
    return spec


def create_encoder(
    name: str,
    *,
    pretrained: bool | str | Path = True,
    image_size: int | Grid | None = None,
    feature_layer: int | None = None,
    final_norm: bool | None = None,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> Encoder:
    """Build an encoder up to its feature layer.

    Args:
        name: as in `encoder_spec`.
        pretrained: True for the released weights, False for random ones, or a local
            folder or file that holds them.
        image_size: one side or (height, width) of a view, px; None for the spec's own.
        feature_layer: the block whose output is used, from the end, -1 the last; None
            for the spec's own.
        final_norm: whether the network's last norm is applied; None for the spec's own
            at its own feature layer, and no norm at another.
        dtype: of the parameters, such as "bfloat16"; None for float32.
        **options: build arguments of the backend, over those of the spec.

    Raises:
        UnknownNameError: nothing has this name.
        VlmError: the size, the layer or the weights do not fit the encoder.
    """
    import torch

    spec = encoder_spec(name)
    if image_size is not None:
        spec = spec.resized(image_size)
    spec = spec.at_layer(feature_layer, final_norm=final_norm)
    if options:
        spec = dataclasses.replace(spec, options=tuple({**dict(spec.options), **options}.items()))
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(chosen, torch.dtype):
        raise VlmError(f"{name}: '{dtype}' is no dtype; use float32, bfloat16 or float16")
    weights = str(pretrained) if isinstance(pretrained, Path) else pretrained
    backend: type[Encoder] = _load(_BACKENDS.get(spec.backend, spec.backend))
    encoder = backend.build(spec, pretrained=weights, dtype=chosen).eval()
    built = len(encoder.blocks())
    if built != spec.kept_layers:
        raise VlmError(
            f"{name}: {built} blocks were built, its spec says {spec.kept_layers}; choose the depth by feature_layer, "
            "or register a spec of that depth"
        )
    encoder.origin = {
        "name": name,
        "pretrained": weights,
        "image_size": list(spec.image_size),
        "feature_layer": spec.feature_layer,
        "final_norm": spec.final_norm,
        "dtype": str(chosen).removeprefix("torch."),
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
