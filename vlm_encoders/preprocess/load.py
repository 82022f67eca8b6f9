"""Images in any form, read, decoded and brought to upright RGB."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from connectors.errors import VlmError
from vlm_encoders.preprocess.forms import Encoded, ImageLike, as_array, is_encoded
from vlm_encoders.preprocess.jpeg import decode_jpeg
from vlm_encoders.preprocess.modes import WHITE, check_pixels, to_rgb
from vlm_encoders.preprocess.sizes import MAX_PIXELS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Levels",
    "load_image",
    "load_levels",
    "open_encoded",
    "picture_of",
    "read_encoded",
    "reading",
    "size_of",
    "tensor_of",
]

Levels: TypeAlias = "Image.Image | Tensor"
"""An upright RGB image as Pillow holds it, or as (H, W, 3) uint8."""

_SHOWN = 200


def load_image(image: ImageLike, *, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Give an image in any form as upright RGB.

    EXIF orientation is applied, transparency is laid on the background, 16 bits are scaled
    to 8, and grey, palette and CMYK images become RGB. Of several frames the first is taken
    (of an open PIL image the one it stands at), with a warning that names the file.

    Args:
        image: see `ImageLike`.
        background: what transparent pixels lie on: red, green and blue, 0 to 255.

    Raises:
        VlmError: the image is missing, unreadable, empty, truncated, too large or no image
            (the file is named), or the background is no colour.
    """
    if len(background) != 3 or not all(isinstance(level, int) and 0 <= level <= 255 for level in background):
        raise VlmError(f"a background is red, green and blue from 0 to 255, got {background!r}")
    if isinstance(image, Image.Image):
        return to_rgb(image, "the image", background)
    if is_encoded(image):
        data, name = read_encoded(image)
        return to_rgb(open_encoded(io.BytesIO(data), name), name, background)
    return to_rgb(Image.fromarray(as_array(image)), "the array", background)


def load_levels(image: ImageLike, *, by_torch: bool) -> Levels:
    """Give an image in any form as upright RGB, in the form that costs least.

    The levels are those of `load_image`. They are to be read alone: a picture that is upright RGB
    is given as it is.

    Args:
        image: see `ImageLike`.
        by_torch: whether torch will work on it, so that a JPEG file may become a tensor.

    Raises:
        VlmError: see `load_image`.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image, "the image", copy=False)
    if is_encoded(image):
        data, name = read_encoded(image)
        opened = open_encoded(io.BytesIO(data), name)
        check_pixels((opened.height, opened.width), name)
        levels = decode_jpeg(opened, data) if by_torch else None
        return to_rgb(opened, name, copy=False) if levels is None else levels
    if by_torch:
        array = as_array(image)
        return tensor_of(array) if array.shape[2] == 3 else load_image(array)
    return load_image(image)


def size_of(levels: Levels) -> tuple[int, int]:
    """Give (height, width), px."""
    return (levels.height, levels.width) if isinstance(levels, Image.Image) else (levels.shape[0], levels.shape[1])


def picture_of(levels: Levels) -> Image.Image:
    """Give it as Pillow has it."""
    return levels if isinstance(levels, Image.Image) else Image.fromarray(levels.numpy())


def tensor_of(levels: Levels | np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    """Give it as a tensor (H, W, 3), to be read alone: it may share its memory."""
    import torch

    if isinstance(levels, torch.Tensor):
        return levels
    with warnings.catch_warnings():
        # Pillow's memory may not be written to, of which torch warns; nothing here writes.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(levels))


def read_encoded(image: Encoded) -> tuple[bytes, str]:
    """Give the bytes of an encoded image, and its name for sentences.

    Raises:
        VlmError: it is missing, or cannot be read.
    """
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image), "image bytes"
    if not isinstance(image, (str, Path)):
        return _read_open(image)
    path = Path(image)
    with reading(path) as name:
        return path.read_bytes(), name


@contextmanager
def reading(path: Path) -> Iterator[str]:
    """Give the name of an image file for sentences, while it is read.

    Raises:
        VlmError: it is missing, a folder, or cannot be read.
    """
    try:
        if path.is_file():
            yield f"image '{path}'"
            return
        what = "a folder" if path.is_dir() else "missing"
    except OSError as error:
        # What is too long for a path is often an encoded image; its beginning is enough to know it.
        shown = str(path) if len(str(path)) <= _SHOWN else f"{str(path)[:_SHOWN]}..."
        raise VlmError(f"image '{shown}' cannot be read: {error.strerror}; check the path and its rights") from error
    raise VlmError(f"image '{path}' is {what}; give the path of an image file")


def _read_open(file: BinaryIO) -> tuple[bytes, str]:
    path = getattr(file, "name", None)
    name = f"image '{path}'" if isinstance(path, str) else "image bytes"
    try:
        if file.seekable():
            file.seek(0)
        data = file.read()
    except (OSError, ValueError, AttributeError) as error:
        raise VlmError(f"{name} cannot be read: {error}; give an open binary file, or its path") from error
    if not isinstance(data, bytes):
        raise VlmError(f"{name} is open as text, so it gives a {type(data).__name__}; open it with mode 'rb'")
    return data, name


def open_encoded(file: BinaryIO, name: str) -> Image.Image:
    """Read the header of an encoded image; nothing is decoded.

    Args:
        file: its bytes, open.
        name: what sentences call it.

    Raises:
        VlmError: it is empty, no image, too large or broken.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of the limit at which it refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file)
    except UnidentifiedImageError:
        size = file.seek(0, io.SEEK_END)
        if not size:
            raise VlmError(f"{name} is empty (0 bytes); give an image file") from None
        raise VlmError(f"{name} is no image that Pillow can read ({size} bytes); check the file") from None
    except Image.DecompressionBombError:
        raise VlmError(f"{name} is over the limit of {MAX_PIXELS} px; shrink it first") from None
    except Exception as error:
        raise VlmError(f"{name} is truncated or broken: {error}; check the file") from error
