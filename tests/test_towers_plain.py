"""Plain vision towers of transformers against the library's own models, with the same small random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.registry import create_encoder, encoder_spec
from vlm_encoders.testing import check_encoder

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
}
DINO: dict[str, Any] = {key: value for key, value in VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
PAIRS: dict[str, Any] = {**VIT, "patch_size": [8, 8], "image_size": [32, 32]}
ABSOLUTE: dict[str, Any] = {"use_absolute_position_embeddings": True, "use_shared_relative_position_bias": True}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "aimv2": ("Aimv2VisionModel", VIT),
    "aimv2-native": ("Aimv2VisionModel", {**VIT, "is_native": True}),
    "beit": ("BeitModel", {**VIT, "use_relative_position_bias": True}),
    "beit-normed": ("BeitModel", {**VIT, **ABSOLUTE, "use_mean_pooling": False}),
    "clip": ("CLIPVisionModel", {**VIT, "hidden_act": "gelu"}),
    "deit": ("DeiTModel", VIT),
    "dinov2": ("Dinov2Model", DINO),
    "dinov2-giant": ("Dinov2Model", {**DINO, "use_swiglu_ffn": True}),
    "dinov2-reg": ("Dinov2WithRegistersModel", {**DINO, "num_register_tokens": 3}),
    "dinov3": ("DINOv3ViTModel", {**VIT, "num_register_tokens": 4}),
    "dinov3-plus": ("DINOv3ViTModel", {**VIT, "num_register_tokens": 2, "use_gated_mlp": True, "hidden_act": "silu"}),
    "ijepa": ("IJepaModel", VIT),
    "internvit": ("InternVLVisionModel", {**PAIRS, "attention_bias": True}),
    "internvit-6b": ("InternVLVisionModel", {**PAIRS, "use_qk_norm": True, "norm_type": "rms_norm"}),
    "metaclip2": ("MetaClip2VisionModel", VIT),
    "mlcd": ("MLCDVisionModel", {**VIT, "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0}}),
    "siglip": ("SiglipVisionModel", VIT),
    "tipsv2": ("Tipsv2VisionModel", DINO),
    "vit": ("ViTModel", VIT),
}
PREFIX = {
    **dict.fromkeys(("beit", "clip", "dinov2", "internvit", "metaclip2", "mlcd", "vit"), ("cls",)),
    "deit": ("cls", "distillation"),
    "dinov2-reg": ("cls", "register", "register", "register"),
    "dinov3": ("cls", *("register",) * 4),
    "tipsv2": ("cls", "cls"),
    **dict.fromkeys(("aimv2", "ijepa", "siglip"), ()),
}
ASKED = {"clip", "deit", "ijepa", "metaclip2", "siglip", "vit"}  # these take interpolate_pos_encoding
TABLES = sorted({*ASKED, "beit", "beit-normed", "internvit"})
BEFORE_NORM = {"clip", "metaclip2", "mlcd"}
UNNORMED = {"beit", "internvit", "internvit-6b"}
NORM = {
    **dict.fromkeys(("aimv2", "aimv2-native"), "rms_norm"),
    **dict.fromkeys(("dinov3", "dinov3-plus"), "norm"),
    **dict.fromkeys((*sorted(BEFORE_NORM), "siglip"), "post_layernorm"),
}
Library = Callable[[str], tuple[Any, Path]]


def shake(model: nn.Module) -> nn.Module:
    """Give every parameter, the zero-initialised ones too, a random value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def make(source: str, shape: dict[str, Any]) -> Any:
    import transformers

    torch.manual_seed(1)
    return shake(getattr(transformers, source)(getattr(transformers, source.replace("Model", "Config"))(**shape)))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Give the library's whole model of a kind, and the folder in which it saved it."""

    @cache
    def model_and_folder(kind: str) -> tuple[Any, Path]:
        model, folder = make(*SMALL[kind]), tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        return model, folder

    return model_and_folder


