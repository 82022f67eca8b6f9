"""Models of timm against timm itself, untouched and with the same small random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor

from connectors.errors import VlmError
from connectors.tokens import VisualTokens
from vlm_encoders.registry import create_encoder

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
SWIN: dict[str, Any] = {"img_size": 64, "embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)}
MODELS: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": VIT,
    "cait_xxs24_224": VIT,
    "convit_tiny": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,
    "mixer_s32_224": {"img_size": 64},
    "hiera_tiny_224": {"img_size": 64, "embed_dim": 8, "stages": (1, 1, 1, 1)},
    "naflexvit_base_patch16_gap": {"embed_dim": 32, "depth": 3, "num_heads": 2},
    "samvit_base_patch16_224": {**VIT, "global_attn_indexes": (1,), "window_size": 2},
    "swin_tiny_patch4_window7_224": {**SWIN, "window_size": 2},
    "swinv2_tiny_window8_256": {**SWIN, "window_size": 2},
    "test_byobnet": {},
    "test_coatnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "test_mambaout": {},
    "test_maxvit": {},
    "test_nfnet": {},
    "test_resnet": {},
    "test_vit_relpos": {},
    "vit_pe_core_tiny_patch16_384": VIT,
    "vit_small_patch14_reg4_dinov2": VIT,
    "xcit_nano_12_p8_224": {**VIT, "depth": 3},
}


def untouched(name: str, folder: Path, **options: Any) -> Any:
    """Save a small random model with its config, as timm does, and give it."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **options).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    save_for_hf(model, folder, model_args=options, safe_serialization=True)
    return model


def theirs(model: Any, values: Tensor, layer: int, *, norm: bool) -> VisualTokens:
    """Take one layer of timm's own, as a map and its prefix."""
    options = {"return_prefix_tokens": True} if getattr(model, "num_prefix_tokens", 0) else {}
    if type(model).__name__ in {"Cait", "ConVit", "Xcit"}:
        options = {}
    (found,) = model.forward_intermediates(
        values,
        indices=[len(model.feature_info) + layer],
        intermediates_only=True,
        **({"norm": True} if norm else {}),
        **options,
    )
    return VisualTokens.from_map(*found) if isinstance(found, tuple) else VisualTokens.from_map(found)


def pixels(encoder: Any) -> Tensor:
    return torch.randn(2, 3, *encoder.spec.image_size, generator=torch.Generator().manual_seed(1))


def same(ours: VisualTokens, expected: VisualTokens) -> bool:
    assert (ours.prefix is None) == (expected.prefix is None)
    prefixes = ours.prefix is None or torch.equal(ours.prefix, expected.prefix)
    return ours.grid == expected.grid and torch.equal(ours.tokens, expected.tokens) and prefixes


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_timm_s_own(name: str, tmp_path: Path) -> None:
    model = untouched(name, tmp_path, **MODELS[name])
    encoder = create_encoder(f"timm:{tmp_path}")
    values = pixels(encoder)
    with torch.no_grad():
        assert same(encoder(values), theirs(model, values, -1, norm=encoder.spec.final_norm))


@pytest.mark.parametrize(
    "name", ["cait_xxs24_224", "hiera_tiny_224", "samvit_base_patch16_224", "test_efficientnet", "test_nfnet"]
)
def test_tokens_of_another_layer_are_timm_s_own(name: str, tmp_path: Path) -> None:
    model = untouched(name, tmp_path, **MODELS[name])
    encoder = create_encoder(f"timm:{tmp_path}", feature_layer=-2)
    values = pixels(encoder)
    assert not encoder.spec.final_norm
    with torch.no_grad():
        assert same(encoder(values), theirs(model, values, -2, norm=False))


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "swin_tiny_patch4_window7_224", "test_resnet"])
def test_layers_are_joined_in_the_order_asked_for(name: str, tmp_path: Path) -> None:
    model = untouched(name, tmp_path, **MODELS[name])
    encoder = create_encoder(f"timm:{tmp_path}", feature_layer=(-1, -3))
    values = pixels(encoder)
    with torch.no_grad():
        first, second = (theirs(model, values, layer, norm=False) for layer in (-1, -3))
        joined = encoder(values)
    width = first.tokens.shape[2]
    assert joined.grid == first.grid
    assert torch.equal(joined.tokens[..., :width], first.tokens)
    assert first.grid is not None
    finer = second.as_map()
    # Each coarse token averages the fine ones that it covers; where the grids agree that is each its own.
    averaged = torch.nn.functional.interpolate(finer, size=first.grid, mode="area").flatten(2).transpose(1, 2)
    assert torch.equal(joined.tokens[..., width:], averaged)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224", "mixer_s32_224"])
