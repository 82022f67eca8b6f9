"""`hf:` names: an encoder read from a folder's or repository's own config.json."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from connectors.errors import VlmError
from vlm_encoders.encoders.hf_pixels import PROCESSOR_FILES, pixel_fields, read_processor
from vlm_encoders.encoders.nested import find_tower
from vlm_encoders.encoders.towers import MODEL_TYPES, tower_of
from vlm_encoders.encoders.transformers_load import read_config
from vlm_encoders.encoders.transformers_report import told
from vlm_encoders.encoders.weights import complete, read_json, snapshot
from vlm_encoders.spec import EncoderSpec

__all__ = ["explain"]


def explain(name: str, source: str, revision: str | None = None) -> EncoderSpec:
    """Make the spec of `hf:<hub id or folder>`; weights are not fetched.

    The config's `model_type` alone decides the class; a whole VLM gives its vision tower.
    Pixels are made as preprocessor_config.json or processor_config.json says, and where
    there is neither, or it leaves something out, as the tower's family does. A warning
    says so where the hub's cache does not tell whether there is one.

    Args:
        name: the whole name, which becomes the spec's.
        source: the hub id or folder behind `hf:`.
        revision: commit, tag or branch of the repository; None for the cached or newest main.

    Raises:
        VlmError: there is no config.json, its model_type is none that we read, or its pixels cannot be made.
    """
    path = Path(source).expanduser()
    local = path.is_dir()
    folder = path if local else snapshot(source, name, weights=False, revision=revision)
    known = local or complete(folder, source, name, PROCESSOR_FILES)
    raw = read_json(folder / "config.json", name)
    nested = find_tower(raw, name)
    model_type = raw.get("model_type", "") if nested is None else nested.model_type
    tower = tower_of(model_type)
    if tower is None:
        raise VlmError(
            f"{name}: model_type '{model_type}' of its config.json is none of {', '.join(sorted(MODEL_TYPES))}; "
            "give one of these, or use timm:"
        )
    with told(f"{name}: its config.json describes no {tower.source}", "repair it"):
        fields = tower.spec_of(read_config(tower, raw, name), name)
        place = {"name": name, "backend": "transformers", "weights": source, "revision": revision}
        native = "native" if nested is not None and nested.native else fields["sizes"]
        pixels = pixel_fields(
            read_processor(folder, name),
            tower,
            fields["trained_size"],
            name,
            expand=nested is not None and nested.expand,
        )
        size = pixels.pop("image_size")
        spec = EncoderSpec(**{**fields, "sizes": native, **pixels, **place, "image_size": fields["trained_size"]})
    if nested is not None and nested.feature_layer is not None:
        spec = spec.at_layer(nested.feature_layer, final_norm=False)
    spec = _sized(spec, size)
    if not known:
        _warn(spec)
    return spec


def _sized(spec: EncoderSpec, size: Any) -> EncoderSpec:
    """Give the spec for the preprocessor's views, if the network takes them."""
    if size == spec.image_size:
        return spec
    try:
        return spec.resized(size)
    except VlmError as error:
        raise VlmError(f"{error} in its preprocessor's config") from error


def _warn(spec: EncoderSpec) -> None:
    height, width = spec.image_size
    warnings.warn(
        f"{spec.name}: the cache lacks its preprocessor_config.json and the hub cannot be asked, so pixels are assumed "
        f"to be the {spec.family} family's: resize={spec.resize} to {height}x{width} px, {spec.interpolation}, "
        f"mean {spec.mean}, std {spec.std}",
        stacklevel=3,
    )
