"""JPEG files through torchvision: the same levels as through Pillow, the same refusals."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from connectors.errors import VlmError
from vlm_encoders.preprocess import load_image
from vlm_encoders.preprocess.jpeg import decode_jpeg
from vlm_encoders.preprocess.load import load_levels

assert torchvision.io.decode_jpeg

KINDS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True, "subsampling": 2},
    "best": {"quality": 100, "subsampling": 0},
    "worst": {"quality": 1},
    "RGB": {"keep_rgb": True},
    "restarts": {"restart_marker_blocks": 1},
    "optimised": {"optimize": True},
}


def picture(size: tuple[int, int] = (45, 37), mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def by_torchvision(data: bytes) -> torch.Tensor | None:
    return decode_jpeg(Image.open(io.BytesIO(data)), data)


def assert_same(levels: Any, data: bytes) -> None:
    assert isinstance(levels, torch.Tensor)
    assert np.array_equal(levels.numpy(), np.asarray(load_image(data)))


@pytest.mark.parametrize("size", [(45, 37), (16, 16), (1, 1), (7, 200), (641, 33)])
@pytest.mark.parametrize("kind", KINDS)
def test_levels_are_those_of_pillow(kind: str, size: tuple[int, int]) -> None:
    data = jpeg(picture(size), **KINDS[kind])
    assert_same(by_torchvision(data), data)


@pytest.mark.parametrize("progressive", [False, True])
def test_grey_levels_are_those_of_pillow(*, progressive: bool) -> None:
    data = jpeg(picture(mode="L"), progressive=progressive)
    assert_same(by_torchvision(data), data)


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_that_of_pillow(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(picture(), exif=exif)
    assert_same(by_torchvision(data), data)
    assert load_image(data).size == ((37, 45) if 5 <= orientation <= 8 else (45, 37))


def test_other_files_are_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    png = io.BytesIO()
    picture().save(png, "PNG")
    assert by_torchvision(png.getvalue()) is None
    cmyk = jpeg(picture(mode="CMYK"))
    assert by_torchvision(cmyk) is None
    found = load_levels(cmyk, by_torch=True)
    assert isinstance(found, Image.Image)
    assert found.tobytes() == Image.open(io.BytesIO(cmyk)).convert("RGB").tobytes()
    data = jpeg(picture())
    assert isinstance(load_levels(data, by_torch=False), Image.Image)
    monkeypatch.delitem(sys.modules, "torchvision.io")
    assert by_torchvision(data) is None
    assert isinstance(load_levels(data, by_torch=True), Image.Image)


@pytest.mark.parametrize("kind", ["4:2:0", "progressive", "restarts"])
def test_a_truncated_file_is_refused_wherever_it_ends(kind: str) -> None:
    data = jpeg(picture((90, 80)), **KINDS[kind])
    random = np.random.default_rng(0)
    for length in {*random.integers(2, len(data) - 2, 60).tolist(), len(data) - 3, len(data) - 20}:
        assert not isinstance(_outcome(data[:length], by_torch=True), bytes), length
        assert _outcome(data[:length], by_torch=True) == _outcome(data[:length], by_torch=False)


def test_a_large_truncated_file_is_refused() -> None:
    # Pillow reads 64 KiB at a time.
    data = jpeg(picture((700, 500)), quality=95)
    assert len(data) > 3 << 16
    for length in (1 << 16, (1 << 16) + 1, 2 << 16, len(data) - 100, len(data) - 3):
        with pytest.raises(VlmError, match="image bytes is truncated or broken"):
            load_levels(data[:length], by_torch=True)


@pytest.mark.parametrize("kind", ["4:2:0", "progressive"])
def test_a_damaged_file_ends_as_in_pillow(kind: str) -> None:
    data = jpeg(picture((40, 30)), **KINDS[kind])
    random = np.random.default_rng(1)
    for _ in range(120):
        damaged = bytearray(data)
        # Behind the header: a changed size would only be refused or cost memory.
        for place in random.integers(200, len(data), 3):
            damaged[place] = random.integers(0, 256)
        assert _outcome(bytes(damaged), by_torch=True) == _outcome(bytes(damaged), by_torch=False)


def _outcome(data: bytes, *, by_torch: bool) -> bytes | str:
    try:
        levels = load_levels(data, by_torch=by_torch)
    except VlmError as error:
        return str(error)
    return levels.tobytes() if isinstance(levels, Image.Image) else levels.numpy().tobytes()


def test_torchvision_is_not_imported_for_it() -> None:
    code = (
        "import io, sys, numpy; from PIL import Image; from vlm_encoders.preprocess.load import load_levels\n"
        "file = io.BytesIO(); Image.new('RGB', (8, 8)).save(file, 'JPEG')\n"
        "load_levels(file.getvalue(), by_torch=True); print('torchvision' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
