"""Every tower of OpenCLIP by name: what its spec says, and what cannot be built."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from connectors.errors import UnknownNameError, VlmError
from vlm_encoders.encoders import openclip
from vlm_encoders.encoders.open_clip_backend import open_clip_names
from vlm_encoders.registry import create_encoder, encoder_spec
from vlm_encoders.spec import Stage
from vlm_encoders.testing import check_encoder


def test_all_architectures_have_names_with_and_without_a_tag() -> None:
    import open_clip

    names = open_clip_names()
    assert set(open_clip.list_models()) <= set(names)
    assert {f"{arch}/{tag}" for arch, tag in open_clip.list_pretrained()} <= set(names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RN50/openai", {}),
        ("ViT-B-32", {}),
        ("ViT-B-32/openai", {"final_norm": True, "image_size": (64, 96)}),
        ("coca_ViT-B-32/laion2b_s13b_b90k", {}),
        ("ViT-L-14-CLIPA/datacomp1b", {"final_norm": True}),
    ],
)
def test_towers_of_each_kind_keep_the_contract(name: str, options: dict[str, Any]) -> None:
    check_encoder(f"open_clip:{name}", **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RN50", {"feature_layer": (-2, -1)}),
        ("RN50x4", {"feature_layer": -3, "image_size": (160, 224)}),
        ("ViT-B-32/openai", {"feature_layer": (-1, -4), "final_norm": True}),
    ],
)
def test_at_other_layers_nothing_idle_is_kept(name: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        encoder = create_encoder(f"open_clip:{name}", pretrained=False, **options)
        visual = encoder(torch.zeros(1, 3, *encoder.spec.image_size))
    parts = [visual.tokens] if visual.prefix is None else [visual.tokens, visual.prefix]
    torch.cat(parts, dim=1).sum().backward()
    assert not [key for key, parameter in encoder.named_parameters() if parameter.grad is None]


def test_a_resnet_is_read_by_stages_and_its_stem_is_the_first() -> None:
    spec = encoder_spec("open_clip:RN50")
    widths_and_strides = ((64, 4), (256, 4), (512, 8), (1024, 16), (2048, 32))
    assert spec.stages == tuple(Stage(dim, stride) for dim, stride in widths_and_strides)
    assert spec.at_layer(-2).token_spec(256).grid == (16, 16)
    with torch.device("meta"):
        encoder = create_encoder("open_clip:RN50", pretrained=False, feature_layer=-3)
    assert not [key for key in encoder.state_dict() if "layer3" in key or "layer4" in key or "attnpool" in key]


def test_pixels_are_made_as_the_weights_want_them() -> None:
    clipa = encoder_spec("open_clip:ViT-L-14-CLIPA-336/datacomp1b")
    assert (clipa.resize, clipa.interpolation, clipa.mean) == ("squash", "bilinear", (0.485, 0.456, 0.406))
    siglip = encoder_spec("open_clip:ViT-B-16-SigLIP/webli")
    assert (siglip.resize, siglip.mean, siglip.crop_pct) == ("squash", (0.5, 0.5, 0.5), 1.0)
    untagged = encoder_spec("open_clip:ViT-L-14-CLIPA-336")
    assert (untagged.resize, untagged.interpolation, untagged.weights) == ("crop", "bicubic", None)


def test_quick_gelu_comes_with_the_weights() -> None:
    with torch.device("meta"):
        for name, kind in {
            "ViT-B-32/openai": "QuickGELU",
            "ViT-B-32": "GELU",
            "ViT-B-32-quickgelu": "QuickGELU",
        }.items():
            encoder = create_encoder(f"open_clip:{name}", pretrained=False)
            assert kind in {type(module).__name__ for module in encoder.modules()}


ROWS = {
    "openclip-vit-b-16-laion2b": "ViT-B-16/laion2b_s34b_b88k",
    "openclip-vit-l-14-laion2b": "ViT-L-14/laion2b_s32b_b82k",
    "datacomp-vit-b-16": "ViT-B-16/datacomp_xl_s13b_b90k",
    "datacomp-vit-l-14": "ViT-L-14/datacomp_xl_s13b_b90k",
    "dfn-vit-b-16": "ViT-B-16-quickgelu/dfn2b",
    "dfn-vit-l-14": "ViT-L-14-quickgelu/dfn2b",
    "dfn-vit-h-14": "ViT-H-14-quickgelu/dfn5b",
    "dfn-vit-h-14-378": "ViT-H-14-378-quickgelu/dfn5b",
    "clipa-vit-l-14-336": "ViT-L-14-CLIPA-336/datacomp1b",
}


@pytest.mark.parametrize("name", [spec.name for spec in openclip.SPECS])
def test_rows_say_what_open_clip_says(name: str) -> None:
    row, own = encoder_spec(name), encoder_spec(f"open_clip:{ROWS[name]}")
    assert row == dataclasses.replace(own, name=name, licence=row.licence, reference=row.reference)


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32", "coca_ViT-B-32"])
def test_parameters_are_those_of_the_whole_tower(name: str) -> None:
    spec = encoder_spec(f"open_clip:{name}")
    with torch.device("meta"):
        encoder = create_encoder(spec.name, pretrained=False, feature_layer=-1)
    norm = 2 * spec.dim if name.startswith(("ViT-B-32", "coca")) else 0
    assert sum(parameter.numel() for parameter in encoder.parameters()) + norm == spec.parameters


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("RN50", {"final_norm": True}, "the last norm is not to be found; pass final_norm=False"),
        ("coca_ViT-B-32", {"final_norm": True}, "the last norm stands behind its attention pool; pass"),
        ("ViT-B-32", {"attn_implementation": "eager"}, "one attention alone; leave attn_implementation out"),
        ("RN50", {"attn_implementation": "flash"}, "one attention alone; leave attn_implementation out"),
        ("ViT-B-32", {"widht": 3}, "leave the options out"),
        ("RN50", {"feature_layer": -6}, "feature layer -6 is not one of its 5 stages"),
        ("RN50", {"image_size": 240}, "image size 240 is not a multiple of 32; use 224 or 256"),
        ("ViT-B-32", {"pretrained": True}, "no released weights are known; pass pretrained=False or a"),
    ],
)
def test_what_a_tower_cannot_be_is_said(name: str, options: dict[str, Any], sentence: str) -> None:
    with torch.device("meta"), pytest.raises(VlmError, match=f"^open_clip:{name}: .*{sentence}"):
        create_encoder(f"open_clip:{name}", **{"pretrained": False, **options})


@pytest.mark.parametrize("source", ["ViT-B-3", "ViT-B-32/", "ViT-B-32/none", ""])
def test_unknown_architectures_and_tags_are_refused(source: str) -> None:
    with pytest.raises(UnknownNameError, match=f"^open_clip:{source}: "):
        encoder_spec(f"open_clip:{source}")
