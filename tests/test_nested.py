"""Vision towers inside checkpoints of whole VLMs: found by config, loaded by key map, equal to the VLM's own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from connectors.errors import VlmError
from vlm_encoders.encoders.nested import NestedTower, find_tower, load_nested
from vlm_encoders.registry import create_encoder, encoder_spec

VIT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 7,
}  # fmt: skip
CLIP = {"model_type": "clip_vision_model", **VIT}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **VIT}
INTERN = {"model_type": "internvl_vision", **VIT, "image_size": [28, 28], "patch_size": [7, 7]}
PIXTRAL = {"model_type": "pixtral", "head_dim": 8, **VIT}
QWEN: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": 4, "intermediate_size": 48}
QWEN_2 = {"model_type": "qwen2_vl_vision", **QWEN, "embed_dim": 32, "hidden_size": 16, "mlp_ratio": 2}
QWEN_25 = {
    "model_type": "qwen2_5_vl_vision", **QWEN, "hidden_size": 32, "out_hidden_size": 16, "window_size": 16,
    "fullatt_block_indexes": [1],
}  # fmt: skip
QWEN_3 = {
    "model_type": "qwen3_vl_vision", **QWEN, "hidden_size": 32, "out_hidden_size": 16,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
LLM = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS = {"head_dim": 8}
# The stem of the class, its vision config, its LLM's, the tower's place, and the layer that it reads.
VLMS: dict[str, tuple[dict[str, Any], dict[str, Any], str, Any]] = {
    "AyaVision": (SIGLIP, {"model_type": "cohere2"}, "vision_tower", -1),
    "Gemma3": (SIGLIP, {"model_type": "gemma3_text", **HEADS}, "vision_tower", None),
    "InternVL": (INTERN, {"model_type": "qwen2"}, "vision_tower", -1),
    "LightOnOcr": (PIXTRAL, {"model_type": "qwen3", **HEADS}, "vision_encoder", None),
    "Llava": (CLIP, {"model_type": "llama"}, "vision_tower", -2),
    "LlavaNext": (CLIP, {"model_type": "llama"}, "vision_tower", -2),
    "LlavaOnevision": (SIGLIP, {"model_type": "qwen2"}, "vision_tower", -1),
    "Mistral3": (PIXTRAL, {"model_type": "mistral"}, "vision_tower", -1),
    "PaliGemma": (SIGLIP, {"model_type": "gemma", **HEADS}, "vision_tower", None),
    "Qwen2VL": (QWEN_2, {"model_type": "qwen2_vl_text"}, "visual", None),
    "Qwen2_5_VL": (QWEN_25, {"model_type": "qwen2_5_vl_text"}, "visual", None),
    "Qwen3VL": (QWEN_3, {"model_type": "qwen3_vl_text", **HEADS}, "visual", None),
    "VideoLlava": (CLIP, {"model_type": "llama"}, "image_tower", -2),
    # It reads hidden states -2, -5, -8, -11 and 6 of 24 blocks: with three, 2 is the last but one.
    "VipLlava": (CLIP, {"model_type": "llama"}, "vision_tower", (-2, -1)),
}


def make_vlm(stem: str) -> Any:
    """Make a whole VLM of a few thousand random weights."""
    vision, text, _, _ = VLMS[stem]
    layers = {"vision_feature_layers": [-2, 3]} if stem == "VipLlava" else {}
    config = getattr(transformers, f"{stem}Config")(vision_config=vision, text_config={**LLM, **text}, **layers)
    torch.manual_seed(0)
    vlm = getattr(transformers, f"{stem}ForConditionalGeneration")(config).eval()
    for parameter in vlm.parameters():
        # Many biases and scales start at 0 or 1, where a wrong name would not show.
        torch.nn.init.normal_(parameter, std=0.3)
    return vlm


def layouts(place: str) -> dict[str, Callable[[str], str]]:
    """Give what turns the keys of memory into those of checkpoints, old and new."""

    def older(key: str, start: str, level: str) -> str:
        return re.sub(rf"^model\.{place}\.", f"{start}{place}.{level}", key)

    level = "" if place == "visual" else "vision_model."
    return {
        "4.x": lambda key: older(key, "", level),
        "4.52": lambda key: older(key, "model.", level),
        "memory": lambda key: key,
    }


def found_in(folder: Path) -> NestedTower:
    found = find_tower(json.loads((folder / "config.json").read_text()), "vlm")
    assert found is not None
    return found


@pytest.mark.parametrize("stem", VLMS)
def test_the_tower_of_a_vlm_is_loaded_by_its_key_map(stem: str, tmp_path: Path) -> None:
    vlm = make_vlm(stem)
    vlm.save_pretrained(tmp_path)
    place, layer = VLMS[stem][2:]
    own = vlm.get_submodule(f"model.{place}")
    found = found_in(tmp_path)
    assert found.model_type == VLMS[stem][0]["model_type"]
    assert found.feature_layer == layer
    config = type(own.config).from_dict({key: value for key, value in found.config.items() if key != "model_type"})
    expected = own.state_dict()
    for rename in (None, *layouts(place).values()):
        if rename is not None:
            save_file(
                {rename(key): value.contiguous().clone() for key, value in vlm.state_dict().items()},
                tmp_path / "model.safetensors",
            )
        tower = type(own)._from_config(config)
        tower.load_state_dict(load_nested(tmp_path, found, "vlm"), strict=True)
        assert all(torch.equal(value, expected[key]) for key, value in tower.state_dict().items())


@pytest.mark.parametrize("stem", ["Gemma3", "InternVL", "Llava", "LlavaOnevision", "PaliGemma", "VipLlava"])
def test_an_encoder_of_a_vlm_gives_the_vlm_s_own_tokens(stem: str, tmp_path: Path) -> None:
    vlm = make_vlm(stem)
    vlm.save_pretrained(tmp_path)
    place, layer = VLMS[stem][2:]
    pixels = torch.randn(2, 3, 28, 28)
    output = vlm.get_submodule(f"model.{place}")(pixels, output_hidden_states=True)
    layers = (layer,) if isinstance(layer, int) else layer or ()
    several = [output.hidden_states[each] for each in layers] or [output.last_hidden_state]
    expected = torch.cat(several, dim=2)
    encoder = create_encoder(f"hf:{tmp_path}")
    visual = encoder(pixels)
    tokens = visual.tokens if visual.prefix is None else torch.cat([visual.prefix, visual.tokens], dim=1)
    assert torch.equal(tokens, expected)
    assert visual.grid == (4, 4)


@pytest.mark.parametrize("stem", ["LightOnOcr", "Mistral3", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_an_encoder_of_a_vlm_is_that_of_its_tower_alone(stem: str, tmp_path: Path) -> None:
    vlm = make_vlm(stem)
    vlm.save_pretrained(tmp_path / "vlm")
    vlm.get_submodule(f"model.{VLMS[stem][2]}").save_pretrained(tmp_path / "tower")
    options = {"image_size": 32} if "Qwen" in stem else {}
    nested, alone = (create_encoder(f"hf:{tmp_path / name}", **options) for name in ("vlm", "tower"))
    pixels = torch.randn(1, 3, *alone.spec.image_size)
    assert torch.equal(nested(pixels).tokens, alone(pixels).tokens)


@pytest.mark.parametrize("stem", ["Idefics2", "Idefics3", "SmolVLM"])
def test_idefics_is_read_as_siglip_at_its_own_size_alone(stem: str, tmp_path: Path) -> None:
    text = {"model_type": "mistral" if stem == "Idefics2" else "llama", **LLM}
    config = getattr(transformers, f"{stem}Config")(vision_config={**VIT, "image_size": 63}, text_config=text)
    torch.manual_seed(0)
    vlm = getattr(transformers, f"{stem}ForConditionalGeneration")(config).eval()
    vlm.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 63, 63)
    encoder = create_encoder(f"hf:{tmp_path}")
    assert torch.equal(encoder(pixels).tokens, vlm.model.vision_model(pixels).last_hidden_state)
    with pytest.raises(VlmError, match="the network takes views of 63 px alone"):
        create_encoder(f"hf:{tmp_path}", image_size=56)


def to_original(key: str) -> str:
    """Give the name of a key of `InternVLVisionModel` in InternViT's own code."""
    for pattern, goal in (
        (r"embeddings\.cls_token", "embeddings.class_embedding"),
        (r"embeddings\.position_embeddings", "embeddings.position_embedding"),
        (r"patch_embeddings\.projection", "patch_embedding"),
        (r"encoder\.layer\.", "encoder.layers."),
        (r"attention\.projection_layer", "attn.proj"),
        (r"attention\.([qk])_norm", r"attn.\1_norm"),
        (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"lambda_([12])", r"ls\1"),
    ):
        key = re.sub(pattern, goal, key)
    return key


