"""`hf:` folders and weights of transformers' towers: what is read, loaded strictly, or refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from connectors.errors import VlmError
from vlm_encoders import registry
from vlm_encoders.encoder import Encoder
from vlm_encoders.registry import create_encoder, encoder_spec, register_encoder
from vlm_encoders.spec import EncoderSpec

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
}


SMALL_CLIP = EncoderSpec(
    name="small-clip", family="clip", backend="transformers", source="CLIPVisionModel", weights="org/small-clip",
    image_size=(32, 32), stride=8, dim=32, heads=2, mlp_dim=48, num_layers=4, num_prefix=1, feature_layer=-2,
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), options=(("hidden_act", "quick_gelu"),),
)  # fmt: skip


def shake(model: nn.Module) -> nn.Module:
    """Give every parameter, the zero-initialised ones too, a random value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def whole(folder: Path, source: str = "CLIPVisionModel", **shape: Any) -> Any:
    """Make the library's whole model, CLIP's if nothing else is said, and save it as the library does."""
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, source.replace("Model", "Config"))(**(shape or VIT))
    model: Any = shake(getattr(transformers, source)(config))
    model.save_pretrained(folder)
    return model


def pixels(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))


def sequence(encoder: Encoder, values: Tensor) -> Tensor:
    visual = encoder(values)
    return visual.tokens if visual.prefix is None else torch.cat([visual.prefix, visual.tokens], dim=1)


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    registry._registry.cache_clear()
    yield
    registry._registry.cache_clear()


def test_names_take_local_folders_and_files(tmp_path: Path, fresh_registry: None) -> None:
    model = whole(tmp_path)
    register_encoder(SMALL_CLIP)
    values = pixels(32, 32)
    expected = model(values, output_hidden_states=True).hidden_states[-2]
    for place in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
        encoder = create_encoder("small-clip", pretrained=place)
        assert torch.equal(sequence(encoder, values), expected)
        assert encoder.origin["pretrained"] == str(place)
    halves = create_encoder("small-clip", pretrained=tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in halves.parameters()} == {torch.bfloat16}


def test_options_reach_random_and_loaded_networks(tmp_path: Path) -> None:
    model = whole(tmp_path)
    values = pixels(32, 32)
    expected = model(values, output_hidden_states=True).hidden_states[-2]
    for pretrained in (True, False):
        eager = create_encoder(f"hf:{tmp_path}", pretrained=pretrained, attn_implementation="eager")
        network: Any = eager.get_submodule("network")
        assert network.config._attn_implementation == "eager"
        if pretrained:
            torch.testing.assert_close(sequence(eager, values), expected, rtol=1e-5, atol=1e-5)
        assert eager.origin["attn_implementation"] == "eager"


def test_another_activation_is_another_checkpoint(tmp_path: Path, fresh_registry: None) -> None:
    whole(tmp_path)
    register_encoder(dataclasses.replace(SMALL_CLIP, options=(("hidden_act", "gelu"),)))
    with pytest.raises(VlmError, match="hidden_act quick_gelu, the encoder has gelu"):
        create_encoder("small-clip", pretrained=tmp_path)


def fake_hub(root: Path, repo: str) -> Path:
    """Make the folders of the hub's cache for one repository and give its snapshot."""
    home = root / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0123abc")
    return snapshot


@pytest.mark.filterwarnings("ignore:.*the cache lacks its preprocessor_config")
def test_the_hub_s_cache_serves_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_registry: None) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    register_encoder(SMALL_CLIP, dataclasses.replace(SMALL_CLIP, name="nowhere", weights="org/nowhere"))
    model = whole(fake_hub(tmp_path, "org/small-clip"))
    values = pixels(32, 32)
    expected = model(values, output_hidden_states=True).hidden_states[-2]
    for name in ("small-clip", "hf:org/small-clip"):
        assert torch.equal(sequence(create_encoder(name), values), expected)
    sentence = "no network and no local weights for 'nowhere'; pass pretrained=False or set HF_HOME"
    with pytest.raises(VlmError, match=sentence):
        create_encoder("nowhere")
    with pytest.raises(VlmError, match="no network and no local weights for 'hf:org/nowhere'"):
        encoder_spec("hf:org/nowhere")


def test_without_a_network_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []

    class Dead:
        def head(self, url: str, timeout: float) -> None:
            calls.append(url)
            raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Dead)
    for name in ("clip-vit-b-32", "swin-t-224", "openclip-vit-b-32-laion2b"):
        with pytest.raises(VlmError, match=f"no network and no local weights for '{name}'"):
            create_encoder(name)
    assert len(calls) == 3


