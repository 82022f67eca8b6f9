"""Encoders against the libraries that they wrap, with the same small random weights."""

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
DINO: dict[str, Any] = {**VIT, "mlp_ratio": 2}
DINO.pop("intermediate_size")
SAM: dict[str, Any] = {
    "hidden_size": 32,
    "mlp_dim": 64,
    "output_channels": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 64,
    "window_size": 3,
    "global_attn_indexes": [1],
}
SWIN: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 2, 2],
    "num_heads": [1, 2, 4],
    "window_size": 4,
}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPVisionModel", {**VIT, "hidden_act": "quick_gelu"}),
    "siglip": ("SiglipVisionModel", VIT),
    "dinov2": ("Dinov2Model", DINO),
    "dinov2-reg": ("Dinov2WithRegistersModel", {**DINO, "num_register_tokens": 3}),
    "swin": ("SwinModel", SWIN),
    "sam": ("SamVisionModel", SAM),
}
PREFIX = {"clip": 1, "dinov2": 1, "dinov2-reg": 4}
VITS = ("clip", "siglip", "dinov2", "dinov2-reg")


def shake(model: nn.Module) -> nn.Module:
    """Give every parameter, the zero-initialised ones too, a random value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def whole(kind: str, folder: Path) -> Any:
    """Make the library's whole model and save it as the library does."""
    import transformers

    source, shape = SMALL[kind]
    torch.manual_seed(1)
    model: Any = shake(getattr(transformers, source)(getattr(transformers, source.replace("Model", "Config"))(**shape)))
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


@pytest.mark.parametrize("layer", [-1, -2, -4])
@pytest.mark.parametrize("kind", VITS)
def test_tokens_are_the_hidden_states_of_the_whole_model(kind: str, layer: int, tmp_path: Path) -> None:
    model = whole(kind, tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}", feature_layer=layer, final_norm=False)
    values = pixels(32, 32)
    expected = model(values, output_hidden_states=True).hidden_states[layer]
    assert torch.equal(sequence(encoder, values), expected)
    assert encoder.spec.num_prefix == PREFIX.get(kind, 0)
    assert len(encoder.blocks()) == 4 + 1 + layer


@pytest.mark.parametrize("kind", VITS)
def test_the_final_norm_is_the_model_s_own(kind: str, tmp_path: Path) -> None:
    model = whole(kind, tmp_path)
    values = pixels(32, 32)
    norm = model.post_layernorm if kind in {"clip", "siglip"} else model.layernorm
    states = model(values, output_hidden_states=True).hidden_states
    for layer in (-1, -3):
        encoder = create_encoder(f"hf:{tmp_path}", feature_layer=layer, final_norm=True)
        assert torch.equal(sequence(encoder, values), norm(states[layer]))


@pytest.mark.parametrize("kind", ["siglip", "dinov2", "dinov2-reg", "swin"])
def test_the_default_is_last_hidden_state(kind: str, tmp_path: Path) -> None:
    model = whole(kind, tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}")
    values = pixels(*encoder.spec.image_size)
    assert torch.equal(sequence(encoder, values), model(values).last_hidden_state)


def test_clip_s_default_is_llava_s(tmp_path: Path) -> None:
    model = whole("clip", tmp_path)
    values = pixels(32, 32)
    visual = create_encoder(f"hf:{tmp_path}")(values)
    assert torch.equal(visual.tokens, model(values, output_hidden_states=True).hidden_states[-2][:, 1:])


def test_sam_gives_its_neck(tmp_path: Path) -> None:
    model = whole("sam", tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}")
    values = pixels(64, 64)
    assert torch.equal(encoder(values).as_map(), model(values).last_hidden_state)
    assert encoder.token_spec.grid == (8, 8)
    assert encoder.token_spec.dim == 16


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2-reg"])
def test_other_sizes_are_the_library_s_interpolation(kind: str, tmp_path: Path) -> None:
    model = whole(kind, tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}", image_size=(48, 64), feature_layer=-2)
    values = pixels(48, 64)
    flag = {} if kind == "dinov2-reg" else {"interpolate_pos_encoding": True}
    expected = model(values, output_hidden_states=True, **flag).hidden_states[-2]
    assert torch.equal(sequence(encoder, values), expected)
    assert encoder.token_spec.grid == (6, 8)