def write_intern(folder: Path, config: dict[str, Any], prefix: str) -> Any:
    """Write an InternViT in the form of OpenGVLab's own code, and give it as transformers has it."""
    native = transformers.InternVLVisionConfig(
        **{**VIT, "image_size": [28, 28], "patch_size": [7, 7]}, use_qk_norm=True, norm_type="rms_norm"
    )
    torch.manual_seed(0)
    model = transformers.InternVLVisionModel(native).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if ".q_proj." in key:
            whole = [model.state_dict()[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            state[prefix + to_original(key).replace("attention.q_proj", "attn.qkv")] = torch.cat(whole)
        elif not re.search(r"\.[kv]_proj\.", key):
            state[prefix + to_original(key)] = value
    state = {**state, **({"language_model.model.embed.weight": torch.zeros(2, 2)} if prefix else {})}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return model


INTERN_ORIGINAL = {
    "model_type": "intern_vit_6b", **VIT, "hidden_act": "gelu", "norm_type": "rms_norm", "layer_norm_eps": 1e-6,
    "qkv_bias": False, "qk_normalization": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        (INTERN_ORIGINAL, ""),
        ({"model_type": "internvl_chat", "vision_config": INTERN_ORIGINAL, "select_layer": -1}, "vision_model."),
    ],
)
def test_intern_vits_of_their_own_code_load(config: dict[str, Any], prefix: str, tmp_path: Path) -> None:
    model = write_intern(tmp_path, config, prefix)
    pixels = torch.randn(1, 3, 28, 28)
    encoder = create_encoder(f"hf:{tmp_path}", final_norm=False)
    visual = encoder(pixels)
    assert visual.prefix is not None
    assert torch.equal(torch.cat([visual.prefix, visual.tokens], dim=1), model(pixels).last_hidden_state)


def write_llava(folder: Path, *, with_tower: bool) -> Any:
    """Write a checkpoint as LLaVA's own code does, and its tower's beside it."""
    torch.manual_seed(0)
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT)).eval()
    clip.save_pretrained(folder / "clip")
    config = {"model_type": "llava_llama", "mm_vision_tower": str(folder / "clip"), "mm_vision_select_layer": -2}
    state = {f"model.vision_tower.vision_tower.vision_model.{key}": value for key, value in clip.state_dict().items()}
    state = {"model.mm_projector.0.bias": torch.zeros(2), **(state if with_tower else {})}
    (folder / "llava").mkdir()
    save_file(state, folder / "llava" / "model.safetensors")
    (folder / "llava" / "config.json").write_text(json.dumps(config))
    return clip


