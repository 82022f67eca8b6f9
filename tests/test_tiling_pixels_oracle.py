"""Exact pixels of tiles against the PIL-backed processors of transformers, bit for bit, on 10,000 sizes a tiler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling import Tiler, build_tiler
from vlm_encoders.tiling.pixels import TilePixels

Levels = np.ndarray[Any, np.dtype[np.uint8]]
Make = Callable[[Levels], Sequence[Levels]]
"""(3, H, W) levels to the (3, height, width) levels of each view, before they are normalised."""

SIDE = 8
LONGEST = 60 * SIDE
REAL = [(1080, 1920), (1601, 1199), (336, 336), (2400, 30), (20_000, 40), (17, 20_000), (1, 20_000), (20_000, 1)]


@functools.cache
def small_sizes(count: int = 10_000, longest: int = LONGEST) -> list[tuple[int, int]]:
    """Choose different sizes: all of the smallest, strips, whole tiles and one more or less, and of any side.

    None is more than `longest` times as long as wide.
    """
    near = [tiles * SIDE + more for tiles in range(1, 13) for more in (-1, 0, 1)]
    chosen = dict.fromkeys((height, width) for height in range(1, 21) for width in range(1, 21))
    chosen |= dict.fromkeys((height, width) for height in near for width in near)
    for long in range(24, LONGEST + 1, 6):
        chosen |= dict.fromkeys([(1, long), (long, 1), (2, long), (long, 3)])
    random = np.random.default_rng(0)
    while len(chosen) < count:
        height, width = np.exp(random.uniform(0, np.log(LONGEST + 0.9), 2)).astype(int)
        chosen[int(height), int(width)] = None
        if len(chosen) == count:
            chosen = {size: None for size in chosen if max(size) <= longest * min(size)}
    return list(chosen)


@functools.cache
def scene() -> Levels:
    """Make a picture of ramps, edges and noise, of which every image is the top left part."""
    random = np.random.default_rng(1)
    rows, columns = np.mgrid[:LONGEST, :LONGEST]
    ramps = np.stack([rows * 3, columns * 5, rows + columns], axis=2)
    boxes = 90 * ((rows // 13 + columns // 17) % 2)[..., None]
    return ((ramps + boxes + random.integers(0, 80, (LONGEST, LONGEST, 3))) % 256).astype(np.uint8)


def image_of(size: tuple[int, int]) -> Levels:
    if max(size) > LONGEST:
        return np.random.default_rng(size).integers(0, 256, (*size, 3), dtype=np.uint8)
    return np.ascontiguousarray(scene()[: size[0], : size[1]])


def spec_for(processor: Any, side: int, *, packs: bool) -> EncoderSpec:
    return EncoderSpec(
        name="literal", family="any", backend="transformers", source="", weights=None, image_size=side, stride=side,
        dim=8, num_layers=2, mean=tuple(processor.image_mean), std=tuple(processor.image_std), exact_pixels=True,
        packs=packs, sizes="any",
    )  # fmt: skip


def levels_table(processor: Any) -> np.ndarray[Any, Any]:
    """Give what the processor makes of each level of each colour: (3, 256)."""
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (3, 16, 16))
    scaled = processor.rescale(ramp, processor.rescale_factor)
    normalised = processor.normalize(scaled, processor.image_mean, processor.image_std)
    table: np.ndarray[Any, Any] = normalised.reshape(3, 256).astype(np.float32)
    return table


def check_sizes(tiler: Tiler, processor: Any, make: Make, sizes: Iterator[tuple[int, int]] | list[Any]) -> None:
    pixels = TilePixels(spec_for(processor, tiler.tile_size, packs=tiler.native))
    table = levels_table(processor)
    for size in sizes:
        image = image_of(size)
        ours = pixels(pixels.load(Image.fromarray(image)), tiler.plan(size))
        theirs = make(image.transpose(2, 0, 1))
        assert len(ours) == len(theirs), size
        for view, raw in zip(ours, theirs, strict=True):
            expected = np.stack([each.take(levels) for each, levels in zip(table, raw, strict=True)])
            assert np.array_equal(view.numpy(), expected), size


def anyres(processor: Any, side: int) -> Make:
    return lambda image: processor.get_image_patches(
        image, processor.image_grid_pinpoints, (side, side), side, processor.resample
    )


def next_case(side: int) -> tuple[Tiler, Any, Make]:
    tiler: Any = build_tiler("llava-next", side)
    processor: Any = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=[[rows * side, columns * side] for rows, columns in tiler.grids],
    )
    return tiler, processor, anyres(processor, side)


def onevision_case(side: int) -> tuple[Tiler, Any, Make]:
    tiler: Any = build_tiler("llava-onevision", side)
    processor: Any = LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side},
        image_grid_pinpoints=[[rows * side, columns * side] for rows in range(1, 7) for columns in range(1, 7)],
    )
    return tiler, processor, anyres(processor, side)


def got_case(side: int) -> tuple[Tiler, Any, Make]:
    processor: Any = GotOcr2ImageProcessorPil()
    size = SizeDict(height=side, width=side)

    def make(image: Levels) -> Sequence[Levels]:
        return processor.crop_image_to_patches(image, 1, 12, patch_size=size, resample=processor.resample)

    return build_tiler("internvl", side), processor, make


def idefics_case(name: str, processor: Any, side: int) -> tuple[Tiler, Any, Make]:
    longest = 4 * side

    def make(image: Levels) -> Sequence[Levels]:
        resized = processor.resize(image, SizeDict(longest_edge=longest), processor.resample)
        whole = processor.resize_for_vision_encoder(resized, side, resample=processor.resample)
        frames, _, _ = processor.split_images(whole, {"longest_edge": side}, resample=processor.resample)
        return frames

    return build_tiler(name, side, longest_edge=longest), processor, make


def qwen_case(side: int) -> tuple[Tiler, Any, Make]:
    tiler: Any = build_tiler("qwen2-vl", patch=side // 2, merge=2, min_pixels=2 * side**2, max_pixels=30 * side**2)
    processor: Any = Qwen2VLImageProcessorPil()

    def make(image: Levels) -> Sequence[Levels]:
        size = SizeDict(shortest_edge=tiler.min_pixels, longest_edge=tiler.max_pixels)
        return [processor.resize(image, size, processor.resample, factor=side)]

    return tiler, processor, make


def siglip2_case(side: int) -> tuple[Tiler, Any, Make]:
    tiler: Any = build_tiler("naflex", patch=side, max_patches=30)
    processor: Any = Siglip2ImageProcessorPil()

    def make(image: Levels) -> Sequence[Levels]:
        made = processor._preprocess(
            [image], True, side, 30, processor.resample, False, 1 / 255, False, None, None, None
        )
        rows, columns = made["spatial_shapes"][0]
        patches = made["pixel_values"][0][: rows * columns].reshape(rows, columns, side, side, 3)
        return [patches.transpose(4, 0, 2, 1, 3).reshape(3, rows * side, columns * side)]

    return tiler, processor, make


def pixtral_case(side: int) -> tuple[Tiler, Any, Make]:
    tiler: Any = build_tiler("pixtral", patch=side, longest_edge=12 * side)
    processor: Any = PixtralImageProcessorPil()

    def make(image: Levels) -> Sequence[Levels]:
        longest = SizeDict(longest_edge=12 * side)
        return [processor.resize(image, longest, SizeDict(height=side, width=side), processor.resample)]

    return tiler, processor, make


CASES: dict[str, Callable[[int], tuple[Tiler, Any, Make]]] = {
    "llava-next": next_case,
    "llava-onevision": onevision_case,
    "internvl": got_case,
    "idefics3": lambda side: idefics_case("idefics3", Idefics3ImageProcessorPil(), side),
    "smolvlm": lambda side: idefics_case("smolvlm", SmolVLMImageProcessorPil(), side),
    "qwen2-vl": qwen_case,
}


@pytest.mark.parametrize("name", CASES)
def test_pixels_of_10000_small_sizes_equal_transformers(name: str) -> None:
    tiler, processor, make = CASES[name](SIDE)
    sizes = small_sizes(longest=200) if name == "qwen2-vl" else small_sizes()
    assert len(set(sizes)) == 10_000
    check_sizes(tiler, processor, make, sizes)


@pytest.mark.parametrize(("name", "case"), [("naflex", siglip2_case), ("pixtral", pixtral_case)])
def test_pixels_of_native_views_equal_transformers(name: str, case: Any) -> None:
    # Pixtral's own rounding leaves the thinnest strips without a pixel.
    check_sizes(*case(SIDE), small_sizes(longest=96)[::5])


@pytest.mark.parametrize("name", CASES)
def test_pixels_at_real_sizes_equal_transformers(name: str) -> None:
    tiler, processor, make = CASES[name](32 if name == "qwen2-vl" else 336)
    # Qwen's own rule refuses images more than 200 times as long as wide.
    check_sizes(tiler, processor, make, [size for size in REAL if name != "qwen2-vl" or max(size) <= 200 * min(size)])


CALLS = [(50, 70), (131, 24), (9, 9), (33, 200)]


def called(tiler: Tiler, processor: Any, image_size: tuple[int, int], **options: Any) -> tuple[Any, Any]:
    """Give our views, and what a whole call of the processor makes."""
    pixels = TilePixels(spec_for(processor, tiler.tile_size, packs=tiler.native))
    image = Image.fromarray(image_of(image_size))
    ours = [view.numpy() for view in pixels(pixels.load(image), tiler.plan(image_size))]
    return ours, processor(image, return_tensors="np", **options)


@pytest.mark.parametrize("size", CALLS)
def test_whole_calls_of_tiling_processors_give_these_pixels(size: tuple[int, int]) -> None:
    got = {"crop_to_patches": True, "size": {"height": SIDE, "width": SIDE}}
    edges = {"size": {"longest_edge": 4 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    for name, options in [("llava-next", {}), ("llava-onevision", {}), ("internvl", got), ("idefics3", edges)]:
        tiler, processor, _ = CASES[name](SIDE)
        ours, theirs = called(tiler, processor, size, **options)
        values = theirs["pixel_values"]
        assert np.array_equal(np.stack(ours), values.reshape(-1, *values.shape[-3:])), name


@pytest.mark.parametrize("size", CALLS)
def test_whole_calls_of_native_processors_give_these_pixels(size: tuple[int, int]) -> None:
    tiler, _, _ = qwen_case(SIDE)
    bounds = {"shortest_edge": 2 * SIDE**2, "longest_edge": 30 * SIDE**2}
    (ours,), theirs = called(tiler, Qwen2VLImageProcessorPil(size=bounds, patch_size=SIDE // 2), size)
    _, rows, columns = theirs["image_grid_thw"][0]
    # Rows and columns of 2 x 2 patches, then these patches, colour, two equal frames, and rows and columns of px.
    patches = theirs["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, SIDE // 2, SIDE // 2)
    frames = patches.transpose(5, 4, 0, 2, 6, 1, 3, 7).reshape(2, *ours.shape)
    assert np.array_equal(frames[0], ours)
    assert np.array_equal(frames[1], ours)
    tiler, _, _ = siglip2_case(SIDE)
    (ours,), theirs = called(tiler, Siglip2ImageProcessorPil(patch_size=SIDE, max_num_patches=30), size)
    rows, columns = theirs["spatial_shapes"][0]
    patches = theirs["pixel_values"][0][: rows * columns].reshape(rows, columns, SIDE, SIDE, 3)
    assert np.array_equal(patches.transpose(4, 0, 2, 1, 3).reshape(ours.shape), ours)
    tiler, _, _ = pixtral_case(SIDE)
    options = {"size": {"longest_edge": 12 * SIDE}, "patch_size": {"height": SIDE, "width": SIDE}}
    (ours,), theirs = called(tiler, PixtralImageProcessorPil(**options), size)
    assert np.array_equal(theirs["pixel_values"][0], ours)
