"""The exact path equals the libraries' own processors, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from vlm_encoders.preprocess import Preprocessor
from vlm_encoders.registry import encoder_spec
from vlm_encoders.spec import EncoderSpec

CLIP: dict[str, Any] = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SIZES = [(300, 200), (200, 300), (224, 224), (97, 1003), (1003, 98), (225, 227), (31, 33), (640, 480), (251, 224)]
"""(width, height), as Pillow has them: odd, tiny, long and exact ones."""


def picture(size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def literal(size: int | tuple[int, int] = 224, **fields: Any) -> EncoderSpec:
    """Make a spec of these values and of nothing else."""
    given: dict[str, Any] = {
        "name": "literal",
        "family": "any",
        "backend": "transformers",
        "source": "",
        "weights": None,
        "image_size": size,
        "stride": 14,
        "dim": 8,
        "num_layers": 2,
        "exact_pixels": True,
        **fields,
    }
    return EncoderSpec(**given)


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def said(fields: dict[str, Any]) -> dict[str, Any]:
    """Give mean and deviation as transformers names them."""
    return {"image_mean": list(fields["mean"]), "image_std": list(fields["std"])}


FAMILIES: dict[str, tuple[EncoderSpec, str, dict[str, Any]]] = {
    "clip": (literal(**CLIP, resize="crop"), "CLIPImageProcessorPil", {}),
    "clip at 336": (
        literal(336, **CLIP, resize="crop"),
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": 336}, "crop_size": square(336)},
    ),
    "aimv2": (
        literal(448, **CLIP, resize="crop"),
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": 448}, "crop_size": square(448)},
    ),
    "siglip": (literal(**HALF), "SiglipImageProcessorPil", {"resample": 3}),
    "siglip2": (
        literal(384, **HALF, interpolation="bilinear"),
        "SiglipImageProcessorPil",
        {"resample": 2, "size": square(384)},
    ),
    "vit": (literal(**HALF, interpolation="bilinear"), "ViTImageProcessorPil", {}),
    "swin": (literal(**IMAGENET), "ViTImageProcessorPil", {"resample": 3, **said(IMAGENET)}),
    "deit": (literal(**HALF, crop_pct=224 / 256), "DeiTImageProcessorPil", {}),
    "beit": (literal(**HALF), "BeitImageProcessorPil", {}),
    "dinov2": (
        literal(**IMAGENET, resize="crop", crop_pct=224 / 256),
        "BitImageProcessorPil",
        {"size": {"shortest_edge": 256}, **said(IMAGENET)},
    ),
    "sam": (
        literal(256, **IMAGENET, resize="pad", interpolation="bilinear"),
        "SamImageProcessorPil",
        {"size": {"longest_edge": 256}, "pad_size": square(256)},
    ),
    "convnext and hiera": (
        literal(**IMAGENET, resize="crop", crop_pct=0.875),
        "ConvNextImageProcessorPil",
        {"size": {"shortest_edge": 224}, "crop_pct": 0.875, **said(IMAGENET)},
    ),
    "convnext at 384": (literal(384, **IMAGENET), "ConvNextImageProcessorPil", said(IMAGENET)),
    "internvl": (literal(448, **IMAGENET), "GotOcr2ImageProcessorPil", {"size": square(448), **said(IMAGENET)}),
    "llava": (literal(**CLIP, resize="expand"), "LlavaImageProcessorPil", {"do_pad": True}),
    "lanczos": (literal(**HALF, interpolation="lanczos"), "ViTImageProcessorPil", {"resample": 1}),
    "nearest": (literal(**HALF, interpolation="nearest"), "ViTImageProcessorPil", {"resample": 0}),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_those_of_transformers(family: str, size: tuple[int, int]) -> None:
    spec, kind, options = FAMILIES[family]
    processor = getattr(transformers, kind)(**options)
    image = picture(size)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(Preprocessor(spec)(image), expected)


@pytest.mark.parametrize("size", [(300, 200), (97, 300), (224, 224)])
def test_native_sizes_are_those_of_pixtral(size: tuple[int, int]) -> None:
    image = picture(size)
    expected = transformers.PixtralImageProcessorPil(size={"longest_edge": 160})(image, return_tensors="pt")
    pixels = expected["pixel_values"]
    height, width = pixels.shape[2:]
    assert torch.equal(Preprocessor(literal((height, width), **CLIP))(image), pixels)


@pytest.mark.parametrize("size", [(300, 200), (97, 300), (224, 224)])
def test_native_sizes_are_those_of_qwen2_vl(size: tuple[int, int]) -> None:
    image = picture(size)
    made = transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 50176})(
        image, return_tensors="pt"
    )
    _, rows, columns = made["image_grid_thw"][0].tolist()
    # (row, column of a block of 2x2, row, column in it, colour, frame, y, x)
    patches = made["pixel_values"].view(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    expected = patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, rows * 14, columns * 14)
    assert torch.equal(Preprocessor(literal((rows * 14, columns * 14), **CLIP))(image), expected)


@pytest.mark.parametrize("size", [(300, 200), (97, 300), (224, 224)])
def test_native_sizes_are_those_of_siglip2(size: tuple[int, int]) -> None:
    image = picture(size)
    made = transformers.Siglip2ImageProcessorPil(max_num_patches=100)(image, return_tensors="pt")
    rows, columns = made["spatial_shapes"][0].tolist()
    patches = made["pixel_values"][0, : rows * columns].view(rows, columns, 16, 16, 3)
    expected = patches.permute(4, 0, 2, 1, 3).reshape(1, 3, rows * 16, columns * 16)
    spec = literal((rows * 16, columns * 16), **HALF, interpolation="bilinear")
    assert torch.equal(Preprocessor(spec)(image), expected)


def levels_apart(one: Tensor, two: Tensor, spec: EncoderSpec) -> float:
    return float(((one - two) * torch.tensor(spec.std).view(3, 1, 1) * 255).abs().max())


@pytest.mark.parametrize("size", [(300, 200), (640, 480), (225, 227), (224, 224)])
@pytest.mark.parametrize("kind", ["DINOv3ViTImageProcessor", "Sam2ImageProcessor"])
def test_pixels_are_those_of_a_torchvision_processor_to_a_level(kind: str, size: tuple[int, int]) -> None:
    # These have no PIL twin. DINOv3's resizes floats, which are never rounded to levels in between.
    spec = literal(64, **IMAGENET, interpolation="bilinear")
    image = picture(size)
    expected = getattr(transformers, kind)(size=square(64))(image, return_tensors="pt")["pixel_values"]
    assert levels_apart(Preprocessor(spec)(image), expected, spec) < 1.01


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["swin-t-224", "swin-b-384"])
def test_pixels_are_those_of_timm(name: str, size: tuple[int, int]) -> None:
    import timm

    spec = encoder_spec(name)
    with torch.device("meta"):
        config = timm.data.resolve_model_data_config(timm.create_model(spec.source))
    image = picture(size)
    expected = timm.data.create_transform(**config, is_training=False)(image)
    exact = literal(
        spec.image_size, mean=spec.mean, std=spec.std, backend="timm", resize=spec.resize, crop_pct=spec.crop_pct
    )
    assert torch.equal(Preprocessor(exact)(image)[0], expected)


@pytest.mark.parametrize("size", SIZES)
def test_squashed_and_cropped_pixels_are_those_of_timm(size: tuple[int, int]) -> None:
    import timm

    options = {"input_size": (3, 64, 64), "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "squash"}
    image = picture(size)
    expected = timm.data.create_transform(**options, **IMAGENET, is_training=False)(image)
    assert torch.equal(Preprocessor(literal(64, **IMAGENET, backend="timm", crop_pct=0.9))(image)[0], expected)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_open_clip(size: tuple[int, int]) -> None:
    from open_clip.transform import image_transform

    transform = image_transform(224, is_train=False, **CLIP)
    image = picture(size)
    exact = literal(**CLIP, backend="open_clip", resize="crop")
    assert torch.equal(Preprocessor(exact)(image)[0], transform(image))
