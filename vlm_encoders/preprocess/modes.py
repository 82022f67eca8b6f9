"""Pictures of any mode brought to upright RGB."""

from __future__ import annotations

import warnings

from PIL import ExifTags, Image, ImageOps

from connectors.errors import VlmError
from connectors.tokens import Grid
from vlm_encoders.preprocess.deep import deep_to_rgb, is_deep
from vlm_encoders.preprocess.sizes import MAX_PIXELS

__all__ = ["WHITE", "check_pixels", "to_rgb"]

WHITE = (255, 255, 255)


def to_rgb(
    image: Image.Image, name: str, background: tuple[int, int, int] = WHITE, *, copy: bool = True
) -> Image.Image:
    """Decode a picture and give it upright, in RGB, on the background where it is transparent.

    Args:
        image: in any mode.
        name: what sentences call it.
        background: red, green and blue, 0 to 255.
        copy: give a picture of its own even if the given one is right as it is.

    Raises:
        VlmError: it is too large, empty or broken, or its levels have no known scale.
    """
    check_pixels((image.height, image.width), name)
    try:
        if is_deep(image):
            upright = deep_to_rgb(image, name)
        elif not copy and _is_plain(image):
            image.load()
            upright = image
        else:
            upright = _flat(ImageOps.exif_transpose(image), background)
        frames = _frames(image)
    except VlmError:
        raise
    except Exception as error:
        # Each of Pillow's decoders fails in its own way, and only here do they run.
        raise VlmError(f"{name} is truncated or broken: {error}; check the file") from error
    if frames > 1:
        warnings.warn(f"{name} has {frames} frames; only frame {image.tell() + 1} is used", UserWarning, stacklevel=2)
    return upright


def check_pixels(size: Grid, name: str) -> None:
    """Refuse a picture by its size (height, width), px, which a header states before anything is decoded.

    Raises:
        VlmError: it is over the limit, or has no pixels.
    """
    height, width = size
    if width * height > MAX_PIXELS:
        raise VlmError(f"{name} is {width}x{height}, over the limit of {MAX_PIXELS} px; shrink it first")
    if width < 1 or height < 1:
        raise VlmError(f"{name} is {width}x{height} px, so it shows nothing; give an image with pixels")


def _frames(image: Image.Image) -> int:
    # The further pictures of an MPO are the camera's previews or gain maps, no frames.
    return 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))


def _is_plain(image: Image.Image) -> bool:
    """Say whether it is upright RGB already, without transparency."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return image.mode == "RGB" and "transparency" not in image.info and orientation == 1


def _flat(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "La":
        # Pillow turns it into nothing else.
        image = image.convert("LA")
    if image.mode in {"RGBA", "LA", "PA", "RGBa"} or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")
