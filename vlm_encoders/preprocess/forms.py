"""The forms in which images come, and arrays and tensors among them brought to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, TypeGuard

import numpy as np
from PIL import Image

from connectors.errors import VlmError
from vlm_encoders.preprocess.modes import check_pixels

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Encoded", "ImageLike", "LevelArray", "as_array", "as_list", "is_encoded"]

Encoded: TypeAlias = "str | Path | bytes | bytearray | memoryview | BinaryIO"
"""A path, an encoded file's bytes, or a file opened as binary, which is read from its start."""
ImageLike: TypeAlias = "Encoded | Image.Image | np.ndarray[Any, Any] | Tensor"
"""An encoded image, a PIL image, an (H, W, 3) array, or a (3, H, W) tensor.

Arrays and tensors are uint8, or float from 0 to 1. An array is also (H, W) or (H, W, 1), grey,
or (H, W, 4), whose last channel is the opacity; a tensor also (1, H, W), grey.
"""
LevelArray: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

_GIVE = "give a path, bytes, PIL image, (H, W, 3) array or (3, H, W) tensor"


def is_encoded(image: Any) -> TypeGuard[Encoded]:
    """Say whether it is a file in some form: its path, its bytes, or itself, open."""
    return isinstance(image, (str, Path, bytes, bytearray, memoryview)) or callable(getattr(image, "read", None))


def as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """Give a list of one image or several; an array or tensor of four axes is several.

    Raises:
        VlmError: it is neither.
    """
    if isinstance(images, Image.Image) or is_encoded(images):
        return [images]
    if isinstance(images, Mapping):
        raise VlmError(f"a {type(images).__name__} is no image; {_GIVE}")
    ndim = getattr(images, "ndim", None)
    if ndim is not None and ndim != 4:
        return [images]  # type: ignore[list-item]
    try:
        return list(images)  # type: ignore[arg-type]
    except TypeError:
        raise VlmError(f"a {type(images).__name__} is no image; {_GIVE}") from None


def as_array(image: Any) -> LevelArray:
    """Give levels (H, W, 3), or (H, W, 4) with opacity, of an array or a tensor.

    Raises:
        VlmError: it is neither, has another shape, type or range, or is too large.
    """
    if not isinstance(image, np.ndarray):
        image = _from_tensor(image)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in {1, 3, 4} or 0 in image.shape:
        raise VlmError(f"an image array is (H, W, 3), (H, W, 4) or (H, W), got shape {image.shape}")
    check_pixels((image.shape[0], image.shape[1]), "the array")
    if np.issubdtype(image.dtype, np.floating):
        if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
            raise VlmError(
                f"a float image runs from 0 to 1, got {image.min():.4g} to {image.max():.4g}; "
                "scale it, or give uint8 from 0 to 255"
            )
        image = np.rint(image * 255)
    elif image.dtype != np.uint8:
        raise VlmError(f"an image array is uint8, or float from 0 to 1, got {image.dtype}")
    channels = 3 if image.shape[2] == 1 else image.shape[2]
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], channels)), dtype=np.uint8)


def _from_tensor(image: Any) -> np.ndarray[Any, Any]:
    if not hasattr(image, "detach"):
        raise VlmError(f"a {type(image).__name__} is no image; {_GIVE}")
    if image.ndim == 3 and image.shape[0] in {1, 3}:
        image = image.detach().cpu().permute(1, 2, 0)
        levels: np.ndarray[Any, Any] = (image.float() if image.is_floating_point() else image).numpy()
        return levels
    raise VlmError(f"an image tensor is (3, H, W), got shape {tuple(image.shape)}")
