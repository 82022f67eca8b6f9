"""Grey pictures of more than 8 bits: what is white is said by mode and file, never by what they show."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from connectors.errors import VlmError
from vlm_encoders.preprocess import load_image

LEVELS = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)


def saved(values: np.ndarray[Any, Any], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind, **options)
    return buffer.getvalue()


def grey(image: Any) -> list[int]:
    found = np.asarray(load_image(image))
    assert (found == found[..., :1]).all()
    levels: list[int] = found[0, :, 0].tolist()
    return levels


@pytest.mark.parametrize("top", [65535, 300, 200])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_are_scaled_by_their_depth(kind: str, top: int) -> None:
    values = np.minimum(LEVELS, top)
    expected = np.rint(values[0] / 257).tolist()
    for image in (Image.fromarray(values), Image.fromarray(values.astype(">u2")), saved(values, kind)):
        assert grey(image) == expected


def test_a_shallower_pgm_is_scaled_by_what_it_states() -> None:
    assert grey(b"P5 3 1 1023\n" + np.array([0, 4, 1023], ">u2").tobytes()) == [0, 1, 255]


def test_twelve_bits_of_a_tiff_are_scaled_by_their_depth() -> None:
    # The bytes of these two levels of 16 bits begin with those of two of 12, 4095 and 0.
    data = saved(np.array([[0xF0FF, 0]], np.uint16), "TIFF")
    depth = data.index(b"\x02\x01\x03\x00\x01\x00\x00\x00\x10\x00")
    assert grey(data[: depth + 8] + b"\x0c" + data[depth + 9 :]) == [255, 0]


def test_exif_orientation_is_applied_to_sixteen_bits() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    assert grey(saved(LEVELS, "PNG", exif=exif)) == [255, 128, 1, 0]


@pytest.mark.parametrize("level", [200, 300, 70_000, -1])
def test_integers_of_unknown_scale_are_refused(level: int) -> None:
    values = np.full((2, 2), level, np.int32)
    with pytest.raises(
        VlmError, match=r"^the image has 32-bit integer levels .mode I., of which nothing says which is"
    ):
        load_image(Image.fromarray(values))
    with pytest.raises(VlmError, match=r"^image bytes has 32-bit integer levels"):
        load_image(saved(values, "TIFF"))


def test_floats_run_from_0_to_1() -> None:
    values = np.array([[0, 0.25, 1]], np.float32)
    assert grey(Image.fromarray(values)) == [0, 64, 255]
    assert grey(saved(values / 255, "TIFF")) == [0, 0, 1]
    for wrong in (255.0, 1.01, -0.5, float("nan"), float("inf")):
        with pytest.raises(VlmError, match=r"^image bytes is a float image, which runs from 0 to 1, got .*; scale it"):
            load_image(saved(np.array([[0, wrong]], np.float32), "TIFF"))
