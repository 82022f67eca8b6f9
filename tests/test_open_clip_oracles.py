"""Towers of OpenCLIP against OpenCLIP itself, loaded from whole checkpoints: bit-equal, and strict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from connectors.errors import VlmError
from vlm_encoders.registry import create_encoder, encoder_spec
from vlm_encoders.spec import Layers
from vlm_encoders.testing import check_encoder

TEXT = {"context_length": 4, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1}
VIT: dict[str, Any] = {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8}
COCA = {"context_length": 4, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny-vit": {"vision_cfg": VIT},
    "tiny-quick": {"vision_cfg": VIT, "quick_gelu": True},
    "tiny-clipa": {"vision_cfg": {**VIT, "pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True}},
    "tiny-coca": {
        "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "multimodal_cfg": COCA,
        "custom_text": True,
    },
    "tiny-resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "head_width": 64}},
    "tiny-trunk": {
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None},
        "custom_text": True,
    },
    "tiny-average": {
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit2", "timm_pool": "avg", "timm_proj": "none"},
        "custom_text": True,
    },
    "tiny-map": {
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
        "custom_text": True,
    },
    "tiny-convnext": {
        "vision_cfg": {"image_size": 96, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
    },
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Let OpenCLIP know a few towers of a few thousand weights."""
    from open_clip import factory

    folder = tmp_path_factory.mktemp("architectures")
    for name, config in ARCHITECTURES.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 64, "text_cfg": TEXT, **config}))
    paths, configs = list(factory._MODEL_CONFIG_PATHS), dict(factory._MODEL_CONFIGS)
    open_clip.add_model_config(folder)
    yield
    factory._MODEL_CONFIG_PATHS[:] = paths
    factory._MODEL_CONFIGS.clear()
    factory._MODEL_CONFIGS.update(configs)


def shake(model: nn.Module) -> Any:
    """Draw all weights and statistics at random: many start at 0 or 1, where a wrong name would not show."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) * 0.2)
    return model.eval()


def whole(arch: str, folder: Path | None = None) -> Any:
    """Make a whole CLIP with random weights, and save it into a folder."""
    model = shake(open_clip.create_model(arch))
    if folder is not None:
        state = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors")
    return model


def own_tokens(clip: Any, pixels: Tensor, layer: int, *, norm: bool = False) -> Tensor:
    """Give the tokens that OpenCLIP's untouched tower has behind a layer, (B, P + N, D)."""
    visual = clip.visual
    maps = isinstance(visual, open_clip.modified_resnet.ModifiedResNet) or (
        hasattr(visual, "trunk") and not hasattr(visual.trunk, "num_prefix_tokens")
    )
    options = {} if maps else {"output_fmt": "NLC", "output_extra_tokens": True}
    found = visual.forward_intermediates(pixels, indices=None, normalize_intermediates=norm, **options)
    tokens: Tensor = found["image_intermediates"][layer]
    if maps:
        return tokens.flatten(2).transpose(1, 2)
    prefix = found.get("image_intermediates_prefix")
    return tokens if prefix is None else torch.cat([prefix[layer], tokens], dim=1)


def sequence(encoder: Any, pixels: Tensor) -> Tensor:
    visual = encoder(pixels)
    return visual.tokens if visual.prefix is None else torch.cat([visual.prefix, visual.tokens], dim=1)


SIDES = {"tiny-resnet": 64, "tiny-trunk": 160, "tiny-average": 160, "tiny-map": 160, "tiny-convnext": 96}


@pytest.mark.parametrize("arch", ["tiny-trunk", "tiny-map", "tiny-convnext"])
def test_trunks_keep_the_contract(arch: str) -> None:
    check_encoder(f"open_clip:{arch}")


def test_a_trunk_is_read_where_its_pool_does_not_spoil_the_patches() -> None:
    cls, pooled, staged = (encoder_spec(f"open_clip:tiny-{kind}") for kind in ("trunk", "map", "convnext"))
    assert (cls.feature_layer, cls.final_norm, cls.options) == (-2, False, (("global_pool", "token"),))
    assert (pooled.feature_layer, pooled.final_norm) == (-1, True)
    assert (len(staged.stages), staged.feature_layer, staged.image_size) == (4, -1, (96, 96))


@pytest.mark.parametrize("layer", [-1, -3])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tokens_are_open_clip_s_own(arch: str, layer: int, tmp_path: Path) -> None:
    clip = whole(arch, tmp_path)
    side = SIDES.get(arch, 32)
    pixels = torch.randn(2, 3, side, side)
    encoder = create_encoder(f"open_clip:{arch}", pretrained=tmp_path, feature_layer=layer, final_norm=False)
    with torch.no_grad():
        assert torch.equal(sequence(encoder, pixels), own_tokens(clip, pixels, layer))


@pytest.mark.parametrize("arch", ["tiny-vit", "tiny-clipa", "tiny-trunk", "tiny-map"])
def test_the_last_norm_is_open_clip_s_own(arch: str, tmp_path: Path) -> None:
    clip = whole(arch, tmp_path)
    pixels = torch.randn(1, 3, SIDES.get(arch, 32), SIDES.get(arch, 32))
    encoder = create_encoder(f"open_clip:{arch}", pretrained=tmp_path, feature_layer=-1, final_norm=True)
    with torch.no_grad():
        assert torch.equal(sequence(encoder, pixels), own_tokens(clip, pixels, -1, norm=True))