def edit(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda s: {k: v for k, v in s.items() if "layers.1.mlp.fc1.bias" not in k},
            "1 missing .*layers.1.mlp.fc1.bias",
        ),
        (lambda s: {**s, "surprise.weight": torch.ones(2)}, "1 unexpected .*surprise.weight"),
        (lambda s: {f"vision_tower.{k}": v for k, v in s.items()}, "missing .*, .* unexpected"),
        (lambda s: {k: v[..., :5].clone() if "layers.0.mlp.fc1" in k else v for k, v in s.items()}, "small-clip"),
    ],
)
def test_weights_are_loaded_strictly(change: Any, sentence: str, tmp_path: Path, fresh_registry: None) -> None:
    whole(tmp_path)
    register_encoder(SMALL_CLIP)
    edit(tmp_path, change)
    with pytest.raises(VlmError, match=sentence):
        create_encoder("small-clip", pretrained=tmp_path)


def test_a_missing_norm_matters_only_where_it_is_used(tmp_path: Path, fresh_registry: None) -> None:
    whole(tmp_path)
    register_encoder(SMALL_CLIP)
    edit(tmp_path, lambda s: {k: v for k, v in s.items() if "post_layernorm" not in k})
    create_encoder("small-clip", pretrained=tmp_path)
    with pytest.raises(VlmError, match=r"2 missing .*post_layernorm"):
        create_encoder("small-clip", pretrained=tmp_path, final_norm=True)


