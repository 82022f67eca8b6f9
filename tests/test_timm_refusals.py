"""Weights for models of timm: what is refused, with what sentence, and what is never adapted in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from connectors.errors import VlmError
from vlm_encoders.encoders import weights
from vlm_encoders.encoders.timm_weights import fit_weights, read_weights
from vlm_encoders.registry import create_encoder, encoder_spec

NAME = "timm:test_vit"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """The weights of a small model, all of them drawn at random."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("test_vit", num_classes=0)
    return {key: torch.randn_like(tensor) * 0.02 for key, tensor in model.state_dict().items()}


def write(folder: Path, state: dict[str, Tensor]) -> Path:
    file = folder / "weights.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
    return file


def test_a_revision_reaches_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot(repo: str, _owner: str, *, revision: str | None, **_rest: object) -> Path:
        asked.append((repo, revision))
        raise VlmError("enough")

    monkeypatch.setattr(weights, "snapshot", snapshot)
    for name in ("timm:test_vit.r160_in1k", "open_clip:ViT-B-32/laion2b_s34b_b79k"):
        with pytest.raises(VlmError, match="enough"):
            create_encoder(name, revision="v2")
    assert [revision for _, revision in asked] == ["v2", "v2"]
    assert asked[0][0] == "timm/test_vit.r160_in1k"


def test_an_empty_file_is_no_reason_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(VlmError, match=f"^{NAME}: weights .* holds no tensors"):
        create_encoder(NAME, pretrained=write(tmp_path, {}))
    unused: Any = None
    with pytest.raises(VlmError, match=f"^{NAME}: weights do not fit: none of them"):
        fit_weights(nn.Identity(), encoder_spec(NAME), unused, {}, pretrained=True)


def test_weights_of_the_own_size_are_resampled_and_no_others(state: dict[str, Tensor], tmp_path: Path) -> None:
    tiny = "vit_tiny_patch16_224"
    file = write(tmp_path, timm.create_model(tiny, num_classes=0).state_dict())
    encoder = create_encoder(f"timm:{tiny}", pretrained=file, image_size=256, feature_layer=-11)
    assert encoder.get_parameter("network.pos_embed").shape == (1, 1 + 16 * 16, 192)
    larger = timm.create_model(tiny, num_classes=0, img_size=256).state_dict()
    write(tmp_path, larger)
    for size in (224, 256):
        with pytest.raises(VlmError, match=rf"pos_embed is \(1, 257, 192\), {tiny} has \(1, 197, 192\); give"):
            create_encoder(f"timm:{tiny}", pretrained=file, image_size=size)
    write(tmp_path, {**state, "pos_embed": torch.zeros(1, 145, 64)})
    with pytest.raises(VlmError, match=r"pos_embed is \(1, 145, 64\), test_vit has \(1, 101, 64\); give"):
        create_encoder(NAME, pretrained=file, image_size=192)


@pytest.mark.parametrize(
    ("key", "shape", "sentence"),
    [
        ("pos_embed", (1, 150, 64), r"pos_embed is \(1, 150, 64\), test_vit has \(1, 101, 64\)"),
        ("patch_embed.proj.weight", (64, 3, 8, 8), r"\(64, 3, 8, 8\), test_vit has \(64, 3, 16, 16\)"),
    ],
)
def test_tables_and_kernels_of_another_shape_are_refused(
    key: str, shape: tuple[int, ...], sentence: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(VlmError, match=f"^{NAME}: weights do not fit: .*{sentence}; give"):
        create_encoder(NAME, pretrained=write(tmp_path, {**state, key: torch.zeros(shape)}))


@pytest.mark.parametrize("size", [(40, 40), (24, 24)])
def test_tables_of_another_layout_are_refused_too(size: tuple[int, int], tmp_path: Path) -> None:
    import open_clip

    tower = open_clip.transformer.VisionTransformer(size[0], 8, 32, 4, 2, 4.0, output_dim=16)
    state = {f"visual.{key}": tensor for key, tensor in tower.state_dict().items()}
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    with pytest.raises(VlmError, match=r"visual.positional_embedding is .* not the model's own size; give"):
        create_small("vit_base_patch16_clip_224", shape, write(tmp_path, state), tmp_path)


def create_small(name: str, shape: dict[str, Any], file: Path, folder: Path) -> Any:
    """Build a model of these arguments from a file: its folder tells them."""
    (folder / "config.json").write_text(json.dumps({"architecture": name, "model_args": shape}))
    file.rename(folder / "model.safetensors")
    return create_encoder(f"timm:{folder}")


def test_a_folder_of_another_architecture_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    model = timm.create_model("vit_base_patch32_clip_quickgelu_224", embed_dim=32, depth=1, num_heads=2)
    save_for_hf(model, tmp_path, safe_serialization=True)
    sentence = "holds weights of vit_base_patch32_clip_quickgelu_224, not of vit_base_patch32_clip_224; use"
    with pytest.raises(VlmError, match=sentence):
        create_encoder("timm:vit_base_patch32_clip_224.openai", pretrained=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit.some_tag"}))
    write(tmp_path, state).replace(tmp_path / "model.safetensors")
    assert create_encoder(NAME, pretrained=tmp_path).spec.name == NAME


def test_weights_that_no_hub_holds_are_named() -> None:
    spec = encoder_spec("timm:gcvit_xxtiny.in1k")
    unused: Any = None
    with pytest.raises(VlmError, match=r"on no hub; download https://github.com/.*\.pth and pass pretrained=FILE"):
        read_weights(spec, unused, pretrained=True)


def test_a_folder_s_own_pixels_go_before_the_correction(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architecture": "vit_base_patch16_siglip_224",
                "pretrained_cfg": {"input_size": [3, 224, 224], "crop_pct": 0.8, "crop_mode": "center"},
            }
        )
    )
    spec = encoder_spec(f"timm:{tmp_path}")
    assert (spec.resize, spec.crop_pct) == ("crop", 0.8)


def test_what_timm_keeps_fixed_stays_fixed_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def fixed(*args: Any, **options: Any) -> nn.Module:
        model: Any = real(*args, **options)
        model.pos_embed.requires_grad_(requires_grad=False)
        return model

    monkeypatch.setattr(timm, "create_model", fixed)
    model: Any = fixed("test_vit").eval()
    model.pos_embed.data.normal_()
    save_for_hf(model, tmp_path, safe_serialization=True)
    encoder = create_encoder(f"timm:{tmp_path}")
    pixels = torch.randn(1, 3, 160, 160)
    names = [name for name, _ in encoder.named_parameters()]
    assert "network.pos_embed" not in names
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert torch.equal(
        encoder.state_dict()["network.pos_embed"], load_file(tmp_path / "model.safetensors")["pos_embed"]
    )
    assert torch.equal(encoder(pixels).tokens, model.forward_features(pixels)[:, 1:])