@pytest.mark.parametrize("arch", ["tiny-vit", "tiny-resnet", "tiny-trunk"])
def test_several_layers_are_joined_in_the_order_asked_for(arch: str, tmp_path: Path) -> None:
    clip = whole(arch, tmp_path)
    side = SIDES.get(arch, 32)
    pixels = torch.randn(1, 3, side, side)
    layers: Layers = (-1, -2) if arch != "tiny-resnet" else (-4, -5)
    encoder = create_encoder(f"open_clip:{arch}", pretrained=tmp_path, feature_layer=layers, final_norm=False)
    with torch.no_grad():
        expected = torch.cat([own_tokens(clip, pixels, layer) for layer in layers], dim=2)
        assert torch.equal(sequence(encoder, pixels), expected)


@pytest.mark.parametrize(
    ("arch", "size"), [("tiny-vit", (48, 32)), ("tiny-trunk", (128, 192)), ("tiny-convnext", (64, 128))]
)
def test_another_size_is_open_clip_s_own(arch: str, size: tuple[int, int], tmp_path: Path) -> None:
    whole(arch, tmp_path)
    file = str(tmp_path / "open_clip_model.safetensors")
    clip = open_clip.create_model(arch, pretrained=file, force_image_size=size).eval()
    encoder = create_encoder(f"open_clip:{arch}", pretrained=tmp_path, image_size=size, final_norm=False)
    pixels = torch.randn(1, 3, *size)
    layer = encoder.spec.feature_layer
    assert isinstance(layer, int)
    with torch.no_grad():
        assert torch.equal(sequence(encoder, pixels), own_tokens(clip, pixels, layer))


def test_a_table_in_half_precision_is_resampled_in_float32(tmp_path: Path) -> None:
    clip = whole("tiny-vit")
    state = {key: value.half().contiguous() for key, value in clip.state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    encoder = create_encoder("open_clip:tiny-vit", pretrained=tmp_path / "half.safetensors", image_size=48)
    save_file({key: value.float() for key, value in state.items()}, tmp_path / "single.safetensors")
    file = str(tmp_path / "single.safetensors")
    expected = open_clip.create_model("tiny-vit", pretrained=file, force_image_size=48)
    assert torch.equal(encoder.network.positional_embedding, expected.visual.positional_embedding)  # type: ignore[union-attr, arg-type]


def write_bin(state: dict[str, Tensor], file: Path) -> None:
    torch.save(state, file)


def write_training(state: dict[str, Tensor], file: Path) -> None:
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": wrapped}, file)


def write_old(state: dict[str, Tensor], file: Path) -> None:
    torch.save(state, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [write_bin, write_training, write_old])
def test_pickled_checkpoints_load_too(write: Callable[[dict[str, Tensor], Path], None], tmp_path: Path) -> None:
    clip = whole("tiny-vit")
    write(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    pixels = torch.randn(1, 3, 32, 32)
    encoder = create_encoder("open_clip:tiny-vit", pretrained=tmp_path)
    with torch.no_grad():
        assert torch.equal(sequence(encoder, pixels), own_tokens(clip, pixels, -2))


def test_the_open_clip_file_goes_before_that_of_another_library(tmp_path: Path) -> None:
    whole("tiny-vit", tmp_path)
    save_file({"vision_model.other": torch.zeros(2)}, tmp_path / "model.safetensors")
    create_encoder("open_clip:tiny-vit", pretrained=tmp_path)


@pytest.mark.parametrize("arch", ["tiny-vit", "tiny-resnet", "tiny-trunk"])
def test_weights_are_loaded_strictly(arch: str, tmp_path: Path) -> None:
    state = whole(arch).state_dict()
    key = {"tiny-vit": "visual.ln_pre.weight", "tiny-resnet": "visual.layer2.0.bn1.running_mean"}.get(
        arch, "visual.trunk.blocks.0.norm1.weight"
    )
    bare = key.removeprefix("visual.").removeprefix("trunk.")
    changes: dict[str, dict[str, Tensor]] = {
        rf"1 missing \({bare}\)": {name: value for name, value in state.items() if name != key},
        r"1 unexpected \(surprise.weight\)": {**state, key.replace(bare, "surprise.weight"): torch.ones(2)},
        r"1 unexpected \(stranger.weight\)": {**state, "stranger.weight": torch.ones(2)},
        r"size mismatch": {**state, key: torch.ones(5)},
        r"hold no 'visual.' tower": {name: value for name, value in state.items() if "visual" not in name},
    }
    for number, (sentence, changed) in enumerate(changes.items()):
        file = tmp_path / f"{number}.safetensors"
        save_file({name: value.contiguous().clone() for name, value in changed.items()}, file)
        with pytest.raises(VlmError, match=f"^open_clip:{arch}: .*{sentence}"):
            create_encoder(f"open_clip:{arch}", pretrained=file)


def test_weights_of_another_activation_are_another_architecture(tmp_path: Path) -> None:
    clip = whole("tiny-quick", tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = own_tokens(clip, pixels, -2)
        quick = create_encoder("open_clip:tiny-vit", pretrained=tmp_path, quick_gelu=True)
        plain = create_encoder("open_clip:tiny-vit", pretrained=tmp_path)
        assert torch.equal(sequence(quick, pixels), expected)
        assert not torch.equal(sequence(plain, pixels), expected)
