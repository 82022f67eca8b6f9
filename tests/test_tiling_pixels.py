"""Pixels of tiles: how far the fast path is from the exact one, in chunks, in joints, from any form of image."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

from connectors.errors import VlmError
from vlm_encoders.preprocess import Preprocessor
from vlm_encoders.preprocess.fast import is_near
from vlm_encoders.preprocess.load import load_levels
from vlm_encoders.preprocess.sizes import Placement
from vlm_encoders.registry import encoder_spec
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling import Page, TilePlan, build_tiler, cut
from vlm_encoders.tiling.pixels import TilePixels
from vlm_encoders.tiling.plan import Box
from vlm_encoders.view_pixels import ViewPixels

assert torchvision.io.decode_jpeg

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDE = 24
TILERS: dict[str, Any] = {
    "llava-next": build_tiler("llava-next", SIDE),
    "internvl": build_tiler("internvl", SIDE),
    "s2": build_tiler("s2", SIDE),
    "tiles": build_tiler("tiles", SIDE, overlap=5),
    "llava-uhd": build_tiler("llava-uhd", SIDE, patch=4),
    "naflex": build_tiler("naflex", patch=8, max_patches=40),
    "idefics3": build_tiler("idefics3", SIDE),
}


def pixels_of(tiler: Any, *, exact: bool = False, side: int = SIDE) -> TilePixels:
    return TilePixels(
        EncoderSpec(
            name="literal", family="any", backend="transformers", source="", weights=None, image_size=side, stride=4,
            dim=8, num_layers=2, mean=MEAN, std=STD, exact_pixels=exact, packs=tiler.native, sizes="any",
        )
    )  # fmt: skip


def levels_of(view: Tensor) -> Tensor:
    """Turn pixels back into levels of 255."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    return ((view * std + mean) * 255).round()


def noise(size: tuple[int, int], seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def made(pixels: TilePixels, image: Any, plan: TilePlan) -> list[Tensor]:
    return list(pixels(pixels.load(image), plan))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(list(TILERS)), st.one_of(st.integers(1, 300), st.sampled_from([24, 48, 72])), st.integers(1, 300),
    st.integers(0, 1 << 20),
)  # fmt: skip
def test_levels_are_within_two_of_the_exact_ones_and_rarely_two(name: str, height: int, width: int, seed: int) -> None:
    tiler, image = TILERS[name], noise((height, width), seed)
    plan = tiler.plan((height, width))
    fast, exact = made(pixels_of(tiler), image, plan), made(pixels_of(tiler, exact=True), image, plan)
    assert [view.shape for view in fast] == [view.shape for view in exact] == [(3, *size) for size in plan.views]
    for one, two in zip(fast, exact, strict=True):
        apart = (levels_of(one) - levels_of(two)).abs()
        assert apart.max() <= (1 if plan.interpolation == "bilinear" else 2)
        assert (apart > 1).sum() <= 3 + apart.numel() // 1000
        # Where levels agree, pixels differ by rounding alone.
        assert torch.allclose(one[apart == 0], two[apart == 0], rtol=0, atol=5e-7)
        if plan.interpolation == "lanczos":
            assert apart.max() == 0


@pytest.mark.parametrize("name", TILERS)
@pytest.mark.parametrize("size", [(96, 150), (150, 31), (7, 5)])
def test_exact_views_are_the_cut_pictures_normalised(name: str, size: tuple[int, int]) -> None:
    tiler, image = TILERS[name], Image.fromarray(noise(size))
    plan = tiler.plan(size)
    views = made(pixels_of(tiler, exact=True), image, plan)
    for view, picture in zip(views, cut(image, plan), strict=True):
        spec = dataclasses.replace(pixels_of(tiler).spec, image_size=(picture.height, picture.width))
        assert torch.equal(view, Preprocessor(spec)(picture)[0])


def test_what_is_resized_twice_is_resized_by_pillow_alone() -> None:
    # Of one error the second resize would make two.
    size, through = (120, 160), ((100, 140), (60, 90))
    plan = TilePlan(size, (Page.squashed((2, 3), (SIDE, SIDE), through=through),))
    tiler, image = TILERS["internvl"], noise(size)
    expected = Image.fromarray(image)
    for height, width in (*through, plan.canvas):
        expected = expected.resize((width, height), Image.Resampling.BICUBIC)
    views = made(pixels_of(tiler), image, plan)
    canvas = torch.cat([torch.cat(views[row : row + 3], 2) for row in (0, 3)], 1)
    assert np.array_equal(levels_of(canvas).permute(1, 2, 0).numpy(), np.asarray(expected))