def test_folders_that_hold_no_encoder_are_refused(tmp_path: Path, fresh_registry: None) -> None:
    register_encoder(SMALL_CLIP)
    with pytest.raises(VlmError, match="does not exist"):
        create_encoder("small-clip", pretrained=tmp_path / "no")
    with pytest.raises(VlmError, match=r"has no config\.json"):
        create_encoder("small-clip", pretrained=tmp_path)
    with pytest.raises(VlmError, match=r"has no config\.json"):
        create_encoder(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(VlmError, match="is no JSON"):
        create_encoder(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    with pytest.raises(VlmError, match="model_type 'clip_text_model'"):
        create_encoder(f"hf:{tmp_path}")
    whole(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(VlmError, match="holds no weights"):
        create_encoder(f"hf:{tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(VlmError, match="cannot be read"):
        create_encoder(f"hf:{tmp_path}")


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, fresh_registry: None) -> None:
    whole(tmp_path)
    register_encoder(dataclasses.replace(SMALL_CLIP, dim=64))
    with pytest.raises(VlmError, match="hidden_size 32, the encoder has 64"):
        create_encoder("small-clip", pretrained=tmp_path)
    with pytest.raises(VlmError, match="hidden_size 32, the encoder has 768"):
        create_encoder("clip-vit-b-32", pretrained=tmp_path)


def test_the_folder_s_preprocessor_is_honoured(tmp_path: Path) -> None:
    from transformers import BitImageProcessorPil, SiglipImageProcessorPil

    whole(tmp_path, "Dinov2Model", **{**VIT, "mlp_ratio": 2})
    processor = BitImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(tmp_path)
    spec = encoder_spec(f"hf:{tmp_path}")
    assert (spec.resize, spec.image_size, spec.crop_pct) == ("crop", (32, 32), 0.8)
    assert spec.mean == (0.1, 0.2, 0.3)
    SiglipImageProcessorPil(size={"height": 16, "width": 24}, resample=2).save_pretrained(tmp_path)
    spec = encoder_spec(f"hf:{tmp_path}")
    assert (spec.resize, spec.image_size, spec.interpolation) == ("squash", (16, 24), "bilinear")


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        ({}, {"resize": "squash", "image_size": (32, 32), "interpolation": "bilinear", "mean": (0.5, 0.5, 0.5)}),
        ({"size": 48, "resample": 3}, {"resize": "squash", "image_size": (48, 48), "interpolation": "bicubic"}),
        (
            {"size": {"shortest_edge": 40}, "resample": 1},
            {"resize": "crop", "crop_pct": 1.0, "interpolation": "lanczos"},
        ),
        (
            {"size": {"height": 40, "width": 40}, "do_center_crop": True, "crop_size": 32},
            {"resize": "squash", "crop_pct": 0.8},
        ),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, {"resize": "crop", "crop_pct": 0.875}),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, {"resize": "squash", "crop_pct": 1.0}),
        ({"do_normalize": False, "image_mean": [0.1] * 3}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
        ({"image_std": [0.1, 0.2, 0.3]}, {"std": (0.1, 0.2, 0.3), "mean": (0.5, 0.5, 0.5)}),
    ],
)
def test_pixels_are_made_as_the_folder_says(said: dict[str, Any], fields: dict[str, Any], tmp_path: Path) -> None:
    whole(tmp_path, "ViTModel", **VIT)
    for content, name in ((said, "preprocessor_config.json"), ({"image_processor": said}, "processor_config.json")):
        (tmp_path / name).write_text(json.dumps(content))
        spec = encoder_spec(f"hf:{tmp_path}")
        assert {field: getattr(spec, field) for field in fields} == fields
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"do_rescale": False}, "leaves pixels from 0 to 255"),
        ({"resample": 5}, r"resample 5 of its preprocessor is none of 0 \(nearest\)"),
    ],
)
def test_pixels_that_cannot_be_made_are_refused(said: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    whole(tmp_path, "ViTModel", **VIT)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(VlmError, match=sentence):
        encoder_spec(f"hf:{tmp_path}")


@pytest.mark.parametrize(("entry", "value"), [("layer_norm_eps", 0.1), ("attention_dropout", 0.5)])
def test_entries_that_change_tokens_must_agree(entry: str, value: float, tmp_path: Path, fresh_registry: None) -> None:
    model = whole(tmp_path, **{**VIT, entry: value})
    register_encoder(SMALL_CLIP)
    if entry == "attention_dropout":
        # It matters in training alone, where the row's own counts.
        encoder = create_encoder("small-clip", pretrained=tmp_path)
        values = pixels(32, 32)
        assert torch.equal(sequence(encoder, values), model(values, output_hidden_states=True).hidden_states[-2])
        return
    with pytest.raises(VlmError, match=r"has layer_norm_eps 0\.1, the encoder has 1e-05"):
        create_encoder("small-clip", pretrained=tmp_path)


def test_a_folder_s_name_decides_nothing(tmp_path: Path) -> None:
    for kind in ("ViTModel", "SiglipVisionModel"):
        folder = tmp_path / f"clip-dinov2-sam-{kind.lower()[:3]}"
        whole(folder, kind, **VIT)
        assert encoder_spec(f"hf:{folder}").source == kind


def test_an_adapter_is_not_applied_in_silence(tmp_path: Path, fresh_registry: None) -> None:
    model = whole(tmp_path)
    register_encoder(SMALL_CLIP)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(VlmError, match="holds an adapter, which is not applied; merge it first"):
        create_encoder(f"hf:{tmp_path}")
    values = pixels(32, 32)
    expected = model(values, output_hidden_states=True).hidden_states[-2]
    encoder = create_encoder("small-clip", pretrained=tmp_path / "model.safetensors")
    assert torch.equal(sequence(encoder, values), expected)


def test_folders_are_read_as_files_are(tmp_path: Path) -> None:
    model = whole(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    values = pixels(32, 32)
    expected = model(values, output_hidden_states=True).hidden_states[-2]
    encoder = create_encoder(f"hf:{tmp_path}")
    (tmp_path / "weights.safetensors").write_bytes(bytes((tmp_path / "weights.safetensors").stat().st_size))
    assert torch.equal(sequence(encoder, values), expected)
    (tmp_path / "weights.safetensors").unlink()
    torch.save({"a": Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(VlmError, match=r"pytorch_model\.bin' cannot be read: "):
        create_encoder(f"hf:{tmp_path}")


def test_cut_layers_are_not_read(tmp_path: Path) -> None:
    whole(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    places = {key: "cut.safetensors" if "layers.3." in key else "kept.safetensors" for key in state}
    for name in set(places.values()):
        save_file({key: value for key, value in state.items() if places[key] == name}, tmp_path / name)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "cut.safetensors").write_bytes(b"no safetensors")
    assert create_encoder(f"hf:{tmp_path}").spec.feature_layer == -2
    with pytest.raises(VlmError, match=r"cut\.safetensors' cannot be read"):
        create_encoder(f"hf:{tmp_path}", feature_layer=-1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"torch_dtype": "float16"}, "'torch_dtype' is no option of CLIPVisionModel; use dtype="),
        ({"return_dict": False}, "CLIPVisionModel has no option 'return_dict'"),
        ({"output_attentions": True}, "CLIPVisionModel has no option 'output_attentions'"),
        ({"to_dict": 1}, "CLIPVisionModel has no option 'to_dict'"),
        ({"hidden_act": "gelux"}, "CLIPVisionModel cannot be built so: it does not know 'gelux'; mend the option"),
        ({"hidden_act": ("gelu",)}, "CLIPVisionModel cannot be built so: .*; mend the option"),
    ],
)
def test_options_are_the_class_s_own(options: dict[str, Any], sentence: str, fresh_registry: None) -> None:
    register_encoder(SMALL_CLIP)
    with pytest.raises(VlmError, match=f"^small-clip: {sentence}"):
        create_encoder("small-clip", pretrained=False, **options)


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"model_type": ["vit"]}, r"model_type \['vit'\] of its config\.json is no word"),
        ({"hidden_size": "32"}, r"transformers cannot read its config\.json: .*; repair it"),
        ({"num_attention_heads": 0}, "(its config|transformers|ViTModel) .*"),
        ({"image_size": None}, "(its config|transformers) .*; repair it"),
        ({"hidden_act": "gelux"}, "ViTModel cannot be built so: it does not know 'gelux'; mend the option"),
        ({"hidden_act": ["gelu"]}, r"transformers cannot read its config\.json: .*; repair it"),
    ],
)
def test_broken_configs_are_told_in_a_sentence(entries: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", **VIT, **entries}))
    with pytest.raises(VlmError, match=f"^hf:{tmp_path}: {sentence}"):
        create_encoder(f"hf:{tmp_path}", pretrained=False)
