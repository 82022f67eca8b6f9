"""Specs of timm's models by their names, and of folders that timm's `save_for_hf` wrote."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from connectors.errors import UnknownNameError, VlmError
from connectors.registry import nearest
from connectors.tokens import Grid
from vlm_encoders.encoders.timm_network import probe_network, refuse_machinery
from vlm_encoders.encoders.timm_pack import packs
from vlm_encoders.encoders.timm_pixels import pixel_fields
from vlm_encoders.encoders.timm_shape import block_fields, positions, prefix_kinds, shape_fields, size_fields
from vlm_encoders.encoders.weights import read_json
from vlm_encoders.spec import EncoderSpec

__all__ = ["explain", "explain_model", "timm_names"]


def timm_names() -> list[str]:
    """List all models of the installed timm; each is an encoder by `timm:<name>`."""
    import timm

    return list(timm.list_models())


def explain(name: str, source: str) -> EncoderSpec:
    """Make the spec of `timm:<model>` or of a folder that timm's `save_for_hf` wrote.

    The model is built without memory (on the meta device); weights are not fetched.

    Args:
        name: the whole name, which becomes the spec's.
        source: the model's name, with its tag, or the folder.

    Raises:
        UnknownNameError: timm has no such model.
        VlmError: the folder's config is broken, or the model wants other pixels than this package makes.
    """
    folder = Path(source).expanduser()
    return _folder(name, folder) if folder.is_dir() else _model(name, source)


@cache
def _model(name: str, source: str) -> EncoderSpec:
    return explain_model(name, source, {})


def _folder(name: str, folder: Path) -> EncoderSpec:
    config = _read_config(folder, name)
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in config.get("model_args", {}).items()}
    options.pop("num_classes", None)
    return explain_model(name, config["architecture"], options, config.get("pretrained_cfg"), str(folder))


def explain_model(
    name: str,
    source: str,
    options: dict[str, Any],
    pretrained_cfg: dict[str, Any] | None = None,
    weights: str | None = None,
) -> EncoderSpec:
    """Make the spec of a model of timm that is built with options.

    Args:
        name: the whole name, which becomes the spec's.
        source: the model's name, with its tag.
        options: arguments of `timm.create_model`.
        pretrained_cfg: what it says of pixels goes before the model's own.
        weights: hub id or folder of the weights; None for the model's own.

    Raises:
        UnknownNameError: timm has no such model.
        VlmError: the model wants other pixels than this package makes.
    """
    import timm

    refuse_machinery(name, options)
    if not timm.is_model(source):
        raise UnknownNameError(f"timm has no model '{source}'; {nearest(source, timm.list_models())}")
    try:
        network = probe_network(name, source, options)
    except RuntimeError as error:
        raise UnknownNameError(f"{name}: {error}; the tag is what follows the dot") from error
    data = timm.data.resolve_model_data_config(network, pretrained_cfg=pretrained_cfg)
    size = _own_size(network) or tuple(data["input_size"][1:])
    known = network.pretrained_cfg
    shape = shape_fields(network, size)
    sizes = size_fields(network, name, source, options, size, shape)
    return EncoderSpec(
        name=name,
        family="timm",
        backend="timm",
        source=source,
        weights=weights or known.get("hf_hub_id"),
        image_size=size,
        positions=positions(network),
        prefix_kinds=prefix_kinds(network, shape["num_prefix"]),
        licence=known.get("license") or "",
        reference=known.get("paper_url")
        or known.get("origin_url")
        or "https://github.com/huggingface/pytorch-image-models",
        options=tuple(options.items()),
        **shape,
        **sizes,
        packs=sizes["sizes"] == "any" and packs(network),
        **(block_fields(network) if not shape["stages"] else {}),
        **pixel_fields(data, None if pretrained_cfg else source.partition(".")[0], name),
    )


def _own_size(network: Any) -> Grid | None:
    found = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return (found, found) if isinstance(found, int) else found and tuple(found)


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "config.json"
    config = read_json(path, name, writer="timm's save_for_hf")
    if "architecture" not in config:
        raise VlmError(f"{name}: '{path}' names no timm architecture; use 'hf:{folder}' for a transformers checkpoint")
    return config
