"""The contract of every registered encoder, the registry, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from typing import Any, Self

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from connectors.errors import DuplicateNameError, TokenShapeError, UnknownNameError, VlmError
from connectors.tokens import VisualTokens
from vlm_encoders import registry
from vlm_encoders.encoder import Encoder
from vlm_encoders.registry import create_encoder, encoder_spec, list_encoders, register_encoder
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.testing import check_encoder


class PatchMean(Encoder):
    """A plugin's encoder: the mean colour of each patch, scaled."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__(spec)
        self.scale = nn.Linear(3, spec.dim)

    @classmethod
    def build(cls, spec: EncoderSpec, *, pretrained: bool | str, dtype: torch.dtype) -> Self:
        return cls(spec).to(dtype)

    def forward_features(self, pixel_values: Tensor) -> VisualTokens:
        means = nn.functional.avg_pool2d(pixel_values, self.spec.stride)
        return VisualTokens.from_map(self.scale(means.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    def blocks(self) -> list[nn.Module]:
        return [self.scale]


PLUGIN = EncoderSpec(
    name="patch-mean",
    family="plugin",
    backend=f"{__name__}:PatchMean",
    source="PatchMean",
    weights=None,
    image_size=(32, 48),
    stride=16,
    dim=5,
    num_layers=1,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


@pytest.fixture
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())
    registry._registry.cache_clear()
    yield
    registry._registry.cache_clear()


def _this_module() -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(PatchMean=PatchMean, SameBlockTwice=SameBlockTwice)


def smallest(family: str) -> str:
    return min(list_encoders(family=family), key=lambda name: encoder_spec(name).parameters)


@pytest.mark.parametrize("name", list_encoders())
def test_every_encoder_keeps_the_contract(name: str) -> None:
    spec = encoder_spec(name)
    if name == smallest(spec.family):
        check_encoder(name)
        return
    # Even shapes alone take a second for thirty blocks, and a family's blocks are alike: others are cut.
    kept = 1 if spec.stages else min(3, spec.num_layers)
    final_norm = spec.final_norm and not spec.stages and spec.neck is None
    check_encoder(name, feature_layer=kept - 1 - spec.num_layers, final_norm=final_norm)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip-vit-b-32", {"feature_layer": -5, "image_size": (256, 320)}),
        ("siglip-b-16-224", {"feature_layer": -2, "image_size": 256}),
        ("dinov2-vit-s-14-reg", {"feature_layer": -3, "image_size": (224, 448)}),
        ("openclip-vit-b-32-laion2b", {"feature_layer": -1, "final_norm": True, "image_size": 256}),
        ("swin-t-224", {"image_size": (256, 320)}),
        ("swin-t-224", {"feature_layer": (-2, -1)}),
        ("sam-vit-b", {"image_size": (512, 1024)}),
        ("sam-vit-b", {"feature_layer": (-1, -4), "final_norm": False, "image_size": 512}),
        ("clip-vit-b-32", {"feature_layer": (-2, -5, -8), "attn_implementation": "eager"}),
        ("timm:vit_tiny_patch16_224.augreg_in21k", {"feature_layer": -4, "image_size": 192}),
        ("timm:vit_base_patch16_siglip_224.webli", {}),
        ("timm:samvit_base_patch16.sa1b", {"image_size": (512, 256)}),
        ("timm:convnext_tiny.fb_in22k", {}),
        ("open_clip:ViT-B-16/laion2b_s34b_b88k", {}),
    ],
)
def test_other_sizes_layers_and_names_keep_the_contract(name: str, options: dict[str, Any]) -> None:
    check_encoder(name, **options)


def test_each_family_has_two_names_and_each_backend_one() -> None:
    for family in ("clip", "siglip", "dinov2", "swin", "sam"):
        assert len(list_encoders(family=family)) >= 2
    backends = {encoder_spec(name).backend for name in list_encoders()}
    assert {"transformers", "timm", "open_clip"} <= backends


def test_check_encoder_fails_on_wrong_blocks_and_tokens(fresh_registry: None) -> None:
    register_encoder(PLUGIN, dataclasses.replace(PLUGIN, name="two-blocks", num_layers=2))
    check_encoder("patch-mean")
    with pytest.raises(VlmError, match="1 blocks were built, its spec says 2"):
        check_encoder("two-blocks")


class SameBlockTwice(PatchMean):
    def blocks(self) -> list[nn.Module]:
        return [self.scale, self.scale]


