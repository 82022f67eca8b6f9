"""Encoders against the libraries that they wrap, with the same small random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from connectors.errors import VlmError
from vlm_encoders import registry
from vlm_encoders.encoder import Encoder
from vlm_encoders.registry import create_encoder, encoder_spec
from vlm_encoders.spec import EncoderSpec

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
}


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


@pytest.mark.parametrize("layer", [-1, -2])
def test_three_libraries_give_one_clip(layer: int, tmp_path: Path) -> None:
    whole(tmp_path)
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
    clip: Any = shake(open_clip.CLIP(512, vision, text))
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


def edit(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})


def test_timm_weights_are_loaded_strictly(tmp_path: Path) -> None:
    timm_folder(tmp_path, **TIMM_VIT, num_classes=0)
    edit(tmp_path, lambda s: {k: v for k, v in s.items() if k != "blocks.1.mlp.fc1.bias"})
    with pytest.raises(VlmError, match=r"1 missing .*blocks\.1\.mlp\.fc1\.bias"):
        create_encoder(f"timm:{tmp_path}")


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


def test_curated_swin_is_the_same_in_training_mode() -> None:
    encoder = create_encoder("swin-t-224", pretrained=False).train()
    values = pixels(224, 224)
    with torch.no_grad():
        assert torch.equal(encoder(values).tokens, encoder(values).tokens)


def test_loading_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole(tmp_path)
    capfd.readouterr()
    create_encoder(f"hf:{tmp_path}", feature_layer=-2)
    said = capfd.readouterr()
    assert said.out + said.err == ""