def pixels(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))


def sequence(encoder: Encoder, values: Tensor) -> Tensor:
    visual = encoder(values)
    return visual.tokens if visual.prefix is None else torch.cat([visual.prefix, visual.tokens], dim=1)


def states(model: Any, values: Tensor, kind: str) -> Any:
    flag = {"interpolate_pos_encoding": True} if kind in ASKED and values.shape[2:] != (32, 32) else {}
    return model(values, output_hidden_states=True, **flag)


@pytest.mark.parametrize("kind", SMALL)
def test_tokens_are_the_hidden_states_of_the_whole_model(kind: str, library: Library) -> None:
    model, folder = library(kind)
    values = pixels(32, 32)
    expected = states(model, values, kind).hidden_states
    for layer in (-1, -2, -4):
        encoder = create_encoder(f"hf:{folder}", feature_layer=layer, final_norm=False)
        assert torch.equal(sequence(encoder, values), expected[layer])
        assert len(encoder.blocks()) == 5 + layer
    if kind in PREFIX:
        assert encoder.spec.prefix_kinds == PREFIX[kind]


@pytest.mark.parametrize("kind", SMALL)
def test_several_layers_are_joined_and_normed_each(kind: str, library: Library) -> None:
    model, folder = library(kind)
    values = pixels(32, 32)
    expected = [states(model, values, kind).hidden_states[layer] for layer in (-2, -4, -1)]
    encoder = create_encoder(f"hf:{folder}", feature_layer=(-2, -4, -1), final_norm=False)
    assert torch.equal(sequence(encoder, values), torch.cat(expected, dim=2))
    if kind in UNNORMED:
        with pytest.raises(VlmError, match="has no final norm on its tokens"):
            create_encoder(f"hf:{folder}", final_norm=True)
        return
    norm = model.get_submodule(NORM.get(kind, "layernorm"))
    encoder = create_encoder(f"hf:{folder}", feature_layer=(-2, -4, -1), final_norm=True)
    assert torch.equal(sequence(encoder, values), torch.cat([norm(state) for state in expected], dim=2))


@pytest.mark.parametrize("kind", SMALL)
def test_the_default_is_what_vlms_use(kind: str, library: Library) -> None:
    model, folder = library(kind)
    values = pixels(32, 32)
    outputs = states(model, values, kind)
    expected = outputs.hidden_states[-2] if kind in BEFORE_NORM else outputs.last_hidden_state
    assert torch.equal(sequence(create_encoder(f"hf:{folder}"), values), expected)


@pytest.mark.parametrize("kind", [kind for kind in SMALL if kind != "aimv2"])
def test_other_sizes_are_the_library_s_own(kind: str, library: Library) -> None:
    model, folder = library(kind)
    for size in ((48, 64), (64, 16), (64, 64)):
        values = pixels(*size)
        encoder = create_encoder(f"hf:{folder}", image_size=size, feature_layer=-2)
        expected = states(model, values, kind).hidden_states[-2]
        assert torch.equal(sequence(encoder, values), expected)
        twin = copy.deepcopy(encoder)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.zero_()
        # A copy must not read the original's table.
        assert torch.equal(sequence(twin, values), expected)
        check_encoder(f"hf:{folder}", image_size=size)


def test_a_fixed_table_takes_one_size(library: Library) -> None:
    _, folder = library("aimv2")
    with pytest.raises(VlmError, match="takes views of 32 px alone, got 48"):
        create_encoder(f"hf:{folder}", image_size=48)


@pytest.mark.parametrize("kind", SMALL)
def test_half_precision_is_the_library_s_own(kind: str, library: Library) -> None:
    model, folder = library(kind)
    half = type(model).from_pretrained(folder, dtype=torch.bfloat16).eval()
    values = pixels(32, 32).bfloat16()
    expected = states(half, values, kind).hidden_states[-2]
    for pretrained in (True, False):
        encoder = create_encoder(f"hf:{folder}", feature_layer=-2, dtype="bfloat16", pretrained=pretrained)
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
        assert torch.bfloat16 not in {buffer.dtype for buffer in encoder.buffers()}
        if pretrained:
            assert torch.equal(sequence(encoder, values), expected)