def test_the_norm_of_forward_features_is_the_default(name: str, tmp_path: Path) -> None:
    model = untouched(name, tmp_path, **MODELS[name])
    encoder = create_encoder(f"timm:{tmp_path}")
    values = pixels(encoder)
    with torch.no_grad():
        visual = encoder(values)
        parts = [visual.tokens] if visual.prefix is None else [visual.prefix, visual.tokens]
        assert torch.equal(torch.cat(parts, dim=1), model.forward_features(values))


@pytest.mark.parametrize(
    ("name", "size"), [("beit_base_patch16_224", (64, 32)), ("swin_tiny_patch4_window7_224", (64, 96))]
)
def test_another_size_is_resampled_by_timm_s_filter(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    untouched(name, tmp_path, **MODELS[name])
    options = {**MODELS[name], "img_size": size, "num_classes": 1000}
    overlay = {"file": str(tmp_path / "model.safetensors")}
    resized = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    encoder = create_encoder(f"timm:{tmp_path}", image_size=size)
    values = pixels(encoder)
    with torch.no_grad():
        assert same(encoder(values), theirs(resized, values, -1, norm=encoder.spec.final_norm))


@pytest.mark.parametrize("name", ["test_convnext", "samvit_base_patch16_224", "naflexvit_base_patch16_gap"])
def test_networks_that_take_any_size_are_not_told_it(name: str, tmp_path: Path) -> None:
    model = untouched(name, tmp_path, **MODELS[name])
    encoder = create_encoder(f"timm:{tmp_path}", image_size=(64, 96))
    values = pixels(encoder)
    with torch.no_grad():
        assert same(encoder(values), theirs(model, values, -1, norm=encoder.spec.final_norm))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_whole_weights_load_into_a_cut_model(kind: str, tmp_path: Path) -> None:
    model = untouched("vit_small_patch14_reg4_dinov2", tmp_path, **VIT, num_classes=7)
    if kind == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    encoder = create_encoder(f"timm:{tmp_path}", feature_layer=-2)
    values = pixels(encoder)
    with torch.no_grad():
        assert same(encoder(values), theirs(model, values, -2, norm=False))
    assert not [
        key for key in encoder.state_dict() if key.startswith(("network.head", "network.norm.", "network.blocks.3"))
    ]


@pytest.mark.parametrize("change", ["lost", "strange", "bent"])
def test_weights_of_something_else_are_refused(change: str, tmp_path: Path) -> None:
    untouched("vit_small_patch14_reg4_dinov2", tmp_path, **VIT)
    state = load_file(tmp_path / "model.safetensors")
    sentence = {
        "lost": "1 missing .blocks.1.mlp.fc1.bias",
        "strange": "1 unexpected .neck.bias",
        "bent": r"blocks.1.mlp.fc1.bias",
    }
    if change == "lost":
        del state["blocks.1.mlp.fc1.bias"]
    elif change == "strange":
        state["neck.bias"] = torch.zeros(3)
    else:
        state["blocks.1.mlp.fc1.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(VlmError, match=f"weights do not fit: .*{sentence[change]}"):
        create_encoder(f"timm:{tmp_path}")


def test_eager_attention_is_the_same_but_for_rounding(tmp_path: Path) -> None:
    untouched("vit_small_patch14_reg4_dinov2", tmp_path, **VIT)
    fused, eager = (create_encoder(f"timm:{tmp_path}", attn_implementation=way) for way in ("sdpa", "eager"))
    values = pixels(fused)
    with torch.no_grad():
        # The two sum in another order.
        torch.testing.assert_close(eager(values).tokens, fused(values).tokens, rtol=1e-5, atol=1e-5)
    ways = {module.fused_attn for module in eager.modules() if hasattr(module, "fused_attn")}
    assert ways == {False}
