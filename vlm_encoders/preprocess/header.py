"""The size of an image by its header alone: nothing is decoded."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image

from connectors.errors import VlmError
from connectors.tokens import Grid
from vlm_encoders.preprocess.forms import Encoded, ImageLike, as_array, is_encoded
from vlm_encoders.preprocess.load import open_encoded, read_encoded, reading
from vlm_encoders.preprocess.modes import check_pixels

__all__ = ["image_size", "opened_image", "orientation_of", "upright_size"]

_TRANSPOSED = {5, 6, 7, 8}
_LATE = {b"eXIf", b"iTXt", b"tEXt", b"zTXt"}
_UNSURE = {"EPS", "ICNS", "ICO", "WMF"}
"""Formats of which Pillow settles the size when it decodes."""


def image_size(image: ImageLike) -> Grid:
    """Give (height, width), px, of an image in any form as `load_image` would give it, upright.

    Raises:
        VlmError: it is missing, empty, too large or no image; that it is truncated is not seen.
    """
    if isinstance(image, Image.Image):
        return upright_size(image)
    if not is_encoded(image):
        rows, columns = as_array(image).shape[:2]
        return rows, columns
    with opened_image(image) as (opened, name):
        try:
            size = upright_size(opened)
        except Exception as error:
            # Each of Pillow's formats fails in its own way.
            raise VlmError(f"{name} is truncated or broken: {error}; check the file") from error
        check_pixels(size, name)
        return size


@contextmanager
def opened_image(image: Encoded) -> Iterator[tuple[Image.Image, str]]:
    """Open an encoded image without decoding it: a path, bytes, or an open binary file.

    Yields:
        The image, closed afterwards if it came by its path, and its name for sentences.

    Raises:
        VlmError: it is missing, empty or no image.
    """
    if isinstance(image, (str, Path)):
        path = Path(image)
        with reading(path) as name, path.open("rb") as file:
            yield open_encoded(file, name), name
    else:
        data, name = read_encoded(image)
        yield open_encoded(io.BytesIO(data), name), name


def upright_size(image: Image.Image) -> Grid:
    """Give (height, width), px, of an open image after its EXIF orientation, which is read without decoding."""
    if image.format in _UNSURE:
        image.load()
    tags: Any = getattr(image, "tag_v2", None)
    width, height = image.size
    if image.format == "TIFF" and tags is not None and ExifTags.Base.ImageWidth in tags:
        # Pillow has turned some of these sizes already.
        width, height = tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]
    return (width, height) if orientation_of(image) in _TRANSPOSED else (height, width)


def orientation_of(image: Image.Image) -> int:
    """Give the EXIF orientation of an open image, 1 for upright, without decoding it where that can be."""
    if image.format != "PNG" or _has_late_text(image):
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    # PngImageFile.getexif decodes the picture, in search of what may stand behind it.
    return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))


def _has_late_text(image: Image.Image) -> bool:
    """Say whether a PNG file has text, which may hold EXIF or XMP, behind its pixels."""
    file: BinaryIO | None = getattr(image, "fp", None)
    if file is None:
        # It is decoded already.
        return True
    place = file.tell()
    try:
        file.seek(8)
        behind = False
        while len(head := file.read(8)) == 8:
            behind = behind or head[4:] == b"IDAT"
            if behind and head[4:] in _LATE:
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
        return False
    finally:
        file.seek(place)
