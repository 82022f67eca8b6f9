"""Specs: token arithmetic, sizes, layers, and the numbers of the table."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from connectors.errors import VlmError
from vlm_encoders.registry import create_encoder, encoder_spec, list_encoders
from vlm_encoders.spec import EncoderSpec

TOKENS = {  # name: tokens and prefix as the papers and model cards state them
    "clip-vit-b-32": (49, 1),
    "clip-vit-l-14-336": (576, 1),
    "siglip-so400m-14-384": (729, 0),
    "dinov2-vit-l-14": (256, 1),
    "dinov2-vit-l-14-reg": (256, 5),
    "swin-b-224": (49, 0),
    "sam-vit-b": (4096, 0),
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_of_a_view(name: str) -> None:
    spec = encoder_spec(name).token_spec()
    assert (spec.num_tokens, spec.num_prefix) == TOKENS[name]


def test_so400m_keeps_its_native_size_alone() -> None:
    spec = encoder_spec("siglip-so400m-14-384")
    assert spec.token_spec().grid == spec.resized(384).token_spec().grid == (27, 27)
    assert spec.resized(378).token_spec().grid == (27, 27)
    with pytest.raises(VlmError, match="image size 385 is not a multiple of 14; use 378 or 392"):
        spec.resized(385)
    # The weights' own size stays allowed after another one was chosen.
    assert spec.resized(378).resized(384).image_size == (384, 384)


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from(list_encoders()))
def test_a_size_is_taken_or_answered_with_one_that_is(height: int, width: int, name: str) -> None:
    spec = encoder_spec(name)
    try:
        resized = spec.resized((height, width))
    except VlmError as error:
        said = str(error).split("use ")[1].split(" or ")
        for choice in said:
            sides = [int(side) for side in choice.split("x")]
            size = (sides[0], sides[-1])
            assert spec.resized(size).image_size == size
            assert all(abs(new - old) < spec.stride for new, old in zip(size, (height, width), strict=True))
    else:
        rows, columns = resized.token_spec().grid or (0, 0)
        assert 0 <= height - rows * spec.stride < spec.stride
        assert 0 <= width - columns * spec.stride < spec.stride
        assert spec.token_spec((height, width)) == resized.token_spec()


@pytest.mark.parametrize("size", [0, -14, (14,), (14, 14, 14), (14.0, 14), "14"])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(VlmError, match=r"one side or \(height, width\)"):
        encoder_spec("dinov2-vit-s-14").resized(size)


def test_the_final_norm_belongs_to_the_spec_s_own_layer() -> None:
    siglip = encoder_spec("siglip-b-16-224")
    assert siglip.at_layer().final_norm
    assert siglip.at_layer(-1).final_norm
    assert not siglip.at_layer(-2).final_norm
    assert siglip.at_layer(-2, final_norm=True).final_norm
    assert siglip.at_layer(-2).kept_layers == 11
    assert not encoder_spec("clip-vit-b-32").at_layer(-1).final_norm


def test_specs_are_hashable_data() -> None:
    specs = [encoder_spec(name) for name in list_encoders()]
    assert len(set(specs)) == len(specs)
    for spec in specs:
        assert spec.licence
        assert spec.reference.startswith("https://")


@pytest.mark.parametrize("name", list_encoders())
def test_parameters_are_the_library_s_own(name: str) -> None:
    spec = encoder_spec(name)
    with torch.device("meta"):
        ours = create_encoder(name, pretrained=False, feature_layer=-1, final_norm=True)
        theirs = _whole(spec)
    assert sum(parameter.numel() for parameter in ours.parameters()) == spec.parameters
    assert sum(parameter.numel() for parameter in theirs.parameters()) == spec.parameters


def _whole(spec: EncoderSpec) -> nn.Module:
    """Build the library's own model by its name, and take what is no tower off."""
    network: Any
    if spec.backend == "timm":
        import timm

        network = timm.create_model(spec.source, num_classes=0, **dict(spec.options))
    elif spec.backend == "open_clip":
        import open_clip

        network = open_clip.create_model(spec.source, device="meta").visual
        network.proj = None
    else:
        import transformers

        network = getattr(transformers, spec.source)(CONFIGS[spec.weights or ""]())
        if hasattr(network, "head"):
            network.head = None
        if spec.source.startswith("Dinov2"):
            network.embeddings.mask_token = None
    module: nn.Module = network
    return module


def _config(kind: str, **shape: Any) -> Any:
    def make() -> Any:
        import transformers

        return getattr(transformers, kind)(**shape)

    return make


def _vit(width: int, depth: int, heads: int, mlp: int, patch: int, side: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "patch_size": patch,
        "image_size": side,
    }


def _dino(kind: str, width: int, depth: int, heads: int) -> Any:
    return _config(
        kind, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, patch_size=14, image_size=518
    )


_SO400M = _config("SiglipVisionConfig", **_vit(1152, 27, 16, 4304, 14, 384))
CONFIGS = {  # the released config.json files, by their main entries
    "openai/clip-vit-base-patch32": _config("CLIPVisionConfig", **_vit(768, 12, 12, 3072, 32, 224)),
    "openai/clip-vit-base-patch16": _config("CLIPVisionConfig", **_vit(768, 12, 12, 3072, 16, 224)),
    "openai/clip-vit-large-patch14": _config("CLIPVisionConfig", **_vit(1024, 24, 16, 4096, 14, 224)),
    "openai/clip-vit-large-patch14-336": _config("CLIPVisionConfig", **_vit(1024, 24, 16, 4096, 14, 336)),
    "google/siglip-base-patch16-224": _config("SiglipVisionConfig", **_vit(768, 12, 12, 3072, 16, 224)),
    "google/siglip2-base-patch16-224": _config("SiglipVisionConfig", **_vit(768, 12, 12, 3072, 16, 224)),
    "google/siglip-base-patch16-384": _config("SiglipVisionConfig", **_vit(768, 12, 12, 3072, 16, 384)),
    "google/siglip-so400m-patch14-384": _SO400M,
    "google/siglip2-so400m-patch14-384": _SO400M,
    "facebook/dinov2-small": _dino("Dinov2Config", 384, 12, 6),
    "facebook/dinov2-base": _dino("Dinov2Config", 768, 12, 12),
    "facebook/dinov2-large": _dino("Dinov2Config", 1024, 24, 16),
    "facebook/dinov2-with-registers-small": _dino("Dinov2WithRegistersConfig", 384, 12, 6),
    "facebook/dinov2-with-registers-base": _dino("Dinov2WithRegistersConfig", 768, 12, 12),
    "facebook/dinov2-with-registers-large": _dino("Dinov2WithRegistersConfig", 1024, 24, 16),
    "facebook/sam-vit-base": _config("SamVisionConfig"),
    "facebook/sam-vit-large": _config(
        "SamVisionConfig", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
        global_attn_indexes=[5, 11, 17, 23],
    ),
}  # fmt: skip


def test_a_replaced_spec_is_checked_too() -> None:
    with pytest.raises(VlmError, match="feature layer -99"):
        dataclasses.replace(encoder_spec("clip-vit-b-32"), feature_layer=-99)