@pytest.mark.parametrize("kind", TABLES)
def test_tables_are_resampled_in_float32_before_the_cast(kind: str, library: Library) -> None:
    _, folder = library(kind)
    full = create_encoder(f"hf:{folder}", image_size=(48, 64))
    half = create_encoder(f"hf:{folder}", image_size=(48, 64), dtype="bfloat16")
    values = pixels(48, 64).bfloat16()
    theirs = dict(half.named_parameters())
    for name, parameter in full.named_parameters():
        assert torch.equal(theirs[name], parameter.bfloat16())
    assert torch.equal(sequence(half, values), sequence(full.bfloat16(), values))


@pytest.mark.parametrize("kind", SMALL)
def test_tokens_run_row_by_row(kind: str, library: Library) -> None:
    _, folder = library(kind)
    size = (32, 32) if kind == "aimv2" else (24, 40)
    encoder = create_encoder(f"hf:{folder}", image_size=size, feature_layer=-4)
    blank = torch.zeros(1, 3, *size)
    rows, columns = encoder.token_spec.grid or (0, 0)
    for row, column in ((0, columns - 1), (rows - 1, 0), (1, 2)):
        hot = blank.clone()
        hot[:, :, row * 8 : (row + 1) * 8, column * 8 : (column + 1) * 8] = 30
        change = (encoder(hot).tokens - encoder(blank).tokens).norm(dim=2)
        assert divmod(int(change.argmax()), columns) == (row, column)


