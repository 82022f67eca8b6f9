"""The whole image as one view: squashed, padded and cropped as transformers' processors do it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from connectors.errors import VlmError
from vlm_encoders.preprocess import Preprocessor
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.spec_values import Resize
from vlm_encoders.tiling import Tiler, WholeImage, build_tiler
from vlm_encoders.tiling.pixels import TilePixels

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(300, 200), (200, 300), (64, 64), (97, 1003), (1003, 98), (65, 67), (31, 33), (1, 9)]
SQUARE = {"height": 64, "width": 64}
LIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "squash": ("SiglipImageProcessorPil", {"size": SQUARE, "resample": 3}),
    "expand": ("LlavaImageProcessorPil", {"size": {"shortest_edge": 64}, "crop_size": SQUARE, "do_pad": True}),
    "crop": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 64}, "crop_size": SQUARE}),
    "pad": ("SamImageProcessorPil", {"size": {"longest_edge": 64}, "pad_size": SQUARE, "resample": 3}),
}


def encoder(resize: Resize, **fields: Any) -> EncoderSpec:
    """Make the spec of an encoder that resizes in a way of its own."""
    given: dict[str, Any] = {
        "name": "literal",
        "family": "any",
        "backend": "transformers",
        "source": "",
        "weights": None,
        "image_size": 64,
        "stride": 16,
        "dim": 8,
        "num_layers": 2,
        "mean": MEAN,
        "std": STD,
        "resize": resize,
        "exact_pixels": True,
        **fields,
    }
    return EncoderSpec(**given)


def photo(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(size[0]).integers(0, 256, (*size, 3), dtype=np.uint8))


def view(tiler: Tiler, spec: EncoderSpec, image: Image.Image) -> torch.Tensor:
    pixels = TilePixels(spec)
    levels = pixels.load(image)
    (made,) = pixels(levels, tiler.plan(pixels.size(levels)))
    return made


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("word", LIKE)
def test_pixels_are_those_of_transformers_whatever_the_encoder_s_own_way(word: Resize, size: tuple[int, int]) -> None:
    name, options = LIKE[word]
    processor = getattr(transformers, name)(**options, image_mean=list(MEAN), image_std=list(STD))
    image = photo(size)
    (theirs,) = processor(image, return_tensors="pt")["pixel_values"]
    for own in ("crop", "squash", "expand"):
        ours = view(WholeImage(64, word), encoder(own, crop_pct=0.9), image)
        assert torch.equal(ours, theirs), own


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("word", LIKE)
def test_pixels_are_those_of_an_encoder_that_resizes_so_itself(word: Resize, size: tuple[int, int]) -> None:
    image = photo(size)
    for crop_pct in (1.0, 0.875):
        own = encoder(word, crop_pct=crop_pct)
        assert torch.equal(view(WholeImage(64), own, image), Preprocessor(own)(image)[0])
    assert torch.equal(view(WholeImage(64, word), encoder("crop"), image), Preprocessor(encoder(word))(image)[0])


@pytest.mark.parametrize(
    ("name", "word"), [("whole", "encoder"), ("squash", "squash"), ("pad", "expand"), ("crop", "crop")]
)
def test_names_stand_for_ways(name: str, word: str) -> None:
    tiler = build_tiler(name, 64)
    assert tiler == build_tiler(f"whole:resize={word}", 64)
    plan = tiler.plan((480, 640))
    assert (plan.resize, plan.num_views, plan.grid, plan.views) == (word, 1, None, ((64, 64),))


def test_another_way_is_refused() -> None:
    with pytest.raises(VlmError, match="resize='stretch'; use crop, squash, pad, expand, encoder"):
        WholeImage(64, "stretch")  # type: ignore[arg-type]
    with pytest.raises(VlmError, match="tiler 'whole' has resize='stretch'; give crop or squash"):
        build_tiler("whole:resize=stretch")
