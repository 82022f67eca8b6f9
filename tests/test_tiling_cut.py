"""Cut pictures against the pixels of transformers' processors, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from connectors.errors import VlmError
from vlm_encoders.tiling import LLAVA_NEXT_GRIDS, cut, plan_internvl, plan_tiles, whole_image

SIZES = [(96, 128), (131, 77), (75, 75), (30, 500), (501, 20), (64, 128), (1, 9), (300, 301), (97, 33)]


def photo(size: tuple[int, int]) -> Image.Image:
    """Make a picture with edges, ramps and noise."""
    height, width = size
    rng = np.random.default_rng(height * 10_000 + width)
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    noise = rng.integers(0, 120, (height, width, 3))
    return Image.fromarray(((ramp + noise) % 256).astype(np.uint8))


def as_pixels(pictures: list[Image.Image]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [32, 45])
def test_anyres_pixels_equal_transformers(size: tuple[int, int], side: int) -> None:
    pinpoints = [[rows * side, columns * side] for rows, columns in LLAVA_NEXT_GRIDS]
    processor: Any = LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=pinpoints
    )
    image = photo(size)
    pictures = cut(image, plan_tiles(size, side, LLAVA_NEXT_GRIDS))
    raw = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(as_pixels(pictures), raw)
    # An encoder's own preprocessing finds them at their native size and only normalises.
    clip: Any = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    normalised = processor(image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(clip(pictures, return_tensors="np")["pixel_values"], normalised)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("most", [1, 6, 12])
def test_internvl_pixels_equal_transformers(size: tuple[int, int], most: int) -> None:
    processor: Any = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=most)
    image = photo(size)
    pictures = cut(image, plan_internvl(size, 32, max_tiles=most))
    raw = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
    assert np.array_equal(as_pixels(pictures), raw["pixel_values"])


def test_every_picture_is_a_tile() -> None:
    for size in SIZES:
        for plan in (plan_tiles(size, 32, LLAVA_NEXT_GRIDS), plan_internvl(size, 32)):
            pictures = cut(photo(size), plan)
            assert len(pictures) == plan.num_views
            assert {(picture.mode, picture.size) for picture in pictures} == {("RGB", (32, 32))}


def test_without_thumbnail_only_tiles_remain() -> None:
    size = (96, 128)
    with_thumbnail = cut(photo(size), plan_tiles(size, 32, LLAVA_NEXT_GRIDS))
    without = cut(photo(size), plan_tiles(size, 32, LLAVA_NEXT_GRIDS, thumbnail=False))
    assert np.array_equal(as_pixels(without), as_pixels(with_thumbnail)[1:])


def test_whole_image_is_handed_on_as_it_is() -> None:
    image = photo((96, 128))
    assert cut(image, whole_image((96, 128), 32)) == [image]


def test_a_plan_for_another_image_is_refused() -> None:
    with pytest.raises(VlmError, match="upright"):
        cut(photo((96, 128)), plan_tiles((128, 96), 32, LLAVA_NEXT_GRIDS))
    with pytest.raises(VlmError, match="mode L"):
        cut(photo((96, 128)).convert("L"), plan_tiles((96, 128), 32, LLAVA_NEXT_GRIDS))