@pytest.mark.parametrize("kind", SMALL)
def test_tokens_run_row_by_row(kind: str, tmp_path: Path) -> None:
    whole(kind, tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}")
    side, stride = encoder.spec.image_size[0], encoder.spec.stride
    blank = torch.zeros(1, 3, side, side)
    columns = side // stride
    for row, column in ((0, columns - 1), (columns - 1, 0), (1, 2)):
        hot = blank.clone()
        hot[:, :, row * stride : (row + 1) * stride, column * stride : (column + 1) * stride] = 30
        change = (encoder(hot).tokens - encoder(blank).tokens).norm(dim=2)
        found = divmod(int(change.argmax()), columns)
        # SAM's neck is a 3 x 3 convolution: it moves the peak by up to one token.
        reach = 1 if kind == "sam" else 0
        assert abs(found[0] - row) <= reach
        assert abs(found[1] - column) <= reach


def test_the_prefix_is_cls_then_registers(tmp_path: Path) -> None:
    whole("dinov2-reg", tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}")
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


@pytest.mark.parametrize("layer", [-1, -2])
def test_three_libraries_give_one_clip(layer: int, tmp_path: Path) -> None:
    whole("clip", tmp_path)
    ours = create_encoder(f"hf:{tmp_path}", feature_layer=layer, final_norm=False)
    base = dataclasses.replace(ours.spec, weights=None)
    state = {key.removeprefix("network."): value for key, value in ours.state_dict().items()}
    values = pixels(32, 32)
    timm_options = {"embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 1.5, "patch_size": 8, "img_size": 32}
    timm_spec = dataclasses.replace(
        base, backend="timm", source="vit_base_patch16_clip_quickgelu_224", options=tuple(timm_options.items())
    )
    clip_options = {"width": 32, "head_width": 16, "mlp_ratio": 1.5, "patch_size": 8, "quick_gelu": True}
    clip_spec = dataclasses.replace(base, backend="open_clip", source="ViT-B-32", options=tuple(clip_options.items()))
    expected = sequence(ours, values)
    for spec, rename in ((timm_spec, _to_timm), (clip_spec, _to_open_clip)):
        theirs = registry._load(registry._BACKENDS[spec.backend]).build(spec, pretrained=False, dtype=torch.float32)
        theirs.network.load_state_dict(rename(state))
        theirs.eval()
        assert len(theirs.blocks()) == len(ours.blocks())
        torch.testing.assert_close(sequence(theirs, values), expected, rtol=1e-5, atol=1e-5)


def _fused(state: dict[str, Tensor], layer: str, kind: str) -> Tensor:
    return torch.cat([state[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"])


def _to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    new = {
        "cls_token": state["embeddings.class_embedding"][None, None],
        "pos_embed": state["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": state["embeddings.patch_embedding.weight"],
    }
    parts = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj", "mlp.fc1": "mlp.fc1"}
    return _blocks(state, new, {**parts, "mlp.fc2": "mlp.fc2"}, "norm_pre", "blocks", "attn.qkv.")


def _to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    new = {
        "class_embedding": state["embeddings.class_embedding"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "conv1.weight": state["embeddings.patch_embedding.weight"],
    }
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc"}
    blocks = "transformer.resblocks"
    return _blocks(state, new, {**parts, "mlp.fc2": "mlp.c_proj"}, "ln_pre", blocks, "attn.in_proj_")


def _blocks(
    state: dict[str, Tensor], new: dict[str, Tensor], parts: dict[str, str], norm: str, blocks: str, fused: str
) -> dict[str, Tensor]:
    depth = len({key.split(".")[2] for key in state if key.startswith("encoder.layers.")})
    for kind in ("weight", "bias"):
        new[f"{norm}.{kind}"] = state[f"pre_layrnorm.{kind}"]
        for index in range(depth):
            layer = f"encoder.layers.{index}"
            new[f"{blocks}.{index}.{fused}{kind}"] = _fused(state, layer, kind)
            new |= {f"{blocks}.{index}.{to}.{kind}": state[f"{layer}.{part}.{kind}"] for part, to in parts.items()}
    return new


def timm_folder(folder: Path, name: str = "vit_tiny_patch16_224", **model_args: Any) -> Any:
    """Save a small random model of timm with its config, as timm does."""
    import timm
    from timm.models import save_for_hf

    model = shake(timm.create_model(name, **model_args))
    save_for_hf(model, folder, model_args=model_args, safe_serialization=True)
    return model


TIMM_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "model_args"),
    [
        ("vit_tiny_patch16_224", {**TIMM_VIT, "num_classes": 5}),
        ("vit_tiny_patch16_224", {**TIMM_VIT, "num_classes": 0, "class_token": False, "global_pool": ""}),
        ("vit_base_patch16_siglip_224", {**TIMM_VIT, "num_classes": 0}),
        ("vit_small_patch14_reg4_dinov2", {**TIMM_VIT, "num_classes": 0}),
        ("samvit_base_patch16_224", {**TIMM_VIT, "num_classes": 0, "global_attn_indexes": [1], "window_size": 2}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "embed_dim": 12, "depths": [2, 2, 2, 2], "window_size": 2}),
    ],
)
def test_timm_folders_give_timm_s_own_tokens(name: str, model_args: dict[str, Any], tmp_path: Path) -> None:
    model = timm_folder(tmp_path, name, **model_args)
    encoder = create_encoder(f"timm:{tmp_path}")
    values = pixels(*encoder.spec.image_size)
    features = model.forward_features(values)
    if name.startswith("samvit"):
        features = features.permute(0, 2, 3, 1)
    assert torch.equal(sequence(encoder, values), features.reshape(2, -1, features.shape[-1]))
    heads = ("head", "attn_pool", "fc_norm")
    assert not [key for key, _ in encoder.named_parameters() if any(head in key for head in heads)]


def test_timm_s_layers_are_cut_before_they_are_built(tmp_path: Path) -> None:
    model = timm_folder(tmp_path, **TIMM_VIT, num_classes=0)
    values = pixels(32, 32)
    for layer in (-1, -3):
        encoder = create_encoder(f"timm:{tmp_path}", feature_layer=layer, final_norm=False)
        (expected,) = model.forward_intermediates(
            values, indices=[layer], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
        visual = encoder(values)
        assert torch.equal(visual.tokens, expected[0])
        assert torch.equal(visual.prefix, expected[1])
        assert not [key for key in encoder.state_dict() if key.startswith(f"network.blocks.{5 + layer}.")]


def test_timm_resamples_for_another_size(tmp_path: Path) -> None:
    model = timm_folder(tmp_path, **TIMM_VIT, num_classes=0)
    encoder = create_encoder(f"timm:{tmp_path}", image_size=(48, 32))
    model.set_input_size(img_size=(48, 32))
    values = pixels(48, 32)
    assert torch.equal(sequence(encoder, values), model.forward_features(values))


def test_open_clip_loads_a_whole_checkpoint(tmp_path: Path) -> None:
    import open_clip

    vision = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 4, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1}
    clip = shake(open_clip.CLIP(512, vision, text))
    save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    spec = EncoderSpec(
        name="small-open-clip", family="clip", backend="open_clip", source="ViT-B-32", weights=None,
        image_size=(32, 32), stride=8, dim=32, num_layers=3, num_prefix=1, feature_layer=-2,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), options=(("width", 32), ("head_width", 16), ("patch_size", 8)),
    )  # fmt: skip
    backend = registry._load(registry._BACKENDS["open_clip"])
    values = pixels(32, 32)
    for layer in (-1, -2):
        encoder = backend.build(spec.at_layer(layer), pretrained=str(tmp_path), dtype=torch.float32)
        found = clip.visual.forward_intermediates(
            values, indices=[layer], output_fmt="NLC", output_extra_tokens=True, intermediates_only=True
        )
        visual = encoder(values)
        assert torch.equal(visual.tokens, found["image_intermediates"][0])
        assert torch.equal(visual.prefix, found["image_intermediates_prefix"][0])
    other = dataclasses.replace(spec, options=(*spec.options, ("mlp_ratio", 2.0)))
    with pytest.raises(VlmError, match="size mismatch"):
        backend.build(other, pretrained=str(tmp_path), dtype=torch.float32)


@pytest.mark.parametrize("kind", ["clip", "siglip", "sam"])
def test_whole_checkpoints_give_their_vision_tower(kind: str, tmp_path: Path) -> None:
    import transformers

    name = {"clip": "CLIP", "siglip": "Siglip", "sam": "Sam"}[kind]
    config: Any = getattr(transformers, f"{name}Config")(vision_config=SMALL[kind][1])
    if kind == "sam":
        config.prompt_encoder_config.hidden_size = config.mask_decoder_config.hidden_size = 16
    else:
        config.text_config.num_hidden_layers = 1
    model: Any = shake(getattr(transformers, f"{name}Model")(config))
    model.save_pretrained(tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}")
    values = pixels(*encoder.spec.image_size)
    tower = model.vision_encoder if kind == "sam" else model.vision_model
    states = tower(values, output_hidden_states=True)
    if kind == "sam":
        assert torch.equal(encoder(values).as_map(), states.last_hidden_state)
    else:
        expected = states.hidden_states[-2] if kind == "clip" else states.last_hidden_state
        assert torch.equal(sequence(encoder, values), expected)


SMALL_CLIP = EncoderSpec(
    name="small-clip", family="clip", backend="transformers", source="CLIPVisionModel", weights="org/small-clip",
    image_size=(32, 32), stride=8, dim=32, heads=2, mlp_dim=48, num_layers=4, num_prefix=1, feature_layer=-2,
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), options=(("hidden_act", "quick_gelu"),),
)  # fmt: skip


def test_names_take_local_folders_and_files(tmp_path: Path, fresh_registry: None) -> None:
    model = whole("clip", tmp_path)
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
    model = whole("clip", tmp_path)
    values = pixels(32, 32)
    expected = model(values, output_hidden_states=True).hidden_states[-2]
    for pretrained in (True, False):
        eager = create_encoder(f"hf:{tmp_path}", pretrained=pretrained, attn_implementation="eager")
        assert eager.get_submodule("network").config._attn_implementation == "eager"
        if pretrained:
            torch.testing.assert_close(sequence(eager, values), expected, rtol=1e-5, atol=1e-5)
        assert eager.origin["attn_implementation"] == "eager"


def test_another_activation_is_another_checkpoint(tmp_path: Path, fresh_registry: None) -> None:
    whole("clip", tmp_path)
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


def test_the_hub_s_cache_serves_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_registry: None) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    register_encoder(SMALL_CLIP, dataclasses.replace(SMALL_CLIP, name="nowhere", weights="org/nowhere"))
    model = whole("clip", fake_hub(tmp_path, "org/small-clip"))
    values = pixels(32, 32)
    expected = model(values, output_hidden_states=True).hidden_states[-2]
    for name in ("small-clip", "hf:org/small-clip"):
        assert torch.equal(sequence(create_encoder(name), values), expected)
    sentence = "no network and no local weights for 'nowhere'; pass pretrained=False or set HF_HOME"
    with pytest.raises(VlmError, match=sentence):
        create_encoder("nowhere")
    with pytest.raises(VlmError, match="no network and no local weights for 'hf:org/nowhere'"):
        encoder_spec("hf:org/nowhere")
    vit = timm_folder(fake_hub(tmp_path, "timm/small"), **TIMM_VIT, num_classes=0)
    register_encoder(
        dataclasses.replace(
            SMALL_CLIP, name="small-timm", backend="timm", source="vit_tiny_patch16_224", weights="timm/small",
            feature_layer=-1, final_norm=True, options=tuple(TIMM_VIT.items()),
        )
    )  # fmt: skip
    assert torch.equal(sequence(create_encoder("small-timm"), values), vit.forward_features(values))


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
    whole("clip", tmp_path)
    register_encoder(SMALL_CLIP)
    edit(tmp_path, change)
    with pytest.raises(VlmError, match=sentence):
        create_encoder("small-clip", pretrained=tmp_path)


