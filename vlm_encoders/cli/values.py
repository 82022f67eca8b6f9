"""Options of the sub-commands that hold numbers, sizes or names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from connectors.errors import VlmError

if TYPE_CHECKING:
    from vlm_encoders.tiling.presets import Preset

__all__ = ["preset_of", "read_image_size", "read_layers", "read_range", "read_size"]


def preset_of(tiler: str) -> Preset:
    """Find the preset of a tiler that may have options behind its name.

    Raises:
        UnknownNameError: no tiler has this name.
    """
    from vlm_encoders.tiling import PRESETS, build_tiler

    name = tiler.partition(":")[0].strip()
    if name not in PRESETS:
        build_tiler(name)
    return PRESETS[name]


def read_image_size(image: Path | None, size: str | None) -> tuple[int, int] | None:
    """Give (height, width) of a picture, upright, or of HEIGHTxWIDTH in px; None without either.

    Raises:
        VlmError: both are given, the picture cannot be read, or the size is none.
    """
    if image is not None and size is not None:
        raise VlmError(f"both a picture ({image}) and a size ({size}) were given; give one")
    if image is not None:
        from vlm_encoders.preprocess import load_image

        picture = load_image(image)
        return picture.height, picture.width
    if size is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if match is None:
        raise VlmError(f"'{size}' is no size; write HEIGHTxWIDTH in px, such as 480x640")
    return int(match[1]), int(match[2])


def read_size(text: str | None) -> int | tuple[int, int] | None:
    """Read a side or HEIGHTxWIDTH in px.

    Raises:
        VlmError: it is neither.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip())
    if match is None:
        raise VlmError(f"'{text}' is no size; write a side or HEIGHTxWIDTH in px, such as 336 or 336x448")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def read_layers(text: str | None) -> int | tuple[int, ...] | None:
    """Read one feature layer or several, parted by commas.

    Raises:
        VlmError: one is no whole number.
    """
    if text is None:
        return None
    if re.fullmatch(r"\s*-?\d+\s*(,\s*-?\d+\s*)*", text) is None:
        raise VlmError(f"'{text}' names no layers; count them from the end, such as -2 or -2,-5")
    layers = tuple(map(int, text.split(",")))
    return layers[0] if len(layers) == 1 else layers


def read_range(text: str | None) -> tuple[int, int | None]:
    """Read a number or a range such as 500-800, 500- or -800, as (least, most); None is any number.

    Raises:
        VlmError: it is neither, or runs downwards.
    """
    if text is None:
        return 0, None
    match = re.fullmatch(r"(\d*)(-?)(\d*)", text.strip())
    if match is None or not (match[1] or match[3]):
        raise VlmError(f"'{text}' is no number and no range; write 576, 500-800, 500- or -800")
    least = int(match[1] or 0)
    most = least if not match[2] else int(match[3]) if match[3] else None
    if most is not None and most < least:
        raise VlmError(f"the range {text} holds no number; write the smaller one first")
    return least, most
