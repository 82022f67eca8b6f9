"""Specs: token arithmetic, sizes, layers, and the numbers of the table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders import towers
from vlm_encoders.encoders.towers.entries import LOOSE, telling_entries
from vlm_encoders.encoders.transformers_load import tower_config
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
    coarsest = max((stage.stride for stage in spec.stages[: spec.kept_layers]), default=spec.stride)
    try:
        resized = spec.resized((height, width))
    except VlmError as error:
        if "leave image_size out" in str(error):
            assert spec.sizes == "native" or (spec.sizes == "square" and height != width)
            return
        said = str(error).split("use ")[1].split(" or ")
        for choice in said:
            sides = [int(side) for side in choice.split("x")]
            size = (sides[0], sides[-1])
            if spec.sizes == "any" or (spec.sizes == "square" and size[0] == size[1]):
                assert spec.resized(size).image_size == size
            assert all(abs(new - old) < coarsest for new, old in zip(size, (height, width), strict=True))
    else:
        rows, columns = resized.token_spec().grid or (0, 0)
        # Pixels that do not fill a token are left out by most, and padded by some.
        missing = spec.stride if spec.rounding == "ceil" else 0
        assert 0 <= height - rows * spec.stride + missing < 2 * spec.stride
        assert 0 <= width - columns * spec.stride + missing < 2 * spec.stride
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
        ours = _all_layers(name)
        theirs = None if spec.backend == "transformers" and spec.weights not in CONFIGS else _whole(spec)
    assert sum(parameter.numel() for parameter in ours.parameters()) == spec.parameters
    if theirs is not None:
        assert sum(parameter.numel() for parameter in theirs.parameters()) == spec.parameters


def _all_layers(name: str) -> Encoder:
    """Build all layers, and the last norm or neck where there is one."""
    try:
        return create_encoder(name, pretrained=False, feature_layer=-1, final_norm=True)
    except VlmError:
        return create_encoder(name, pretrained=False, feature_layer=-1, final_norm=False)


def _whole(spec: EncoderSpec) -> nn.Module:
    """Build the library's own model by its name, and take what is no tower off."""
    network: Any
    if spec.backend == "timm":
        import timm

        network = timm.create_model(spec.source, num_classes=0, **dict(spec.options))
        for head in ("head", "fc_norm", "attn_pool"):
            if hasattr(network, head):
                setattr(network, head, nn.Identity())
    elif spec.backend == "open_clip":
        import open_clip

        network = open_clip.create_model(spec.source, device="meta").visual
        network.proj = None
    else:
        tower: Any = towers.tower(spec.source)
        network = tower.network_class()(released_config(spec))
        for head in ("head", "pooler"):
            if hasattr(network, head):
                setattr(network, head, None)
        if hasattr(getattr(network, "embeddings", None), "mask_token"):
            network.embeddings.mask_token = None
    module: nn.Module = network
    return module


def released_config(spec: EncoderSpec) -> Any:
    """Make the config that was released with the weights."""
    tower: Any = towers.tower(spec.source)
    entries = {key: value for key, value in CONFIGS[spec.weights or ""].items() if key != "class"}
    return tower.config_class()(**entries)


# The main entries of the released config.json files.
CONFIGS = json.loads((Path(__file__).parent / "data" / "vision_configs.json").read_text(encoding="utf-8"))
RELEASED = [name for name in list_encoders() if encoder_spec(name).weights in CONFIGS]


@pytest.mark.parametrize("name", RELEASED)
def test_a_row_says_what_the_released_config_says(name: str) -> None:
    spec = encoder_spec(name)
    tower: Any = towers.tower(spec.source)
    assert CONFIGS[spec.weights]["class"] == spec.source
    released, own = released_config(spec), tower_config(tower, spec.at_layer(-1, final_norm=False))
    loose = {*LOOSE, *tower.fixed}
    ours, theirs = (
        {key: value for key, value in telling_entries(config).items() if key not in loose} for config in (own, released)
    )
    assert ours == theirs
    fields = tower.spec_of(released, name)
    for told in ("stride", "dim", "heads", "num_layers", "prefix_kinds", "sizes", "positions", "mlp_dim", "stages"):
        if told in fields:
            assert getattr(spec, told) == fields[told]
    assert spec.gated_mlp == fields.get("gated_mlp", False)
    assert spec.native_size == fields["trained_size"]
    assert (spec.feature_layer, spec.final_norm) == (fields["feature_layer"], fields["final_norm"])


def test_a_replaced_spec_is_checked_too() -> None:
    with pytest.raises(VlmError, match="feature layer -99"):
        dataclasses.replace(encoder_spec("clip-vit-b-32"), feature_layer=-99)
