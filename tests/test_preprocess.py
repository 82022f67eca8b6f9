"""Images in any form and of any kind, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import pickle
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from connectors.errors import VlmError
from vlm_encoders.preprocess import MAX_PIXELS, Preprocessor, cover_size, expand_size, fit_size, load_image
from vlm_encoders.registry import encoder_spec
from vlm_encoders.spec import Resize

RED, GREEN = (255, 0, 0), (0, 255, 0)


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def two_halves(mode: str = "RGB") -> Image.Image:
    """Make an image of 4 x 2 px, red at the left and green at the right."""
    image = Image.new("RGB", (4, 2), RED)
    image.paste(GREEN, (2, 0, 4, 2))
    return image.convert(mode)


@settings(max_examples=1000, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 1500), st.integers(1, 1500))
def test_resized_sizes_cover_and_fit(height: int, width: int, rows: int, columns: int) -> None:
    covered, fitted = cover_size((height, width), (rows, columns)), fit_size((height, width), (rows, columns))
    assert covered[0] == rows or covered[1] == columns
    assert covered[0] >= rows
    assert covered[1] >= columns
    assert fitted[0] == rows or fitted[1] == columns
    assert 1 <= fitted[0] <= rows
    assert 1 <= fitted[1] <= columns
    expanded = expand_size((height, width), (rows, columns))
    assert expanded[0] == height or expanded[1] == width
    assert expanded[0] >= height
    assert expanded[1] >= width
    # The shape is that of the goal, to half a pixel of the side that grew, if one did.
    assert abs(expanded[0] * columns - expanded[1] * rows) <= max(rows, columns) / 2
    assert expand_size((height, width), (rows, rows)) == (max(height, width),) * 2


def test_the_pad_is_zero_at_the_right_and_bottom() -> None:
    preprocess = Preprocessor(encoder_spec("sam-vit-b"))
    wide = preprocess(Image.new("RGB", (200, 100), (255, 255, 255)))[0]
    assert wide[:, :512].min() > 2
    assert wide[:, 512:].abs().max() == 0
    tall = preprocess(Image.new("RGB", (100, 200), (255, 255, 255)))[0]
    assert tall[:, :, :512].min() > 2
    assert tall[:, :, 512:].abs().max() == 0


def test_views_need_not_be_square() -> None:
    spec = encoder_spec("clip-vit-b-32").resized((64, 128))
    image = Image.new("RGB", (200, 100), RED)
    image.paste(GREEN, (100, 0, 200, 100))
    pixels = Preprocessor(spec)(image)
    assert pixels.shape == (1, 3, 64, 128)
    assert (pixels[0, 0, :, :60] > 1).all()
    assert (pixels[0, 1, :, 68:] > 1).all()


def test_every_form_of_an_image_gives_the_same_pixels(tmp_path: Path) -> None:
    image = picture((50, 40))
    path = tmp_path / "image.png"
    image.save(path)
    array = np.asarray(image).copy()
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    preprocess = Preprocessor(encoder_spec("clip-vit-b-32"))
    expected = preprocess(image)
    forms: list[Any] = [path, str(path), path.read_bytes(), array, tensor, tensor.float() / 255, array / 255]
    for form in forms:
        assert torch.equal(preprocess(form), expected), type(form)
    assert torch.equal(preprocess(forms), expected.expand(len(forms), -1, -1, -1))
    data = path.read_bytes()
    with path.open("rb") as file:
        files: list[Any] = [bytearray(data), memoryview(data), io.BytesIO(data), file]
        for form in files * 2:
            assert torch.equal(preprocess(form), expected), type(form)
        assert torch.equal(preprocess(files), expected.expand(len(files), -1, -1, -1))
    batch = torch.stack([tensor, tensor])
    assert torch.equal(preprocess(batch), expected.expand(2, -1, -1, -1))
    assert torch.equal(preprocess(array[None]), expected)


def test_it_travels_to_a_worker() -> None:
    preprocess = Preprocessor(encoder_spec("dinov2-vit-s-14"))
    again = pickle.loads(pickle.dumps(preprocess))  # noqa: S301
    assert again == preprocess
    assert torch.equal(again(picture((30, 40))), preprocess(picture((30, 40))))


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    found = load_image(encoded(two_halves(), "PNG", exif=exif))
    assert found.size == (2, 4)
    assert found.getpixel((0, 0)) == RED
    assert found.getpixel((0, 3)) == GREEN
    opened = Image.open(io.BytesIO(encoded(two_halves(), "PNG", exif=exif)))
    assert load_image(opened).tobytes() == found.tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "P"])
def test_transparency_lies_on_white(mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.info["transparency"] = 0
    else:
        image = Image.new(mode, (2, 1))
    assert load_image(image).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (1, 1), (*RED, 128))
    assert load_image(half).getpixel((0, 0)) == (255, 127, 127)
    assert load_image(half.convert("RGBa")).getpixel((0, 0)) == (255, 127, 127)
    assert load_image(Image.new("LA", (1, 1), (0, 128)).convert("La")).getpixel((0, 0)) == (127, 127, 127)


def test_transparency_lies_on_the_background_that_is_asked_for() -> None:
    half = Image.new("RGBA", (1, 1), (*RED, 128))
    assert load_image(half, background=(0, 0, 255)).getpixel((0, 0)) == (128, 0, 127)
    levels = np.asarray(half)
    assert load_image(levels).getpixel((0, 0)) == (255, 127, 127)
    assert load_image(levels, background=(0, 0, 255)).getpixel((0, 0)) == (128, 0, 127)
    assert load_image(encoded(half), background=(0, 0, 255)).getpixel((0, 0)) == (128, 0, 127)
    for wrong in ((0, 0), (0, 0, 256), (0.5, 0.5, 0.5)):
        with pytest.raises(VlmError, match="a background is red, green and blue from 0 to 255, got"):
            load_image(half, background=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("exact", [False, True])
def test_arrays_with_opacity_and_grey_ones_are_images(*, exact: bool) -> None:
    spec = dataclasses.replace(encoder_spec("clip-vit-b-32"), exact_pixels=exact)
    preprocess = Preprocessor(spec)
    levels = np.random.default_rng(0).integers(0, 256, (600, 500, 4), dtype=np.uint8)
    assert torch.equal(preprocess(levels), preprocess(Image.fromarray(levels)))
    assert torch.equal(preprocess(levels / 255), preprocess(Image.fromarray(levels)))
    grey = levels[..., 0]
    expected = preprocess(Image.fromarray(grey))
    tensor = torch.from_numpy(grey.copy())[None]
    for form in (grey, grey[..., None], tensor, tensor.double() / 255, grey[::-1][::-1]):
        assert torch.equal(preprocess(form), expected)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_taken_and_said_so(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in (RED, GREEN, (0, 0, 255))]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / f"moving.{kind}"
    path.write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    with pytest.warns(UserWarning, match=f"image '{path}' has 3 frames; only frame 1 is used"):
        assert load_image(path).getpixel((0, 0)) == RED
    with pytest.warns(UserWarning, match="has 3 frames"):
        Preprocessor(encoder_spec("clip-vit-b-32"))(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(encoded(frames[0], kind, **options)).getpixel((0, 0)) == RED


def test_a_camera_s_further_pictures_are_no_frames() -> None:
    data = encoded(picture((32, 32)), "MPO", save_all=True, append_images=[picture((16, 16))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(data).size == (32, 32)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad", "expand"])
@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1), (20_000, 150), (150, 20_000), (20_000, 1)])
def test_narrow_and_long_images_are_taken(size: tuple[int, int], resize: Resize) -> None:
    if resize == "crop" and size == (20_000, 1):
        pytest.skip("it would grow beyond the limit; see below")
    spec = dataclasses.replace(encoder_spec("clip-vit-b-32").resized(64), resize=resize)
    image = Image.new("RGB", size, (255, 255, 255))
    pixels = Preprocessor(spec)(image)
    assert pixels.shape == (1, 3, 64, 64)
    colour = torch.tensor([int(mean * 255) for mean in spec.mean]) / 255 if resize == "expand" else torch.ones(3)
    if size != (1, 1):
        assert torch.equal(pixels[0, :, 0, 0], (colour - torch.tensor(spec.mean)) / torch.tensor(spec.std))
    assert pixels.max() > 0.5 or resize == "expand"


def test_the_expanded_part_has_the_mean_colour() -> None:
    spec = dataclasses.replace(encoder_spec("clip-vit-b-32").resized((32, 64)), resize="expand")
    pixels = Preprocessor(spec)(Image.new("RGB", (100, 100), (255, 255, 255)))[0]
    # The canvas is 100 x 200, so a quarter of the view is filled on either side.
    level = torch.tensor([int(mean * 255) for mean in spec.mean]) / 255
    filled = (level - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    for side in (pixels[..., :14], pixels[..., 50:]):
        assert torch.equal(side, filled[:, None, None].expand_as(side))
    assert pixels[..., 20:44].min() > 1.9


def test_a_transparent_colour_of_a_png_is_transparent() -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), GREEN)
    found = load_image(encoded(image, "PNG", transparency=RED))
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), GREEN]


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = two_halves(mode)
    found = load_image(image)
    assert found.mode == "RGB"
    assert found.tobytes() == image.convert("RGB").tobytes()
    if mode in {"P", "CMYK"}:
        assert found.tobytes() == two_halves().tobytes()


def test_bad_files_are_named(tmp_path: Path) -> None:
    def write(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    jpeg = encoded(picture((64, 64)), "JPEG")
    cases = {
        tmp_path / "gone.png": "missing",
        tmp_path: "a folder",
        write("empty.png", b""): "empty",
        write("text.png", b"not an image at all"): "no image that Pillow can read",
        write("cut.jpg", jpeg[: len(jpeg) // 2]): "truncated or broken",
        write("cut.png", encoded(picture((64, 64)))[:300]): "truncated or broken",
        write("head.png", encoded(picture((64, 64)))[:20]): "truncated|no image",
    }
    for path, sentence in cases.items():
        with pytest.raises(VlmError, match=sentence) as caught:
            load_image(path)
        assert str(path) in str(caught.value)
    with pytest.raises(VlmError, match="image bytes is no image"):
        load_image(b"nothing")


def test_a_file_that_the_system_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VlmError, match=r"^image 'a{200}\.\.\.' cannot be read: File name too long; check"):
        load_image("a" * 5000)
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(picture((4, 4))))

    def refuse(_: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    # Rights bind no superuser, who may well run the tests.
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(VlmError, match=f"^image '{path}' cannot be read: Permission denied; check"):
        load_image(path)


def test_an_open_file_that_gives_no_bytes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "image.svg"
    path.write_text("<svg/>")
    with path.open() as file, pytest.raises(VlmError, match=f"^image '{path}' is open as text, so it gives a str"):
        load_image(file)  # type: ignore[arg-type]
    with pytest.raises(VlmError, match=f"^image '{path}' cannot be read: I/O operation on closed file; give an open"):
        load_image(file)  # type: ignore[arg-type]
    with pytest.raises(VlmError, match=r"^image bytes is empty \(0 bytes\)"):
        Preprocessor(encoder_spec("clip-vit-b-32"))(io.BytesIO())


@pytest.mark.parametrize(
    ("name", "size", "through"),
    [
        ("clip-vit-b-32", (1, 20_000), "224x4480000"),
        ("clip-vit-b-32", (20_000, 1), "4480000x224"),
        ("siglip-b-16-224", (1, 1_000_000), "224x1000000"),
    ],
)
def test_a_strip_that_would_grow_beyond_the_limit_is_refused(name: str, size: tuple[int, int], through: str) -> None:
    words = f"image of {size[0]}x{size[1]} px would be resized through {through} px, over the limit of {MAX_PIXELS} px"
    with pytest.raises(VlmError, match=words):
        Preprocessor(encoder_spec(name))(Image.new("RGB", size))


def test_a_decompression_bomb_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 17_000, 16_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(VlmError, match=f"over the limit of {MAX_PIXELS} px"):
        load_image(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(VlmError, match=f"17000x16000, over the limit of {MAX_PIXELS} px"):
        load_image(bomb)


def test_large_arrays_and_images_are_refused_alike() -> None:
    wide = np.broadcast_to(np.zeros(3, np.uint8), (1, 17_000 * 16_000, 3))
    with pytest.raises(VlmError, match=f"the array is 272000000x1, over the limit of {MAX_PIXELS} px"):
        Preprocessor(encoder_spec("clip-vit-b-32"))(wide)


def test_a_jpeg_bomb_is_not_decoded() -> None:
    import torchvision

    data = bytearray(encoded(picture((16, 16)), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", 60_000, 60_000)
    assert torchvision.io.decode_jpeg
    with pytest.raises(VlmError, match=f"image bytes is over the limit of {MAX_PIXELS} px"):
        Preprocessor(encoder_spec("clip-vit-b-32"))(bytes(data))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_give_an_image_or_a_sentence(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A changed size must not cost the test gigabytes.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    data = encoded(picture((24, 16)), kind)
    random = np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(data)
        for place in random.integers(0, len(data), 4):
            broken[place] = random.integers(0, 256)
        with contextlib.suppress(VlmError):
            assert load_image(bytes(broken)).mode == "RGB"


def test_an_open_truncated_image_is_refused() -> None:
    data = encoded(picture((64, 64)), "JPEG")
    with pytest.raises(VlmError, match="the image is truncated or broken"):
        load_image(Image.open(io.BytesIO(data[:900])))


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (7, "a int is no image"),
        (None, "a NoneType is no image"),
        ([], "there is no image"),
        ([3.5], "a float is no image"),
        ({"bytes": b"", "path": "a.png"}, "^a dict is no image; give a path"),
        ([{"bytes": b"", "path": "a.png"}], "^a dict is no image; give a path"),
        (np.zeros((4, 4, 5), np.uint8), r"is \(H, W, 3\), \(H, W, 4\) or \(H, W\), got shape \(4, 4, 5\)"),
        (np.zeros((3, 4, 8), np.uint8), r"got shape \(3, 4, 8\)"),
        (np.zeros((0, 4, 3), np.uint8), "got shape"),
        (np.zeros((4, 4, 3), np.int64), "is uint8, or float from 0 to 1, got int64"),
        (np.full((4, 4, 3), 200.0), "runs from 0 to 1, got 200 to 200"),
        (np.full((4, 4, 3), np.nan), "runs from 0 to 1"),
        (torch.zeros(4, 4, 3), r"an image tensor is \(3, H, W\), got shape \(4, 4, 3\)"),
        (torch.full((3, 2, 2), -1.0), "runs from 0 to 1"),
        (torch.zeros(3, 0, 2), "got shape"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, sentence: str) -> None:
    with pytest.raises(VlmError, match=sentence):
        Preprocessor(encoder_spec("clip-vit-b-32"))(image)