def test_check_encoder_says_what_is_broken(fresh_registry: None) -> None:
    backend = f"{__name__}:SameBlockTwice"
    register_encoder(dataclasses.replace(PLUGIN, name="twice", backend=backend, num_layers=2))
    with pytest.raises(VlmError, match=r"^twice: blocks\(\) gives a block twice"):
        check_encoder("twice")


def test_forward_takes_no_other_shape() -> None:
    with torch.device("meta"):
        encoder = create_encoder("clip-vit-b-32", pretrained=False)
    for shape in ((1, 3, 256, 256), (3, 224, 224), (1, 1, 224, 224)):
        with pytest.raises(TokenShapeError, match=r"pixels are \(B, 3, 224, 224\)"):
            encoder(torch.zeros(shape, device="meta"))


def test_forward_refuses_a_network_that_gives_other_tokens(fresh_registry: None) -> None:
    encoder = PatchMean(dataclasses.replace(PLUGIN, num_prefix=1))
    with pytest.raises(TokenShapeError, match="its network gave"):
        encoder(torch.zeros(1, 3, 32, 48))


def test_unknown_names_get_the_nearest() -> None:
    for name, hint in {
        "clip-vit-l-14-33": "clip-vit-l-14-336",
        "timm:vit_tiny_patch16_22": "vit_tiny_patch16_224",
        "open_clip:ViT-B-3/openai": "ViT-B-32",
        "open_clip:ViT-B-32/laion2b_s34b": "laion2b_s34b_b79k",
        "open_clip:ViT-B-32/none": r"laion2b_e16, .*openai and \d+ more",
    }.items():
        with pytest.raises(UnknownNameError, match=hint):
            encoder_spec(name)
    with pytest.raises(UnknownNameError):
        encoder_spec("timm:vit_tiny_patch16_224.no_such_tag")


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("dinov2-vit-s-14", {"image_size": 330}, "image size 330 is not a multiple of 14; use 322 or 336"),
        ("clip-vit-b-32", {"feature_layer": -13}, "feature layer -13 is not one of its 12 blocks"),
        ("clip-vit-b-32", {"feature_layer": 0}, "feature layer 0 is not one"),
        ("swin-t-224", {"feature_layer": -5}, "feature layer -5 is not one of its 4 stages"),
        ("sam-vit-b", {"feature_layer": -2, "final_norm": True}, "its neck stands behind layer -1"),
        ("timm:inception_v3", {"image_size": 320}, "the network takes views of 299 px alone, got 320"),
        ("clip-vit-b-32", {"dtype": "float33"}, "'float33' is no dtype; use float32, bfloat16 or float16"),
        ("clip-vit-b-32", {"dtype": "int8"}, "'int8' is no dtype; use float32"),
        ("clip-vit-b-32", {"resize": "foo"}, "resize 'foo' is none of crop, squash, pad, expand"),
        ("clip-vit-b-32", {"image_size": 336.0}, "whole numbers, got 336.0"),
        (
            "clip-vit-b-32",
            {"revision": "v1"},
            "revision 'v1' is of weights on the hub, pretrained=False is not; leave one out",
        ),
        ("clip-vit-b-32", {"hiden_act": "gelu"}, "no option 'hiden_act'; did you mean hidden_act"),
        ("swin-t-224", {"depthz": 3}, "leave the option out"),
        ("openclip-vit-b-32-laion2b", {"widht": 3}, "leave the options out"),
    ],
)
def test_what_an_encoder_cannot_be_is_said(name: str, options: dict[str, Any], sentence: str) -> None:
    with torch.device("meta"), pytest.raises(VlmError, match=sentence):
        create_encoder(name, pretrained=False, **options)


def test_plugins_come_by_entry_points(fresh_registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"one": PLUGIN, "many": (dataclasses.replace(PLUGIN, name="second"),)}

    def load(self: EntryPoint) -> object:
        return points[self.name]

    monkeypatch.setattr(EntryPoint, "load", load)
    found = [EntryPoint(name, f"plugin:{name}", "vlm_encoders.encoders") for name in points]
    monkeypatch.setattr("connectors.registry.entry_points", lambda **_: found)
    assert {"patch-mean", "second"} <= set(list_encoders())
    tokens = create_encoder("second", pretrained=False, dtype="bfloat16").encode(torch.rand(3, 10, 10))
    assert tokens.grid == (2, 3)
    assert tokens.tokens.dtype == torch.bfloat16


def test_a_plugin_that_is_no_spec_is_refused(fresh_registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EntryPoint, "load", lambda _: "no spec")
    monkeypatch.setattr(
        "connectors.registry.entry_points", lambda **_: [EntryPoint("bad", "plugin:bad", "vlm_encoders.encoders")]
    )
    with pytest.raises(VlmError, match="neither an EncoderSpec nor several"):
        list_encoders()