def test_fast_tiles_are_those_of_the_torchvision_processor() -> None:
    # It resizes by the same rule of torch, so also where levels are two from Pillow's.
    theirs: Any = GotOcr2ImageProcessor(size={"height": 96, "width": 96}, crop_to_patches=True)
    tiler: Any = build_tiler("internvl", 96)
    for size in [(300, 400), (200, 210), (100, 640)]:
        image = noise(size)
        views = theirs(Image.fromarray(image), do_normalize=False, do_rescale=False, return_tensors="pt")
        ours = pixels_of(tiler, side=96)(torch.from_numpy(image), tiler.plan(size))
        assert isinstance(ours, Tensor)
        assert torch.equal(levels_of(ours), views["pixel_values"].float())


@pytest.mark.parametrize("exact", [False, True])
def test_what_is_around_the_image_is_black_before_it_is_normalised(*, exact: bool) -> None:
    tiler = build_tiler("llava-next", SIDE)
    plan = tiler.plan((90, 100))
    assert plan.padded
    thumbnail, *tiles = made(pixels_of(tiler, exact=exact), np.full((90, 100, 3), 255, np.uint8), plan)
    canvas = levels_of(torch.cat([torch.cat(tiles[row : row + 2], 2) for row in (0, 2)], 1))
    top, left, height, width = plan.content
    assert canvas[:, top : top + height, left : left + width].min() == 255
    canvas[:, top : top + height, left : left + width] = 0
    assert canvas.max() == 0
    assert levels_of(thumbnail).min() == 255


@pytest.mark.parametrize("exact", [False, True])
def test_any_form_of_an_image_gives_the_same_pixels(*, exact: bool, tmp_path: Any) -> None:
    tiler = build_tiler("llava-next", SIDE)
    picture = Image.fromarray(noise((90, 130)))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    opened = Image.open(buffer).convert("RGB")
    array = np.array(opened)
    (tmp_path / "photo.jpg").write_bytes(buffer.getvalue())
    pixels, plan = pixels_of(tiler, exact=exact), tiler.plan((90, 130))
    expected = pixels(pixels.load(opened), plan)
    assert isinstance(expected, Tensor)
    for image in (buffer.getvalue(), tmp_path / "photo.jpg", array, torch.from_numpy(array.copy()).permute(2, 0, 1)):
        found = pixels(pixels.load(image), plan)
        assert isinstance(found, Tensor)
        assert torch.equal(found, expected)
    assert np.array_equal(np.asarray(opened), array)


def test_a_picture_is_not_copied_when_it_is_upright_rgb() -> None:
    picture = Image.fromarray(noise((9, 7)))
    assert load_levels(picture, by_torch=True) is picture
    assert load_levels(picture.convert("L"), by_torch=True) is not picture
    turned = picture.copy()
    turned.getexif()[274] = 6
    assert load_levels(turned, by_torch=False).size == (9, 7)
    see_through = picture.copy()
    see_through.info["transparency"] = (1, 2, 3)
    assert load_levels(see_through, by_torch=True) is not see_through


