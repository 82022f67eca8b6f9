"""Pixels as a checkpoint's image processor makes them, in the words of `EncoderSpec`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from connectors.errors import VlmError
from connectors.tokens import Grid
from vlm_encoders.encoders.towers.base import Tower
from vlm_encoders.encoders.weight_files import read_json
from vlm_encoders.spec import Triple, as_size

__all__ = ["PROCESSOR_FILES", "pixel_fields", "read_processor"]

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Where a folder says how its pixels are made; the first that is there wins."""
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
# ConvNeXt's processor crops views below this side and squashes the others.
_CROPPED_BELOW = 384
# Those whose `do_pad` fills up to a square with the mean colour before the resize.
_EXPANDING = frozenset(("LlavaImageProcessor", "LlavaImageProcessorFast", "LlavaImageProcessorPil"))


def read_processor(folder: Path, name: str) -> dict[str, Any]:
    """Read what the folder says of its pixels; nothing if it says nothing.

    Raises:
        VlmError: what it says is broken.
    """
    first, second = PROCESSOR_FILES
    said: Any = None
    if (folder / first).is_file():
        said = read_json(folder / first, name)
    elif (folder / second).is_file():
        said = read_json(folder / second, name).get("image_processor")
    if not isinstance(said, dict | None):
        raise VlmError(f"{name}: image_processor in '{folder / second}' is no JSON object; repair the file")
    return {entry: value for entry, value in (said or {}).items() if value is not None}


def pixel_fields(
    said: dict[str, Any], tower: Tower, native: Grid, name: str, *, expand: bool = False
) -> dict[str, Any]:
    """Give the `EncoderSpec` fields that make the processor's pixels.

    Args:
        said: the processor's config; what it leaves out is made as the tower's family does.
        tower: the network's.
        native: the size of the weights, px.
        name: the encoder's, for messages.
        expand: whether images are filled up to a square first, whatever the config says.

    Raises:
        VlmError: these pixels cannot be made.
    """
    _refuse_unmade(said, name)
    resample = said.get("resample", 2 if tower.bilinear else 3)
    if not isinstance(resample, int) or resample not in _FILTERS:
        known = ", ".join(f"{number} ({word})" for number, word in _FILTERS.items())
        raise VlmError(f"{name}: resample {resample} of its preprocessor is none of {known}; use one of these")
    mean = _triple(said, "image_mean", tower.mean, name)
    std = _triple(said, "image_std", tower.std, name)
    if not said.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    placing = _placing(said, tower, native, name)
    if expand or (said.get("do_pad") and said.get("image_processor_type") in _EXPANDING):
        if placing.pop("crop_pct", 1.0) != 1.0:
            raise VlmError(
                f"{name}: its preprocessor fills images up to a square and then cuts the middle out; only one of "
                "both can be made, so make its size and crop_size equal"
            )
        placing["resize"] = "expand"
    return {"mean": mean, "std": std, "interpolation": _FILTERS[resample], **placing}


def _refuse_unmade(said: dict[str, Any], name: str) -> None:
    factor = said.get("rescale_factor", 1 / 255)
    rescaled = isinstance(factor, (int, float)) and math.isclose(factor, 1 / 255, rel_tol=1e-6)
    if not said.get("do_rescale", True):
        raise VlmError(f"{name}: its preprocessor leaves pixels from 0 to 255; only pixels from 0 to 1 can be made")
    if not rescaled:
        raise VlmError(f"{name}: rescale_factor {factor} of its preprocessor cannot be made; only 1/255 can")
    if not said.get("do_resize", True):
        raise VlmError(f"{name}: its preprocessor does not resize; set do_resize, since every view has one size")


def _triple(said: dict[str, Any], entry: str, default: Triple, name: str) -> Triple:
    if entry not in said:
        return default
    value = said[entry]
    several = [value] * 3 if isinstance(value, (int, float)) else value
    if not isinstance(several, list) or len(several) != 3 or not all(isinstance(x, (int, float)) for x in several):
        raise VlmError(f"{name}: {entry} {value} of its preprocessor is neither one number nor three; give three")
    return (several[0], several[1], several[2])


def _placing(said: dict[str, Any], tower: Tower, native: Grid, name: str) -> dict[str, Any]:
    """Tell the size of a view and how an image is fitted into it."""
    size = _sides(said.get("size"), "size", name)
    if "side" in size:
        # Old files hold one number: a side to cover for the croppers, a square for the others.
        side = size["side"]
        size = {"shortest_edge": side} if tower.resize == "crop" else {"height": side, "width": side}
    exact = "height" in size and "width" in size
    if tower.resize == "pad":
        longest = size.get("longest_edge") or size.get("height")
        return {"image_size": as_size(longest or native, name), "resize": "pad"}
    if "crop_pct" in said and "shortest_edge" in size:
        return _by_part(size["shortest_edge"], said["crop_pct"], name)
    crops = said.get("do_center_crop", not exact)
    if exact and not crops:
        return {"image_size": (size["height"], size["width"]), "resize": "squash"}
    if tower.free or not (exact or "shortest_edge" in size):
        return {"image_size": native, "resize": tower.resize}
    goal = (size["height"], size["width"]) if exact else (size["shortest_edge"],) * 2
    view = _crop(said.get("crop_size"), goal, name) if crops else goal
    kept = view[0] / goal[0]
    # Division rounds: the sides to be resized to must come out as they are written.
    while int(view[0] / kept) < goal[0]:
        kept = math.nextafter(kept, 0)
    if int(view[1] / kept) != goal[1]:
        raise VlmError(
            f"{name}: its preprocessor cuts {view[0]}x{view[1]} px out of {goal[0]}x{goal[1]} px, another part of "
            "each side; make crop_size and size of one shape"
        )
    return {"image_size": view, "resize": "squash" if exact else "crop", "crop_pct": kept}


def _by_part(side: int, part: Any, name: str) -> dict[str, Any]:
    """Fit as ConvNeXt's processor does: the view is a part of the side that is covered."""
    if not isinstance(part, (int, float)) or not 0 < part <= 1:
        raise VlmError(f"{name}: crop_pct {part} of its preprocessor is no part of a side; give one from 0 to 1")
    fit = {"resize": "crop", "crop_pct": part} if side < _CROPPED_BELOW else {"resize": "squash"}
    return {"image_size": (side, side), **fit}


def _crop(value: Any, goal: Grid, name: str) -> Grid:
    """Read the size of the part that is cut out."""
    crop = _sides(value, "crop_size", name)
    side = crop.get("side") or crop.get("shortest_edge")
    view = (side, side) if side else (crop.get("height", goal[0]), crop.get("width", goal[1]))
    if view[0] > goal[0] or view[1] > goal[1]:
        raise VlmError(
            f"{name}: crop_size {view[0]}x{view[1]} px of its preprocessor is larger than its size "
            f"{goal[0]}x{goal[1]} px; make it smaller"
        )
    return view


def _sides(value: Any, entry: str, name: str) -> dict[str, int]:
    """Read a size of a processor by the words of its sides; one number is a "side"."""
    sides = {"side": value} if isinstance(value, int) else value or {}
    if isinstance(sides, list) and len(sides) == 2:
        sides = dict(zip(("height", "width"), sides, strict=True))
    found = {word: side for word, side in sides.items() if side is not None} if isinstance(sides, dict) else None
    if found is None or not all(isinstance(side, int) and side > 0 for side in found.values()):
        raise VlmError(f"{name}: {entry} {value} of its preprocessor is no size in px; give height and width")
    return found