def test_names_are_registered_once(fresh_registry: None) -> None:
    register_encoder(PLUGIN)
    with pytest.raises(DuplicateNameError, match="patch-mean"):
        register_encoder(PLUGIN)
    with pytest.raises(DuplicateNameError, match="clip-vit-b-32"):
        register_encoder(dataclasses.replace(PLUGIN, name="clip-vit-b-32"))


def test_origin_builds_the_same_encoder_again() -> None:
    with torch.device("meta"):
        first = create_encoder(
            "clip-vit-b-32",
            pretrained=False,
            image_size=(64, 96),
            feature_layer=-3,
            dtype="bfloat16",
            hidden_act="gelu",
        )
        again = create_encoder(**json.loads(json.dumps(first.origin)))
    assert again.spec == first.spec
    assert again.origin == first.origin
    shapes = {key: value.shape for key, value in first.state_dict().items()}
    assert {key: value.shape for key, value in again.state_dict().items()} == shapes
    assert next(again.parameters()).dtype == torch.bfloat16


def test_threads_may_share_an_encoder() -> None:
    torch.manual_seed(0)
    encoder = create_encoder("clip-vit-b-32", pretrained=False, image_size=32, feature_layer=(-9, -10, -11))
    views = [torch.randn(1, 3, 32, 32) for _ in range(2)]
    with torch.no_grad():
        alone = [encoder(view).tokens for view in views]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda number: encoder(views[number % 2]).tokens, range(60)))
    assert all(torch.equal(tokens, alone[number % 2]) for number, tokens in enumerate(found))


def test_a_copied_and_a_compiled_encoder_give_the_same_tokens() -> None:
    torch.manual_seed(0)
    encoder = create_encoder("clip-vit-b-32", pretrained=False, image_size=32, feature_layer=(-9, -11))
    view = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        tokens = encoder(view).tokens
        copied = copy.deepcopy(encoder)
        for parameter in encoder.parameters():
            parameter.zero_()
        assert torch.equal(copied(view).tokens, tokens)
        assert torch.equal(torch.compile(copied, backend="eager", fullgraph=True)(view).tokens, tokens)


def test_what_is_no_name_is_said() -> None:
    for name in (None, nn.Identity()):
        with pytest.raises(VlmError, match="an encoder is known by its name, got a"):
            encoder_spec(name)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="a name with a colon begins with one of hf:, timm:, open_clip:, fused:"):
        encoder_spec("openclip:ViT-B-32")


def test_weights_that_are_nowhere_are_not_made_up(fresh_registry: None) -> None:
    register_encoder(PLUGIN)
    with pytest.raises(VlmError, match="no released weights are known; pass pretrained=False or a folder"):
        create_encoder("patch-mean")


def test_levels_are_no_pixels() -> None:
    encoder = PatchMean(PLUGIN)
    with pytest.raises(VlmError, match=r"pixels are normalised floats, got torch.uint8; use preprocess"):
        encoder(torch.zeros(1, 3, 32, 48, dtype=torch.uint8))


def test_prefix_tokens_of_another_encoder_are_refused() -> None:
    encoder = PatchMean(dataclasses.replace(PLUGIN, num_prefix=1))
    with pytest.raises(VlmError, match="its tokens have 1 prefix tokens, these have 0"):
        encoder.prefix_tokens(VisualTokens(torch.zeros(1, 6, 5), (2, 3)), "cls")
    with pytest.raises(VlmError, match="no prefix tokens of kind 'register'; it has cls"):
        encoder.prefix_tokens(VisualTokens(torch.zeros(1, 6, 5), (2, 3), torch.zeros(1, 1, 5)), "register")


def test_sides_of_numpy_are_sides() -> None:
    assert encoder_spec("clip-vit-b-32").resized(np.int64(64)).image_size == (64, 64)


def test_the_table_imports_no_heavy_library() -> None:
    code = (
        "import sys; from vlm_encoders import list_encoders, encoder_spec;"
        "[encoder_spec(n).token_spec() for n in list_encoders()];"
        "print(sorted({'torch', 'transformers', 'timm', 'open_clip', 'torchvision', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_option_that_builds_another_depth_is_refused() -> None:
    with pytest.raises(VlmError, match="2 blocks were built, its spec says 11; choose the depth by feature_layer"):
        create_encoder("clip-vit-b-32", pretrained=False, num_hidden_layers=2)
