"""Native resolution with its encoders: what they tell the tilers, what they refuse, and the pixels of a view."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from connectors.errors import VlmError
from vlm_encoders.budget import token_budget
from vlm_encoders.registry import encoder_spec
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling import PRESETS, AnySizeTiler, NativeTiler, build_tiler
from vlm_encoders.tiling.pixels import TilePixels

SIZES = [(480, 640), (33, 70), (5, 9), (120, 1900), (700, 31)]
QWEN3 = {"shortest_edge": 65536, "longest_edge": 16777216}


def from_qwen(processor: Any, image: Image.Image) -> Tensor:
    """Put the patches of Qwen's processor, which come block by block of the merger, back to a picture."""
    made = processor(image, return_tensors="pt")
    _, rows, columns = made["image_grid_thw"][0].tolist()
    side = processor.patch_size
    patches = made["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, side, side)[..., 0, :, :]
    picture: Tensor = patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * side, columns * side)
    return picture


def from_naflex(processor: Any, image: Image.Image) -> Tensor:
    made = processor(image, return_tensors="pt")
    rows, columns = made["spatial_shapes"][0].tolist()
    patches = made["pixel_values"][0][: rows * columns].reshape(rows, columns, 16, 16, 3)
    picture: Tensor = patches.permute(4, 0, 2, 1, 3).reshape(3, rows * 16, columns * 16)
    return picture


def from_pixtral(processor: Any, image: Image.Image) -> Tensor:
    picture: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
    return picture


@pytest.mark.parametrize(
    ("name", "processor", "read"),
    [
        ("qwen2-vl", Qwen2VLImageProcessorPil(), from_qwen),
        (
            "qwen3-vl",
            Qwen2VLImageProcessorPil(size=QWEN3, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3),
            from_qwen,
        ),
        ("naflex", Siglip2ImageProcessorPil(), from_naflex),
        ("pixtral", PixtralImageProcessorPil(), from_pixtral),
    ],
)
def test_pixels_are_those_of_the_released_processor(name: str, processor: Any, read: Any) -> None:
    preset = PRESETS[name]
    spec = encoder_spec(preset.encoder).altered(exact_pixels=True)
    tiler, pixels = build_tiler(name, spec), TilePixels(spec)
    for seed, (height, width) in enumerate(SIZES):
        noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
        image = Image.fromarray(noise.to(torch.uint8).numpy())
        levels = pixels.load(image)
        (view,) = pixels(levels, tiler.plan(pixels.size(levels)))
        torch.testing.assert_close(view, read(processor, image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if issubclass(preset.tiler, NativeTiler)])
def test_each_preset_fits_its_encoder_and_connector(name: str) -> None:
    preset = PRESETS[name]
    spec = encoder_spec(preset.encoder)
    tiler = build_tiler(name, spec)
    tiler.check(spec)
    assert isinstance(tiler, NativeTiler)
    assert tiler == build_tiler(name, spec.image_size[0])
    budget = token_budget(preset.encoder, preset.connector, tiler=name, image_size=(480, 640))
    (height, width) = tiler.plan((480, 640)).main.view
    assert budget.total == height * width // tiler.multiple**2
    assert budget.encoder_tokens == height * width // tiler.patch**2


@pytest.mark.parametrize(
    ("encoder", "patch"),
    [("dinov2-vit-b-14", 14), ("dinov3-vit-b-16", 16), ("sam2.1-hiera-tiny", 32), ("aimv2-l-14-native", 14)],
)
def test_the_encoder_tells_the_patch(encoder: str, patch: int) -> None:
    spec = encoder_spec(encoder)
    tiler = build_tiler("native", spec)
    assert isinstance(tiler, AnySizeTiler)
    assert tiler.patch == patch
    for size in [(1, 1), (99, 5000), (1234, 567)]:
        view = tiler.plan(size).main.view
        rows, columns = spec.token_spec(view).grid or (0, 0)
        assert (rows * spec.stride, columns * spec.stride) == view
    assert build_tiler("native:patch=64", spec).config()["patch"] == 64


def test_views_of_other_multiples_are_refused() -> None:
    spec = encoder_spec("dinov2-vit-b-14")
    with pytest.raises(VlmError, match=r"multiples of 16 px, dinov2-vit-b-14 takes multiples of 14; use patch=14"):
        AnySizeTiler().check(spec)
    AnySizeTiler(patch=14, merge=2).check(spec)
    AnySizeTiler(patch=28).check(spec)


def test_an_encoder_of_one_size_is_refused() -> None:
    spec: EncoderSpec = encoder_spec("clip-vit-l-14-336")
    with pytest.raises(VlmError, match="gives views of many sizes"):
        build_tiler("native", spec).check(replace(spec, packs=False))


def test_merged_tokens_fit_a_pixel_shuffle() -> None:
    tiler = build_tiler("native:merge=2", encoder_spec("dinov3-vit-b-16"))
    for size in [(1, 1), (99, 5000), (1234, 567)]:
        budget = token_budget("dinov3-vit-b-16", "pixel_shuffle:factor=2+mlp", tiler=tiler, image_size=size)
        assert budget.total * 4 == budget.encoder_tokens
