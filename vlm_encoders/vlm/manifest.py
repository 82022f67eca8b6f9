"""What a checkpoint says of itself: `model.json`, its parts and their sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectors.chain import Chain
from connectors.errors import VlmError
from connectors.recipe import recipe_of
from connectors.tokens import TokenSpec
from vlm_encoders.encoders.joint_name import map_places
from vlm_encoders.vlm.adapters import injected_adapters
from vlm_encoders.vlm.part_weights import built_dtype
from vlm_encoders.vlm.quantize import is_quantized
from vlm_encoders.vlm.stages import PARTS, Part, has_adapter

if TYPE_CHECKING:
    from torch import nn

    from vlm_encoders.spec import EncoderSpec
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["MANIFEST", "describe_checkpoint", "pixel_rules", "read_manifest", "saved_spec", "write_manifest"]

FORMAT = 1
MANIFEST = "model.json"
_KEYS = ("image_token_id", "layout", "trained", *PARTS)


def describe_checkpoint(model: VisionLanguageModel) -> dict[str, Any]:
    """Give the manifest of a model, but for the hashes of its parts.

    A part is saved where its weights are not those of its source: it trained, or it
    has no source.
    """
    origin = _with_absolute_paths(model.encoder.origin)
    source = _llm_source(model.llm)
    adapter = has_adapter(model.llm)
    merged = "adapter" in model.trained and not adapter
    adapters = injected_adapters(model)
    absorbed = "encoder adapter" in model.trained and not any(path.startswith("encoder") for path in adapters)
    return {
        "format": FORMAT,
        "image_token_id": model.image_token_id,
        "layout": model.layout.config(),
        "stage": model.stage.name if model.stage else None,
        "trained": sorted(model.trained),
        "adapters": adapters,
        "encoder": {
            "name": model.encoder.spec.name,
            "origin": origin,
            "pixels": pixel_rules(model.encoder.spec),
            "dtype": _dtype_name(model, "encoder"),
            "saved": "encoder" in model.trained or absorbed or origin.get("pretrained", False) is False,
        },
        "connector": _connector_entry(model),
        "llm": {
            "name": type(model.llm).__name__,
            "source": source,
            "dtype": _dtype_name(model, "llm"),
            "adapter": adapter,
            "quantize": "nf4" if is_quantized(model.llm) else "no",
            "saved": "llm" in model.trained or merged or not source,
        },
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `model.json`."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read `model.json`.

    Raises:
        VlmError: it is missing, broken, or of another format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise VlmError(
            f"'{folder}' is no model checkpoint: it has no {MANIFEST}; give a folder of save_pretrained"
        ) from error
    except ValueError as error:
        raise VlmError(
            f"checkpoint '{folder}' is broken: {MANIFEST} is no JSON ({error}); use an earlier one"
        ) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise VlmError(f"checkpoint '{folder}' has format {found}, this version reads {FORMAT}; update vlm-encoders")
    missing = [key for key in _KEYS if key not in manifest]
    if missing:
        raise VlmError(f"checkpoint '{folder}' is broken: {MANIFEST} lacks {', '.join(missing)}; use an earlier one")
    checked: dict[str, Any] = manifest
    return checked


def pixel_rules(spec: EncoderSpec) -> dict[str, Any]:
    """Give what makes pixels of an image: no hash of weights can see a change of it."""
    inside = [pixel_rules(each) for each in spec.pixel_specs if each is not spec]
    return {
        "image_size": list(spec.image_size),
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "resize": spec.resize,
        "crop_pct": spec.crop_pct,
        **({"parts": inside} if inside else {}),
    }


def saved_spec(entry: list[Any]) -> TokenSpec:
    """Read a token spec as the connector's entry holds it."""
    num_tokens, dim, grid, num_prefix = entry
    return TokenSpec(num_tokens, dim, None if grid is None else (grid[0], grid[1]), num_prefix)


def _connector_entry(model: VisionLanguageModel) -> dict[str, Any]:
    spec = model.encoder.token_spec
    try:
        recipe = recipe_of(model.connector, model.token_spec.dim)
    except VlmError:
        # A class of the user's own: whoever loads the checkpoint passes it.
        recipe = None
    return {
        "name": recipe or type(model.connector).__name__,
        "recipe": recipe,
        "chain": isinstance(model.connector, Chain),
        "in_spec": [spec.num_tokens, spec.dim, spec.grid, spec.num_prefix],
        "out_dim": model.token_spec.dim,
    }


def _llm_source(llm: nn.Module) -> str:
    return _absolute(str(getattr(llm.config, "_name_or_path", "") or ""))


def _with_absolute_paths(origin: dict[str, Any]) -> dict[str, Any]:
    pretrained = origin.get("pretrained")
    paths = {"pretrained": _absolute(pretrained)} if isinstance(pretrained, str) else {}
    if "name" in origin:
        paths["name"] = map_places(origin["name"], _absolute)
    return {**origin, **paths}


def _absolute(source: str) -> str:
    # A relative folder would be looked for wherever the checkpoint is loaded.
    path = Path(source).expanduser()
    return str(path.absolute()) if source and path.exists() else source


def _dtype_name(model: VisionLanguageModel, part: Part) -> str:
    name, first = next(iter(model.part_parameters(part)), ("", None))
    if first is None:
        return "float32"
    return str(built_dtype(model, name) or first.dtype).removeprefix("torch.")