def test_checkpoints_of_llava_s_own_code_load(tmp_path: Path) -> None:
    clip = write_llava(tmp_path, with_tower=True)
    edit(tmp_path / "llava", lambda state: {key: value * 2 for key, value in state.items()})
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.mul_(2)
    pixels = torch.randn(1, 3, 28, 28)
    encoder = create_encoder(f"hf:{tmp_path / 'llava'}")
    assert encoder.spec.feature_layer == -2
    expected = clip(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(encoder(pixels).tokens, expected[:, 1:])


def test_a_tower_of_the_table_needs_no_config_from_the_hub() -> None:
    named = "openai/clip-vit-large-patch14-336"
    found = find_tower({"model_type": "llava_llama", "mm_vision_tower": named, "mm_vision_select_layer": -2}, "x")
    assert found is not None
    entries = ("hidden_size", "num_hidden_layers", "intermediate_size", "image_size", "hidden_act")
    assert [found.config[entry] for entry in entries] == [1024, 24, 4096, 336, "quick_gelu"]
    assert (found.model_type, found.feature_layer) == ("clip_vision_model", -2)


def test_a_llava_without_its_tower_says_where_that_is(tmp_path: Path) -> None:
    write_llava(tmp_path, with_tower=False)
    with pytest.raises(VlmError, match=rf"holds no weights of its vision tower; use 'hf:{tmp_path}/clip'"):
        create_encoder(f"hf:{tmp_path / 'llava'}")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda state: {key: value for key, value in state.items() if "layers.1.mlp.fc1.bias" not in key},
            r"1 missing \(.*layers.1.mlp.fc1.bias\)",
        ),
        (lambda state: {**state, "vision_tower.extra.weight": torch.ones(2)}, r"1 unexpected \(extra.weight\)"),
        (lambda state: {k: v for k, v in state.items() if "vision" not in k}, "holds no weights of its vision tower"),
    ],
)
def test_the_tower_of_a_vlm_is_loaded_strictly(change: Any, sentence: str, tmp_path: Path) -> None:
    make_vlm("Llava").save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(VlmError, match=sentence):
        create_encoder(f"hf:{tmp_path}")


