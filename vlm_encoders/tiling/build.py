"""Tilers from a name with options, and from what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from connectors.errors import UnknownNameError, VlmError
from connectors.registry import nearest
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling.options import read_options, typed_options
from vlm_encoders.tiling.presets import PRESETS
from vlm_encoders.tiling.tiler import Tiler

__all__ = ["build_tiler", "tiler_from_config"]

_BEFORE: dict[str, dict[str, Any]] = {"internvl": {"markers": False}}
"""What a saved tiler meant before an option came, by the name of its class."""


def build_tiler(name: str, tile_size: int | EncoderSpec | None = None, **options: Any) -> Tiler:
    """Make a tiler by name: `internvl`, or with options, `internvl:max_tiles=6,thumbnail=false`.

    Args:
        name: of a preset, and options as a connector's recipe writes them: numbers, true or false,
            `none`, words, and grids as `grids=1x2/2x1`.
        tile_size: side in px of the pictures that the encoder sees, or the encoder's spec, which tells a
            native tiler its patch too; None for what the preset was released with. One in `name` goes first.
        options: as in `name`, which they go before.

    Raises:
        UnknownNameError: no tiler has this name.
        VlmError: an option is unknown or wrong.
    """
    if not isinstance(name, str):
        raise VlmError(f"a tiler is asked for by its name, got {type(name).__name__}; write for example llava-next")
    known, _, text = (piece.strip() for piece in name.partition(":"))
    if known not in PRESETS:
        raise UnknownNameError(f"no tiler '{known}'; {nearest(known, list(PRESETS))}")
    preset = PRESETS[known]
    size = preset.tiler.told_by(tile_size) if isinstance(tile_size, EncoderSpec) else {"tile_size": tile_size}
    given = {key: value for key, value in size.items() if value is not None} | read_options(known, text) | options
    merged = dict(preset.options) | typed_options(known, preset.tiler, given)
    needed = [each.name for each in fields(preset.tiler) if each.default is MISSING]
    missing = [each for each in needed if each not in merged]
    if missing:
        raise VlmError(f"tiler '{known}' needs {', '.join(missing)}; write for example {known}:{missing[0]}=448")
    tiler = preset.tiler(**merged)
    # No field: tilers of one class and the same options are equal, whatever they were asked for by.
    object.__setattr__(tiler, "_asked_for", known)
    return tiler


def tiler_from_config(config: Mapping[str, Any]) -> Tiler:
    """Make the tiler whose `config` this is.

    Raises:
        UnknownNameError: no tiler has this name.
        VlmError: the name or the tile size is missing, or an option is unknown.
    """
    options = dict(config)
    try:
        name, tile_size = options.pop("name"), options.pop("tile_size")
    except KeyError as error:
        raise VlmError(f"a tiler's config needs name and tile_size, got {', '.join(config) or 'nothing'}") from error
    if name not in PRESETS:
        # A class may be of presets alone, none of them of its own name.
        classes = {preset.tiler.name: preset.tiler for preset in PRESETS.values()}
        if name not in classes:
            raise UnknownNameError(f"no tiler '{name}'; {nearest(str(name), list({**PRESETS, **classes}))}")
        return classes[name](**typed_options(name, classes[name], {"tile_size": tile_size} | options))
    return build_tiler(name, tile_size, **_BEFORE.get(name, {}) | options)
