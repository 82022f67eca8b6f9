"""Weights for OpenCLIP's towers that are refused: of another size, another activation, or of no CLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from connectors.errors import VlmError
from vlm_encoders.registry import create_encoder, encoder_spec

TEXT = {"context_length": 4, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1}
VISION: dict[str, dict[str, Any]] = {
    "small-vit": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "small-trunk": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
}


@pytest.fixture(autouse=True, scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Let OpenCLIP know two small towers."""
    from open_clip import factory

    folder = tmp_path_factory.mktemp("architectures")
    for name, vision in VISION.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 16, "text_cfg": TEXT, "vision_cfg": vision}))
    paths, configs = list(factory._MODEL_CONFIG_PATHS), dict(factory._MODEL_CONFIGS)
    open_clip.add_model_config(folder)
    yield
    factory._MODEL_CONFIG_PATHS[:] = paths
    factory._MODEL_CONFIGS.clear()
    factory._MODEL_CONFIGS.update(configs)


@pytest.fixture
def state() -> dict[str, Tensor]:
    """A whole small CLIP."""
    model: Any = open_clip.create_model("small-vit")
    return {key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}


def write(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, folder / "open_clip_model.safetensors")
    return folder / "open_clip_model.safetensors"


@pytest.mark.parametrize("rows", [26, 37, 20])
@pytest.mark.parametrize("size", [32, 48])
def test_a_table_of_another_size_is_refused(rows: int, size: int, state: dict[str, Tensor], tmp_path: Path) -> None:
    state["visual.positional_embedding"] = torch.zeros(rows, 32)
    file = write(tmp_path, state)
    sentence = rf"positional_embedding is \({rows}, 32\), small-vit has \(17, 32\); give"
    with pytest.raises(VlmError, match=sentence):
        create_encoder("open_clip:small-vit", pretrained=file, image_size=size)


@pytest.mark.parametrize("key", ["transformer.foo", "token_embedding.bias", "ln_final.scale", "text", "logit_scales"])
def test_keys_that_no_clip_has_are_refused(key: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    file = write(tmp_path, {**state, key: torch.zeros(2)})
    with pytest.raises(VlmError, match=rf"1 unexpected \({key}\)"):
        create_encoder("open_clip:small-vit", pretrained=file)


def test_a_head_alone_is_no_trunk(tmp_path: Path) -> None:
    file = write(tmp_path, {"visual.head.proj.weight": torch.zeros(16, 64)})
    with pytest.raises(VlmError, match="weights do not fit: none of them"):
        create_encoder("open_clip:small-trunk", pretrained=file)


@pytest.mark.parametrize(
    ("arch", "file", "config", "sentence"),
    [
        ("small-trunk", "config.json", {"architecture": "test_vit2"}, "weights of test_vit2, not of test_vit; use"),
        (
            "small-vit",
            "open_clip_config.json",
            {"model_cfg": {"quick_gelu": True}},
            "quick_gelu=True, the tower has False",
        ),
    ],
)
def test_a_folder_that_names_another_tower_is_refused(
    arch: str, file: str, config: dict[str, Any], sentence: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    write(tmp_path, state)
    (tmp_path / file).write_text(json.dumps(config))
    with pytest.raises(VlmError, match=sentence):
        create_encoder(f"open_clip:{arch}", pretrained=tmp_path)


def test_a_folder_that_agrees_is_loaded(state: dict[str, Tensor], tmp_path: Path) -> None:
    write(tmp_path, state)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    create_encoder("open_clip:small-vit", pretrained=tmp_path, quick_gelu=True)


def test_a_width_that_heads_do_not_divide_is_said() -> None:
    with torch.device("meta"), pytest.raises(VlmError, match=r"^open_clip:ViT-B-32: .*; leave the options out"):
        create_encoder("open_clip:ViT-B-32", pretrained=False, width=770)


@pytest.mark.parametrize("name", ["openclip-vit-b-32-laion2b", "tiny-digits"])
def test_the_rows_say_how_places_reach_the_network(name: str) -> None:
    assert encoder_spec(name).positions.startswith("a learned table, ")