@pytest.mark.parametrize("kind", SMALL)
def test_small_towers_keep_the_contract(kind: str, library: Library) -> None:
    _, folder = library(kind)
    check_encoder(f"hf:{folder}", device="cpu")
    joined = create_encoder(f"hf:{folder}", feature_layer=(-3, -1), final_norm=False)
    sequence(joined, pixels(*joined.spec.image_size)).sum().backward()
    assert not [name for name, parameter in joined.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("kind", SMALL)
def test_attention_can_be_chosen(kind: str, library: Library) -> None:
    _, folder = library(kind)
    values = pixels(32, 32)
    eager, fused = (create_encoder(f"hf:{folder}", attn_implementation=which) for which in ("eager", "sdpa"))
    for encoder, which in ((eager, "eager"), (fused, "sdpa")):
        network: Any = encoder.get_submodule("network")
        assert network.config._attn_implementation == which
    # The two sum in different orders.
    torch.testing.assert_close(sequence(eager, values), sequence(fused, values), rtol=1e-4, atol=1e-5)


def test_an_unknown_attention_is_refused(library: Library) -> None:
    _, folder = library("vit")
    for pretrained in (True, False):
        with pytest.raises(VlmError, match="attn_implementation"):
            create_encoder(f"hf:{folder}", pretrained=pretrained, attn_implementation="magic")


@pytest.mark.parametrize("kind", SMALL)
def test_a_rebuilt_network_has_the_folder_s_numbers(kind: str, library: Library) -> None:
    """A checkpoint builds its encoder from the spec alone: no entry of the config may be lost."""
    _, folder = library(kind)
    bare = create_encoder(f"hf:{folder}", pretrained=False)
    loaded = create_encoder(f"hf:{folder}")
    bare.load_state_dict(loaded.state_dict())
    assert torch.equal(sequence(bare, pixels(32, 32)), sequence(loaded, pixels(32, 32)))


def test_every_entry_that_differs_is_an_option(library: Library) -> None:
    assert dict(encoder_spec(f"hf:{library('mlcd')[1]}").options) == {
        "rope_parameters": (("rope_theta", 100.0), ("rope_type", "axial"))
    }
    assert dict(encoder_spec(f"hf:{library('dinov2-giant')[1]}").options) == {"mlp_ratio": 2, "use_swiglu_ffn": True}
    assert encoder_spec(f"hf:{library('dinov2-giant')[1]}").mlp_dim == 48
    assert encoder_spec(f"hf:{library('vit')[1]}").options == ()


@pytest.mark.parametrize(
    ("source", "config", "tower", "prefix"),
    [
        ("ViTForImageClassification", "ViTConfig", "ViTModel", "vit"),
        ("ViTMAEForPreTraining", "ViTMAEConfig", "ViTModel", "vit"),
        ("ViTMAEModel", "ViTMAEConfig", "ViTModel", ""),
        ("ViTModel", "ViTConfig", "ViTModel", ""),
        ("DeiTForImageClassificationWithTeacher", "DeiTConfig", "DeiTModel", "deit"),
        ("BeitForImageClassification", "BeitConfig", "BeitModel", "beit"),
        ("IJepaForImageClassification", "IJepaConfig", "IJepaModel", "ijepa"),
        ("Dinov2ForImageClassification", "Dinov2Config", "Dinov2Model", "dinov2"),
        ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", "", "dinov2_with_registers"),
        ("SiglipForImageClassification", "SiglipConfig", "SiglipVisionModel", "vision_model"),
        ("CLIPModel", "CLIPConfig", "CLIPVisionModel", "vision_model"),
        ("MetaClip2Model", "MetaClip2Config", "MetaClip2VisionModel", "vision_model"),
        ("SiglipModel", "SiglipConfig", "SiglipVisionModel", "vision_model"),
        ("Aimv2Model", "Aimv2Config", "Aimv2VisionModel", "vision_model"),
        ("Tipsv2Model", "Tipsv2Config", "Tipsv2VisionModel", "vision_model"),
    ],
)
def test_whole_checkpoints_give_their_tower(source: str, config: str, tower: str, prefix: str, tmp_path: Path) -> None:
    import transformers

    shape = DINO if "ino" in source or "Tips" in source else VIT
    if config in {"CLIPConfig", "MetaClip2Config", "SiglipConfig", "Aimv2Config", "Tipsv2Config"}:
        text = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
        shape = {"vision_config": shape, "text_config": text}
    torch.manual_seed(3)
    model: Any = shake(getattr(transformers, source)(getattr(transformers, config)(**shape)))
    model.save_pretrained(tmp_path)
    own = model.get_submodule(prefix) if prefix else model
    if tower == "ViTModel":
        # MAE's own class would hide and shuffle patches.
        own = transformers.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    encoder = create_encoder(f"hf:{tmp_path}", feature_layer=-2)
    values = pixels(32, 32)
    assert torch.equal(sequence(encoder, values), own(values, output_hidden_states=True).hidden_states[-2])


def test_curated_towers_are_the_same_in_training_mode() -> None:
    for name in ("beit-b-16-224", "dinov3-vit-s-16"):
        encoder = create_encoder(name, pretrained=False, feature_layer=-11).train()
        with torch.no_grad():
            first, second = (sequence(encoder, pixels(224, 224)) for _ in range(2))
        assert torch.equal(first, second)


def test_the_prefix_is_cls_then_registers(library: Library) -> None:
    encoder = create_encoder(f"hf:{library('dinov2-reg')[1]}")
    embeddings: Any = encoder.get_submodule("network.embeddings")
    values = pixels(32, 32)
    before = encoder(values).prefix
    for places, parameter in ((slice(0, 1), embeddings.cls_token), (slice(1, 4), embeddings.register_tokens)):
        kept = parameter.detach().clone()
        parameter.data += torch.randn(parameter.shape) * 5
        change = (encoder(values).prefix - before)[0].norm(dim=1)
        parameter.data = kept
        others = [index for index in range(4) if index not in range(4)[places]]
        assert change[places].min() > change[others].max()