def test_a_missing_norm_matters_only_where_it_is_used(tmp_path: Path, fresh_registry: None) -> None:
    whole("clip", tmp_path)
    register_encoder(SMALL_CLIP)
    edit(tmp_path, lambda s: {k: v for k, v in s.items() if "post_layernorm" not in k})
    create_encoder("small-clip", pretrained=tmp_path)
    with pytest.raises(VlmError, match=r"2 missing .*post_layernorm"):
        create_encoder("small-clip", pretrained=tmp_path, final_norm=True)


def test_timm_weights_are_loaded_strictly(tmp_path: Path) -> None:
    timm_folder(tmp_path, **TIMM_VIT, num_classes=0)
    edit(tmp_path, lambda s: {k: v for k, v in s.items() if k != "blocks.1.mlp.fc1.bias"})
    with pytest.raises(VlmError, match=r"Missing key.*blocks\.1\.mlp\.fc1\.bias"):
        create_encoder(f"timm:{tmp_path}")


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
    whole("clip", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(VlmError, match="holds no weights"):
        create_encoder(f"hf:{tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(VlmError, match="cannot be loaded"):
        create_encoder(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"has no config\.json; timm's save_for_hf writes one"),
        (b"{", "is no JSON: .*; repair the file"),
        (b"\xff", "is no JSON: .*; repair the file"),
        (b"[]", "holds no JSON object"),
        (b"{}", "names no timm architecture"),
    ],
)
def test_a_timm_folder_s_broken_config_is_refused(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(VlmError, match=f"^timm:{tmp_path}: .*{sentence}"):
        encoder_spec(f"timm:{tmp_path}")


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, fresh_registry: None) -> None:
    whole("clip", tmp_path)
    register_encoder(dataclasses.replace(SMALL_CLIP, dim=64))
    with pytest.raises(VlmError, match="hidden_size 32, the encoder has 64"):
        create_encoder("small-clip", pretrained=tmp_path)
    with pytest.raises(VlmError, match="hidden_size 32, the encoder has 768"):
        create_encoder("clip-vit-b-32", pretrained=tmp_path)


def test_sam_weights_fit_one_size(tmp_path: Path) -> None:
    whole("sam", tmp_path)
    with pytest.raises(VlmError, match=r"fit views of \(64, 64\) px alone"):
        create_encoder(f"hf:{tmp_path}", image_size=128)
    random = create_encoder(f"hf:{tmp_path}", image_size=128, pretrained=False)
    assert random(pixels(128, 128)).grid == (16, 16)


def test_the_folder_s_preprocessor_is_honoured(tmp_path: Path) -> None:
    from transformers import BitImageProcessorPil, SiglipImageProcessorPil

    whole("dinov2", tmp_path)
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


def test_curated_swin_is_the_same_in_training_mode() -> None:
    encoder = create_encoder("swin-t-224", pretrained=False).train()
    values = pixels(224, 224)
    with torch.no_grad():
        assert torch.equal(encoder(values).tokens, encoder(values).tokens)