@pytest.mark.parametrize("name", TILERS)
@pytest.mark.parametrize("size", [1, 4, 100])
def test_a_stream_has_the_same_views_in_chunks(name: str, size: int) -> None:
    tiler, image = TILERS[name], torch.from_numpy(noise((130, 180)))
    pixels, plan = pixels_of(tiler), tiler.plan((130, 180))
    chunks = list(pixels.stream(image, plan, size))
    assert all(len(chunk) <= size and chunk.untyped_storage().nbytes() == 4 * chunk.numel() for chunk in chunks)
    views = [view for chunk in chunks for view in chunk]
    whole = pixels(image, plan)
    assert len(views) == len(whole) == plan.num_views
    assert all(torch.equal(one, two) for one, two in zip(views, whole, strict=True))
    if len(set(plan.views)) == 1:
        assert isinstance(whole, Tensor)
        assert len(chunks) == -(-plan.num_views // size)


def test_a_stream_makes_a_page_only_when_it_is_reached() -> None:
    tiler = TILERS["internvl"]
    plan = tiler.plan((130, 180))
    assert plan.thumbnail == "last"
    # A canvas of no levels at all would fail as soon as it were made.
    wrong = dataclasses.replace(plan, pages=(plan.pages[0], Page((1, 1), (SIDE, SIDE), Box(0, 0, 0, 0))))
    stream = pixels_of(tiler).stream(torch.from_numpy(noise((130, 180))), wrong, plan.pages[0].num_views)
    assert len(next(stream)) == plan.pages[0].num_views
    with pytest.raises((RuntimeError, ValueError)):
        next(stream)


@pytest.mark.parametrize("exact", [False, True])
def test_in_a_joint_each_part_makes_its_own_pixels_of_a_tile(*, exact: bool) -> None:
    joint = encoder_spec("fused:clip-vit-b-16[image_size=64]+siglip-b-16-224[image_size=64]").altered(
        exact_pixels=exact
    )
    image = Image.fromarray(noise((150, 100)))
    tiler = build_tiler("llava-next", 64)
    plan = tiler.plan((150, 100))
    found = TilePixels(joint)(TilePixels(joint).load(image), plan)
    assert isinstance(found, Tensor)
    assert torch.equal(found, ViewPixels(joint.altered(resize="squash", crop_pct=1.0))(cut(image, plan)))
    assert found.shape == (plan.num_views, joint.num_pixels)
    assert [len(chunk) for chunk in TilePixels(joint).stream(image, plan, 2)] == [2] * (plan.num_views // 2) + [1]


@pytest.mark.parametrize("word", ["encoder", "squash", "pad", "crop", "expand"])
@pytest.mark.parametrize("size", [(90, 40), (33, 70)])
def test_the_whole_image_by_a_word_is_that_of_preprocessing(word: Any, size: tuple[int, int]) -> None:
    spec = encoder_spec("siglip-b-16-224").resized(32)
    tiler = build_tiler("whole", 32, resize=word)
    for form in (Image.fromarray(noise(size)), noise(size)):
        pixels = TilePixels(spec)
        found = pixels(pixels.load(form), tiler.plan(size))
        assert isinstance(found, Tensor)
        assert torch.equal(found, Preprocessor(spec if word == "encoder" else spec.altered(resize=word))(form))


@pytest.mark.parametrize(
    ("size", "goal", "interpolation", "near"),
    [
        ((480, 640), (240, 240), "bicubic", True),
        ((480, 640), (470, 900), "bicubic", True),
        ((480, 640), (960, 321), "bilinear", True),
        ((480, 640), (100, 100), "lanczos", False),
        ((480, 640), (480, 640), "lanczos", True),
        ((480, 640), (100, 100), "nearest", False),
        ((480, 1), (20_000, 20_000), "bicubic", False),
    ],
)
def test_sizes_and_filter_alone_choose_the_path(size: Any, goal: Any, interpolation: Any, near: Any) -> None:
    assert is_near(Placement(size, size, goal, (0, 0), goal), interpolation) is near


def test_another_image_a_chunk_of_none_and_a_canvas_too_large_are_refused() -> None:
    tiler = TILERS["internvl"]
    pixels, plan = pixels_of(tiler), tiler.plan((40, 60))
    with pytest.raises(VlmError, match="40x60 px, got 60x40 px"):
        pixels(torch.from_numpy(noise((60, 40))), plan)
    with pytest.raises(VlmError, match="size=0"):
        next(pixels.stream(torch.from_numpy(noise((40, 60))), plan, 0))
    large = TilePlan((40, 60), (Page.squashed((600, 600), (SIDE, SIDE)),))
    with pytest.raises(VlmError, match="14400x14400 px, over the limit"):
        pixels(torch.from_numpy(noise((40, 60))), large)
    # A thin image of 20,000 px on the way to a wide canvas: the picture between the passes is the large one.
    thin = TilePlan((20_000, 1), (Page.squashed((1, 1), (SIDE, 9000)),))
    with pytest.raises(VlmError, match="20000x9000 px, over the limit"):
        cut(Image.new("RGB", (1, 20_000)), thin)