def test_shards_without_the_tower_are_not_needed(tmp_path: Path) -> None:
    vlm = make_vlm("Llava")
    vlm.save_pretrained(tmp_path, max_shard_size="5KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    towers = {file for key, file in index.items() if "vision_tower" in key}
    others = set(index.values()) - towers
    assert towers
    assert others
    for name in others:
        (tmp_path / name).unlink()
    state = load_nested(tmp_path, found_in(tmp_path), "vlm")
    assert {key: value.tolist() for key, value in state.items()} == {
        key: value.tolist() for key, value in vlm.model.vision_tower.state_dict().items()
    }


@pytest.mark.filterwarnings("ignore:.*the cache lacks its preprocessor_config")
def test_a_cache_with_the_tower_s_shards_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    home = tmp_path / "models--org--vlm"
    folder = home / "snapshots" / "0123abc"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0123abc")
    vlm = make_vlm("Llava")
    vlm.save_pretrained(folder, max_shard_size="5KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name in set(index.values()) - {file for key, file in index.items() if "vision_tower" in key}:
        (folder / name).unlink()
    pixels = torch.randn(1, 3, 28, 28)
    expected = vlm.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(create_encoder("hf:org/vlm")(pixels).tokens, expected[:, 1:])


def test_no_vlm_has_no_nested_tower() -> None:
    assert find_tower({"model_type": "dinov2", "hidden_size": 32}, "x") is None
    assert find_tower({"model_type": "llava-like", "vision_config": CLIP}, "x") is None
    assert find_tower({}, "x") is None


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "internvl_chat"}, "^x: its config of an InternViT has no hidden_size, "),
        ({"model_type": "llava", "vision_config": {"model_type": "nothing"}}, "^x: transformers cannot read its llava"),
        ({"model_type": "llava", "mm_vision_tower": "./gone"}, "^x: './gone' is neither a folder nor a hub id"),
        ({"model_type": "llava_llama", "mm_vision_tower": "org/gone"}, "^no network and no local weights for 'x'"),
        ({"model_type": "llava", "mm_vision_tower": None}, "^x: mm_vision_tower None of its config.json names no"),
        (
            {
                "model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336",
                "mm_vision_select_layer": "-2",
            },
            "^x: layer '-2' of 24 in its config.json is no number",
        ),
        ({"model_type": ["llava"]}, r"^x: model_type \['llava'\] of its config.json is no word"),
        ({"model_type": "internvl_chat", "vision_config": None}, "^x: its config of an InternViT has no hidden_size"),
        ({"model_type": "sam2_hiera_det_model", "embed_dim_per_stage": 8}, "^x: embed_dim_per_stage 8 of its config"),
    ],
)  # fmt: skip
def test_what_a_config_of_a_vlm_lacks_is_said(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(VlmError, match=sentence):
        find_tower(config, "x")


def test_towers_of_a_class_of_their_own_are_refused(tmp_path: Path) -> None:
    config = {"model_type": "blip-2", "vision_config": {}, "qformer_config": {}, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(VlmError, match="model_type 'blip_2_vision_model' of its config"):
        encoder_spec(f"hf:{tmp_path}")
