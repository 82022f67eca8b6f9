"""Pixels of `hf:` folders: as the folder's own image processor makes them, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from connectors.errors import VlmError
from vlm_encoders.preprocess import Preprocessor
from vlm_encoders.registry import encoder_spec

VIT: dict[str, Any] = {
    "model_type": "vit", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 2, "patch_size": 8, "image_size": 32,
}  # fmt: skip


def folder_of(path: Path, said: Any, config: dict[str, Any] = VIT) -> str:
    """Write a config and what its processor says, and give the encoder's name."""
    (path / "config.json").write_text(json.dumps(config))
    (path / "preprocessor_config.json").write_text(json.dumps(said))
    return f"hf:{path}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("DeiTImageProcessorPil", {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}}),
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
        ("LlavaImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
        (
            "LlavaImageProcessorPil",
            {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_pad": True},
        ),
    ],
)
def test_pixels_equal_the_processor_s(source: str, said: dict[str, Any], tmp_path: Path) -> None:
    processor = getattr(transformers, source)(**said)
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(VIT))
    spec = encoder_spec(f"hf:{tmp_path}").altered(exact_pixels=True)
    for size in ((60, 41), (41, 60)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(Preprocessor(spec)(image).squeeze(0), expected)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"rescale_factor": 1 / 127.5}, r"rescale_factor 0\.0078\d* of its preprocessor cannot be made; only 1/255"),
        ({"rescale_factor": "x"}, "rescale_factor x of its preprocessor cannot be made"),
        ({"do_resize": False}, "its preprocessor does not resize"),
        (
            {"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": 40},
            "crop_size 40x40 px of its preprocessor is larger than its size 32x32 px",
        ),
        (
            {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 40}},
            "cuts 32x40 px out of 40x40 px, another part of each side",
        ),
        ({"size": {"shortest_edge": 32}, "crop_pct": 1.25}, r"crop_pct 1\.25 of its preprocessor is no part"),
        ({"image_mean": [0.5]}, r"image_mean \[0\.5\] of its preprocessor is neither one number nor three"),
        ({"image_std": "half"}, "image_std half of its preprocessor is neither one number nor three"),
        ({"size": {"height": 50, "width": 50}}, r"50 is not a multiple of 8; use 48 or 56 in its preprocessor's"),
        ({"size": "32"}, "size 32 of its preprocessor is no size in px"),
        ({"size": {"height": "32", "width": 32}}, "of its preprocessor is no size in px"),
        ({"resample": [3]}, r"resample \[3\] of its preprocessor is none of 0"),
        (
            {
                "image_processor_type": "LlavaImageProcessor", "do_pad": True, "size": {"shortest_edge": 40},
                "crop_size": 32,
            },
            "fills images up to a square and then cuts the middle out",
        ),
    ],
)  # fmt: skip
def test_pixels_that_cannot_be_made_are_refused(said: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(VlmError, match=f"^hf:.*{sentence}"):
        encoder_spec(folder_of(tmp_path, said))


def test_one_mean_is_of_all_channels(tmp_path: Path) -> None:
    spec = encoder_spec(folder_of(tmp_path, {"image_mean": 0.25, "image_std": 0.125, "size": None}))
    assert (spec.mean, spec.std) == ((0.25, 0.25, 0.25), (0.125, 0.125, 0.125))


def test_padding_of_sam_stays_its_own(tmp_path: Path) -> None:
    config = {"model_type": "sam_vision_model", "image_size": 64, "hidden_size": 32, "num_attention_heads": 2}
    said = {"image_processor_type": "SamImageProcessor", "do_pad": True, "size": {"longest_edge": 64}}
    assert encoder_spec(folder_of(tmp_path, said, config)).resize == "pad"


@pytest.mark.parametrize(("ratio", "resize"), [("pad", "expand"), ("anyres", "crop"), (None, "crop")])
def test_llava_s_own_checkpoints_say_how_images_are_fitted(ratio: str | None, resize: str, tmp_path: Path) -> None:
    config = {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_aspect_ratio": ratio}))
    spec = encoder_spec(f"hf:{tmp_path}")
    assert (spec.resize, spec.image_size) == (resize, (336, 336))
