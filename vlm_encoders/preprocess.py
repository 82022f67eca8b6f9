"""From an image in any form to the pixels that an encoder sees."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from connectors.errors import VlmError
from connectors.tokens import Grid
from vlm_encoders.spec import EncoderSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_PIXELS", "ImageLike", "Preprocessor", "load_image"]

ImageLike: TypeAlias = "str | Path | bytes | Image.Image | np.ndarray[Any, Any] | Tensor"
"""A path, an encoded file's bytes, a PIL image, an (H, W, 3) uint8 array, or a (3, H, W) tensor."""

MAX_PIXELS = 178_956_970
"""Largest image that is decoded, px, as in Pillow. More is taken for a decompression bomb."""

_GIVE = "give a path, bytes, PIL image, (H, W, 3) array or (3, H, W) tensor"
_SHOWN = 200
_BACKGROUND = (255, 255, 255)
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def load_image(image: ImageLike) -> Image.Image:
    """Give an image in any form as upright RGB.

    EXIF orientation is applied, transparency is laid on white, 16 bits are scaled
    to 8, and grey, palette and CMYK images become RGB.

    Raises:
        VlmError: the image is missing, unreadable, empty, truncated, too large or no image; the file is named.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image, "the image")
    if isinstance(image, (str, Path)):
        return _decode(_read(Path(image)), f"image '{image}'")
    if isinstance(image, bytes):
        return _decode(image, "image bytes")
    return Image.fromarray(_as_array(image))


@dataclass(frozen=True)
class Preprocessor:
    """Images to pixels (B, 3, S, S) as the encoder was trained on; it knows no weights.

    Equal, bit by bit, to the PIL-backed image processors of transformers and to the
    transforms of timm and open_clip that belong to the encoder.

    Attributes:
        spec: whose size, resize, filter, mean and deviation are used.
    """

    spec: EncoderSpec

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Make float32 pixels (B, 3, S, S) of one image or several.

        Raises:
            VlmError: there is no image, or one cannot be read or is too narrow to be resized.
        """
        import torch

        many = _as_list(images)
        if not many:
            raise VlmError("there is no image to preprocess; give one or more")
        return torch.from_numpy(np.stack([self._pixels(load_image(image)) for image in many]))

    def _pixels(self, image: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
        placed = self._resize(image)
        levels = np.asarray(placed, dtype=np.float32) / np.float32(255)
        mean, std = np.array([self.spec.mean, self.spec.std], dtype=np.float32)
        pixels = (levels - mean) / std
        height, width = self.spec.image_size
        # SAM pads after it normalises: the border is 0, not black.
        below, right = height - pixels.shape[0], width - pixels.shape[1]
        pixels = np.pad(pixels, ((0, below), (0, right), (0, 0)))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _resize(self, image: Image.Image) -> Image.Image:
        spec = self.spec
        height, width = spec.image_size
        flt = _FILTERS[spec.interpolation]
        if spec.resize == "squash":
            return _resized(image, spec.image_size, flt)
        if spec.resize == "pad":
            return _resized(image, fit_size((image.height, image.width), spec.image_size), flt)
        goal = (int(height / spec.crop_pct), int(width / spec.crop_pct))
        rows, columns = cover_size((image.height, image.width), goal)
        resized = _resized(image, (rows, columns), flt)
        top, left = self._offset(rows - height), self._offset(columns - width)
        return resized.crop((left, top, left + width, top + height))

    def _offset(self, spare: int) -> int:
        # torchvision, under timm and open_clip, rounds half to even; transformers rounds down.
        return spare // 2 if self.spec.backend == "transformers" else round(spare / 2)


def cover_size(image_size: Grid, goal: Grid) -> Grid:
    """Give the smallest size (height, width) of the image's shape that covers `goal` px."""
    height, width = image_size
    rows, columns = goal
    if rows * width >= columns * height:
        return rows, max(columns, rows * width // height)
    return max(rows, columns * height // width), columns


def fit_size(image_size: Grid, goal: Grid) -> Grid:
    """Give the largest size (height, width) of the image's shape inside `goal` px."""
    height, width = image_size
    scale = min(goal[0] / height, goal[1] / width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def _resized(image: Image.Image, size: Grid, flt: Image.Resampling) -> Image.Image:
    rows, columns = size
    # Pillow resizes the width first, so an image as tall as the given one lies between.
    tallest = max(rows, image.height)
    if tallest * columns > MAX_PIXELS:
        raise VlmError(
            f"an image of {image.width}x{image.height} px would be resized through {columns}x{tallest} px, "
            f"over the limit of {MAX_PIXELS} px; crop it first"
        )
    return image.resize((columns, rows), flt)


def _as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    if isinstance(images, (str, Path, bytes, Image.Image)):
        return [images]
    ndim = getattr(images, "ndim", None)
    if ndim is not None and ndim != 4:
        return [images]  # type: ignore[list-item]
    try:
        return list(images)
    except TypeError:
        raise VlmError(f"a {type(images).__name__} is no image; {_GIVE}") from None


def _read(path: Path) -> bytes:
    try:
        if path.is_file():
            return path.read_bytes()
        what = "a folder" if path.is_dir() else "missing"
    except OSError as error:
        # What is too long for a path is often an encoded image; its beginning is enough to know it.
        shown = str(path) if len(str(path)) <= _SHOWN else f"{str(path)[:_SHOWN]}..."
        raise VlmError(f"image '{shown}' cannot be read: {error.strerror}; check the path and its rights") from error
    raise VlmError(f"image '{path}' is {what}; give the path of an image file")


def _decode(data: bytes, name: str) -> Image.Image:
    if not data:
        raise VlmError(f"{name} is empty (0 bytes); give an image file")
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of the limit at which it refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise VlmError(f"{name} is no image that Pillow can read ({len(data)} bytes); check the file") from None
    except Image.DecompressionBombError:
        raise VlmError(f"{name} is over the limit of {MAX_PIXELS} px; shrink it first") from None
    except Exception as error:
        raise VlmError(f"{name} is truncated or broken: {error}; check the file") from error
    return _to_rgb(image, name)


def _check_pixels(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise VlmError(f"{name} is {image.width}x{image.height}, over the limit of {MAX_PIXELS} px; shrink it first")
    if image.width < 1 or image.height < 1:
        raise VlmError(f"{name} is {image.width}x{image.height} px, so it shows nothing; give an image with pixels")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_pixels(image, name)
    try:
        return _flat(ImageOps.exif_transpose(image))
    except Exception as error:
        # Each of Pillow's decoders fails in its own way, and only here do they run.
        raise VlmError(f"{name} is truncated or broken: {error}; check the file") from error


def _flat(image: Image.Image) -> Image.Image:
    """Bring any mode to RGB, on white where it is transparent."""
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (*_BACKGROUND, 255))
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips 16 bits at 255 and so turns nearly all of them white.
    values = np.asarray(image, dtype=np.float64)
    top = 65535.0 if image.mode != "F" or values.max(initial=0) > 1 else 1.0
    if image.mode == "I" and values.max(initial=0) <= 255:
        top = 255.0
    grey = np.clip(np.rint(values / top * 255), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _as_array(image: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if not isinstance(image, np.ndarray):
        if not hasattr(image, "detach"):
            raise VlmError(f"a {type(image).__name__} is no image; {_GIVE}")
        if image.ndim != 3 or image.shape[0] not in {1, 3}:
            raise VlmError(f"an image tensor is (3, H, W), got shape {tuple(image.shape)}")
        image = image.detach().cpu().permute(1, 2, 0)
        image = (image.float() if image.is_floating_point() else image).numpy()
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in {1, 3} or 0 in image.shape:
        raise VlmError(f"an image array is (H, W, 3), got shape {image.shape}")
    if np.issubdtype(image.dtype, np.floating):
        if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
            raise VlmError(
                f"a float image runs from 0 to 1, got {image.min():.4g} to {image.max():.4g}; "
                "scale it, or give uint8 from 0 to 255"
            )
        image = np.rint(image * 255)
    elif image.dtype != np.uint8:
        raise VlmError(f"an image array is uint8, or float from 0 to 1, got {image.dtype}")
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)), dtype=np.uint8)
