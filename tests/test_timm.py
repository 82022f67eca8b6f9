"""Any model of timm by its name: the contract, sizes, layers, pixels, and the rows of the table."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from connectors.errors import UnknownNameError, VlmError
from vlm_encoders.encoders.timm_backend import explain, timm_names
from vlm_encoders.encoders.trim import drop_parameters, park_parameters, trace_parameters
from vlm_encoders.registry import create_encoder, encoder_spec
from vlm_encoders.spec import EncoderSpec, Stage
from vlm_encoders.testing import check_encoder

NAMES = (  # a small model of each kind of class: blocks, stages, branches, and what is odd in its own way
    "convit_tiny",
    "convmixer_768_32",
    "cpubone_nano",
    "crossvit_tiny_240",
    "deit_tiny_distilled_patch16_224",
    "dla46x_c",
    "efficientvim_m1",
    "eva02_tiny_patch14_224",
    "hardcorenas_a",
    "hiera_tiny_224",
    "hrnet_w18_small",
    "inception_v3",
    "legacy_seresnet18",
    "nest_tiny",
    "pit_ti_224",
    "resnet10t",
    "selecsls42",
    "swin_tiny_patch4_window7_224",
    "test_byobnet",
    "test_convnext",
    "test_efficientnet",
    "test_mambaout",
    "test_nfnet",
    "test_resnet",
    "test_vit",
    "test_vit_relpos",
    "vgg11",
    "visformer_tiny",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_contract_holds(name: str) -> None:
    check_encoder(f"timm:{name}")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vit", {"image_size": (96, 64), "feature_layer": -2}),
        ("test_vit", {"feature_layer": (-1, -3), "final_norm": True}),
        ("test_resnet", {"image_size": (96, 64), "feature_layer": (-3, -1)}),
        ("test_convnext", {"feature_layer": -4}),
        ("swin_tiny_patch4_window7_224", {"image_size": (64, 96), "feature_layer": -3}),
        ("samvit_base_patch16_224", {"feature_layer": -11, "final_norm": False}),
        ("crossvit_tiny_240", {"feature_layer": -4}),
        ("hrnet_w18_small", {"feature_layer": -2}),
    ],
)
def test_the_contract_holds_at_other_sizes_and_layers(name: str, options: dict[str, Any]) -> None:
    check_encoder(f"timm:{name}", **options)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("test_resnet", {"final_norm": True}, "ResNet has no norm for layer -1; pass final_norm=False"),
        ("swin_tiny_patch4_window7_224", {"feature_layer": -2, "final_norm": True}, "no norm for layer -2"),
        ("test_vit", {"attn_implementation": "flash"}, "no attn_implementation 'flash'; use sdpa or eager"),
        ("test_resnet", {"attn_implementation": "sdpa"}, "has one attention alone; leave attn_implementation out"),
        ("test_vit", {"depthz": 3}, "leave the option out"),
        ("test_vit", {"embed_dim": 97}, "cannot build it so .*; leave the options out"),
        ("test_vit", {"features_only": True}, "features_only is of timm's factory, not of the model; leave"),
        ("test_vit", {"checkpoint_path": "/nope"}, "checkpoint_path is of timm's factory"),
        ("test_vit", {"pretrained_cfg": "r160_in1k"}, "pretrained_cfg is of timm's factory"),
        ("nest_tiny", {"image_size": (256, 224)}, "views? (of|alone)"),
        ("crossvit_tiny_240", {"image_size": 255}, "takes views of 240 px alone, got 255"),
    ],
)
def test_what_a_model_cannot_be_is_said(name: str, options: dict[str, Any], sentence: str) -> None:
    with torch.device("meta"), pytest.raises(VlmError, match=f"^timm:{name}: .*{sentence}"):
        create_encoder(f"timm:{name}", pretrained=False, **options)


def test_unknown_models_are_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="resnet18"):
        encoder_spec("timm:resnet118")
    with pytest.raises(UnknownNameError, match="the tag is what follows the dot"):
        encoder_spec("timm:test_vit.no_such_tag")
    names = timm_names()
    assert {"resnet18", "test_vit", "vit_base_patch16_siglip_224"} <= set(names)
    assert len(set(names)) == len(names)
    assert all(timm.is_model(name) for name in names)


def test_a_layer_is_a_block_or_a_stage() -> None:
    with torch.device("meta"):
        vit = create_encoder("timm:test_vit", pretrained=False)
        efficientnet = create_encoder("timm:efficientnet_lite0", pretrained=False)
    network: Any = vit.get_submodule("network")
    assert all(ours is theirs for ours, theirs in zip(vit.blocks(), network.blocks, strict=True))
    # EfficientNet's fourth stage is two of its modules; all that lies behind its stem is in one stage.
    blocks: Any = efficientnet.get_submodule("network.blocks")
    in_stages = {id(parameter) for stage in efficientnet.blocks() for parameter in stage.parameters()}
    assert in_stages == {id(parameter) for parameter in blocks.parameters()}
    assert len(efficientnet.blocks()) == 5 < len(blocks)


def test_sam_has_a_neck_or_not() -> None:
    spec = encoder_spec("timm:samvit_base_patch16_224")
    assert (spec.dim, spec.neck, spec.final_norm) == (768, None, True)
    large = encoder_spec("timm:samvit_base_patch16.sa1b")
    assert (large.dim, large.neck, large.final_norm) == (256, Stage(256, 16), True)
    bare = large.at_layer(-1, final_norm=False)
    assert (bare.dim, bare.stride, bare.kept_layers) == (768, 16, 12)
    with pytest.raises(VlmError, match="neck stands behind"):
        large.at_layer(-2, final_norm=True)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("deit_tiny_distilled_patch16_224", ("cls", "distillation")),
        ("test_vit", ("cls",)),
        ("test_vit2", ("register",)),
        ("vit_small_patch14_reg4_dinov2", ("cls", "register", "register", "register", "register")),
        ("test_resnet", ()),
    ],
)
def test_prefix_tokens_are_named(name: str, kinds: tuple[str, ...]) -> None:
    spec = encoder_spec(f"timm:{name}")
    assert spec.prefix_kinds == kinds


@pytest.mark.parametrize(
    ("name", "resize", "crop_pct"),
    [
        ("vit_base_patch16_siglip_224.webli", "squash", 1.0),
        ("vit_base_patch16_siglip_gap_224.webli", "squash", 1.0),
        ("test_vit", "crop", 0.95),
    ],
)
def test_pixels_are_those_that_it_was_trained_on(name: str, resize: str, crop_pct: float) -> None:
    spec = encoder_spec(f"timm:{name}")
    assert (spec.resize, spec.crop_pct) == (resize, crop_pct)


ROWS = (
    "swin-t-224", "swinv2-t-256", "eva02-t-14-224", "eva-clip-b-16-224", "pe-core-t-16-384", "pe-spatial-t-16-512",
    "convnext-t-224", "convnext-clip-b-320", "hiera-t-224", "naflexvit-b-16",
)  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows_say_what_timm_builds(name: str) -> None:
    row = encoder_spec(name)
    measured: EncoderSpec = explain(name, row.source)
    fields = ("image_size", "stride", "dim", "stages", "num_layers", "prefix_kinds", "final_norm", "sizes", "rounding")
    for field in (*fields, "parameters", "weights", "mean", "std"):
        assert getattr(row, field) == getattr(measured, field), field
    if measured.mlp_dim:
        shape = ("heads", "mlp_dim", "gated_mlp")
        assert [getattr(row, field) for field in shape] == [getattr(measured, field) for field in shape]


class Odd(nn.Module):
    """A network that runs a part for nothing, and has one that it never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.vain, self.still = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 3)
        self.last = nn.Linear(3, 2)
        self.loose = nn.Parameter(torch.zeros(2))

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.vain(values)
        middle = self.first(values)
        return middle, self.last(middle)


def test_idle_weights_are_found_and_taken_away() -> None:
    network = Odd()
    middle, end = network(torch.ones(1, 2))
    added = trace_parameters(network, [(middle, None), (end,)])
    assert [sorted(names) for names in added] == [["first.bias", "first.weight"], ["last.bias", "last.weight"]]
    park_parameters(network, ["vain.weight", "vain.bias"])
    drop_parameters(network, ["still.weight", "still.bias", "loose"])
    assert [name for name, _ in network.named_parameters()] == [
        "first.weight",
        "first.bias",
        "last.weight",
        "last.bias",
    ]
    assert set(network.state_dict()) == {"first.weight", "first.bias", "last.weight", "last.bias"}
    assert torch.equal(network(torch.ones(1, 2))[1], end)
