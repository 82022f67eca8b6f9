"""One image looked at as training will look at it: decoded whole, but kept nowhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from connectors.errors import VlmError
from connectors.tokens import Grid
from vlm_encoders.preprocess.deep import is_deep
from vlm_encoders.preprocess.header import opened_image, orientation_of, upright_size
from vlm_encoders.preprocess.modes import check_pixels, to_rgb
from vlm_encoders.preprocess.sizes import MAX_PIXELS

__all__ = ["ImageFacts", "check_image"]

_SAME = {"MPO": "JPEG", "DIB": "BMP"}
_BY_DRAFT = {"JPEG", "MPO"}
"""Formats that Pillow can decode at an eighth of their size, of all their bytes nevertheless."""


class ImageFacts(NamedTuple):
    """What an image file is.

    Attributes:
        size: (height, width) upright, px; None for one that cannot be used.
        format: Pillow's word, "" where there is none.
        notes: what is to be known of it and no fault, such as "CMYK" or "turned by EXIF".
        problems: (kind, sentence) of each fault.
    """

    size: Grid | None
    format: str
    notes: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]


def check_image(image: Any, *, large: int, decode: bool = True) -> ImageFacts:
    """Look at an image: is it there, whole, one picture, of its extension's format, and not too large.

    Args:
        image: a path, bytes, an open file, or a PIL image.
        large: pixels over which it is called large.
        decode: decode it, which alone shows that it is truncated; else its header is read.
    """
    if isinstance(image, Path) and not image.exists():
        return _broken("missing image", f"image file '{image}' is missing; check image_folder")
    try:
        if isinstance(image, Image.Image):
            return _facts(image, "the image", None, large, decode=decode)
        with opened_image(image) as (opened, name):
            return _facts(opened, name, image if isinstance(image, Path) else None, large, decode=decode)
    except VlmError as error:
        return _broken("image over the limit" if f"limit of {MAX_PIXELS}" in str(error) else "broken image", str(error))


def _broken(kind: str, text: str) -> ImageFacts:
    return ImageFacts(None, "", (), ((kind, text),))


def _facts(image: Image.Image, name: str, path: Path | None, large: int, *, decode: bool) -> ImageFacts:
    kind = _SAME.get(image.format or "", image.format or "")
    check_pixels((image.height, image.width), name)
    try:
        # All before decoding, which changes some of it.
        size, notes, frames = upright_size(image), tuple(_notes(image)), _frames(image)
        if decode:
            _decode(image, name)
    except VlmError:
        raise
    except Exception as error:
        # Each of Pillow's decoders fails in its own way.
        raise VlmError(f"{name} is truncated or broken: {error}; check the file") from error
    problems = []
    if frames > 1:
        problems.append(("animated image", f"{name} has {frames} frames; only the first is used"))
    if size[0] * size[1] > large:
        millions = size[0] * size[1] / 1e6
        problems.append(("large image", f"{name} is {size[0]}x{size[1]} px, {millions:.0f} MP; shrink it to save time"))
    if path is not None and kind and _format_of(path) not in {"", kind}:
        problems.append(("wrong extension", f"{name} is {kind}, not what '{path.suffix}' says; rename it"))
    return ImageFacts(size, kind, notes, tuple(problems))


def _decode(image: Image.Image, name: str) -> None:
    if image.format in _BY_DRAFT:
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
        return
    with warnings.catch_warnings():
        # Of frames the report tells; a warning for each file would drown it.
        warnings.simplefilter("ignore")
        to_rgb(image, name, copy=False)


def _notes(image: Image.Image) -> Iterator[str]:
    if image.mode == "CMYK":
        yield "CMYK"
    if image.mode in {"1", "L", "LA"}:
        yield "grey"
    if image.mode in {"P", "PA"}:
        yield "palette"
    if image.mode in {"RGBA", "LA", "La", "PA", "RGBa"} or "transparency" in image.info:
        yield "transparent"
    if is_deep(image):
        yield "16 bits or more"
    if orientation_of(image) != 1:
        yield "turned by EXIF"


def _frames(image: Image.Image) -> int:
    # The further pictures of an MPO are the camera's previews, no frames.
    return 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))


def _format_of(path: Path) -> str:
    known = Image.registered_extensions().get(path.suffix.lower(), "")
    return _SAME.get(known, known)
