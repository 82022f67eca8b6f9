"""Several encoders as one, against the composition written by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from connectors import PixelShuffle, TokenSpec, build_connector
from connectors.errors import TokenShapeError, VlmError
from vlm_encoders.budget import encoder_flops, token_budget
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.fused import FusedEncoder
from vlm_encoders.registry import create_encoder, encoder_spec
from vlm_encoders.testing import check_encoder, tiny_llm
from vlm_encoders.tiling import build_tiler
from vlm_encoders.vlm.build import build_model
from vlm_encoders.vlm.checkpoint import load_model
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.stages import STAGE_1, PartPolicy, StagePolicy, apply_stage

Make = Callable[..., str]
VIT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a tiny tower to a folder and give its name."""

    def write(kind: str, size: int, **shape: Any) -> str:
        import transformers

        source = {"clip": "CLIPVision", "dinov2": "Dinov2"}[kind]
        config = getattr(transformers, f"{source}Config")(**{**VIT, "image_size": size, **shape})
        torch.manual_seed(size)
        folder = tmp_path / f"{kind}-{size}"
        getattr(transformers, f"{source}Model")(config).save_pretrained(folder)
        return f"hf:{folder}"

    return write


@pytest.fixture
def photo() -> Image.Image:
    noise = torch.randint(0, 256, (40, 56, 3), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def tokens_of(encoder: Encoder, images: Any) -> list[Tensor]:
    visual = encoder.encode(images)
    return [visual.tokens, visual.as_map()]


def test_channels_are_those_of_each_encoder_at_the_first_grid(make: Make, photo: Image.Image) -> None:
    names = make("clip", 32), make("dinov2", 64)
    joint = create_encoder(f"fused:{names[0]}+{names[1]}")
    (first, _), (_, second) = (tokens_of(create_encoder(name), [photo, photo]) for name in names)
    visual = joint.encode([photo, photo])
    pooled = interpolate(second, size=(4, 4), mode="area").flatten(2).transpose(1, 2)
    assert (visual.grid, visual.prefix) == ((4, 4), None)
    assert torch.equal(visual.tokens, torch.cat([first, pooled], dim=2))


def test_a_stated_grid_and_resampling_hold_for_each_part(make: Make, photo: Image.Image) -> None:
    names = make("clip", 32), make("dinov2", 64)
    joint = create_encoder(f"fused[grid=6x5,resampling=bilinear]:{names[0]}+{names[1]}")
    maps = [interpolate(tokens_of(create_encoder(n), photo)[1], size=(6, 5), mode="bilinear") for n in names]
    assert torch.equal(joint.encode(photo).as_map(), torch.cat(maps, dim=1))


def test_a_sequence_is_one_part_s_tokens_after_the_other_s(make: Make, photo: Image.Image) -> None:
    names = make("clip", 32), make("dinov2", 64)
    visual = create_encoder(f"fused[fuse=sequence]:{names[0]}+{names[1]}").encode(photo)
    first, second = (tokens_of(create_encoder(name), photo)[0] for name in names)
    assert visual.grid is None
    assert torch.equal(visual.tokens, torch.cat([first, second], dim=1))


def test_interleaved_tokens_alternate_place_by_place(make: Make, photo: Image.Image) -> None:
    names = make("clip", 32), make("dinov2", 64)
    visual = create_encoder(f"fused[fuse=interleave,grid=4x4]:{names[0]}+{names[1]}").encode(photo)
    first, second = tokens_of(create_encoder(names[0]), photo)[0], tokens_of(create_encoder(names[1]), photo)[1]
    assert visual.grid is None
    assert torch.equal(visual.tokens[:, 0::2], first)
    assert torch.equal(visual.tokens[:, 1::2], interpolate(second, size=(4, 4), mode="area").flatten(2).transpose(1, 2))


def test_pixels_are_each_part_s_own(make: Make, photo: Image.Image) -> None:
    names = make("clip", 32), make("dinov2", 64)
    parts = [create_encoder(name) for name in names]
    joint = FusedEncoder(parts)
    pixels = joint.preprocess(iter([photo, photo]))  # type: ignore[arg-type]
    expected = torch.cat([part.preprocess([photo, photo]).flatten(1) for part in parts], dim=1)
    assert joint.pixel_shape == (3 * (32 * 32 + 64 * 64),) == (joint.spec.num_pixels,)
    assert torch.equal(pixels, expected)
    with pytest.raises(TokenShapeError, match=r"pixels are \(B, 15360\), got shape \(1, 3, 64, 64\)"):
        joint(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    "name",
    [
        "fused:tiny-digits[image_size=128x64]+tiny-digits",
        "fused[fuse=interleave]:tiny-digits[feature_layer=-2]+tiny-digits",
        "fused[fuse=sequence]:(multiscale:tiny-digits)[feature_layer=-2]+(fused:tiny-digits+tiny-digits)",
        "fused[grid=16x16]:siglip-b-16-224+swin-t-224",
        "fused[fold=true]:tiny-digits+tiny-digits[image_size=128]",
    ],
)
def test_the_contract_of_encoders_holds(name: str) -> None:
    check_encoder(name)


def test_numbers_are_the_sums_of_the_parts() -> None:
    name = "fused:dinov2-vit-l-14[image_size=336]+clip-vit-l-14-336"
    spec, parts = encoder_spec(name), [encoder_spec("dinov2-vit-l-14").resized(336), encoder_spec("clip-vit-l-14-336")]
    assert spec.parameters == sum(part.parameters for part in parts)
    assert spec.kept_layers == sum(part.kept_layers for part in parts) == 24 + 23
    assert encoder_flops(spec) == sum(encoder_flops(part) or 0 for part in parts)
    budget = token_budget(name, "mlp")
    assert (budget.total, budget.encoder_tokens) == (576, 576)
    assert budget.pixel_bytes == 2 * 2 * 3 * 336 * 336
    assert token_budget(name.replace("fused:", "fused[fuse=sequence]:"), "mlp").total == 2 * 576
    assert encoder_flops(encoder_spec("fused:swin-t-224+clip-vit-b-32")) is None


def test_python_and_name_are_one(make: Make, photo: Image.Image) -> None:
    names = make("clip", 32), make("dinov2", 64)
    parts = [create_encoder(names[0], image_size=(64, 32), feature_layer=-1), create_encoder(names[1])]
    joint = FusedEncoder(parts, fuse="sequence", grid=(4, 4)).eval()
    again = create_encoder(**json.loads(json.dumps(joint.origin)))
    assert joint.spec == again.spec
    assert torch.equal(joint.encode(photo).tokens, again.encode(photo).tokens)
    by_hand = create_encoder(names[0])
    by_hand.origin = {}
    assert FusedEncoder([by_hand, parts[1]]).origin == {}


def test_a_part_of_random_weights_makes_the_origin_random(make: Make) -> None:
    parts = [create_encoder(make("clip", 32), pretrained=False), create_encoder(make("dinov2", 64))]
    assert FusedEncoder(parts).origin["pretrained"] is False


def test_weights_of_another_folder_are_taken(make: Make, photo: Image.Image) -> None:
    name, other = make("clip", 32), make("clip", 64)
    folder = name.removeprefix("hf:")
    joint = create_encoder(f"fused:{other}[image_size=32]+{name}[pretrained={folder}]")
    assert torch.equal(joint.encode(photo).tokens[..., 32:], create_encoder(name).encode(photo).tokens)
    built = FusedEncoder([create_encoder(name, pretrained=folder), create_encoder(other)])
    assert f"pretrained={folder}" in built.origin["name"]


def test_gradients_and_modes_reach_each_part(make: Make, photo: Image.Image) -> None:
    joint = create_encoder(f"fused:{make('clip', 32)}+{make('dinov2', 64)}")
    joint(joint.preprocess(photo)).tokens.sum().backward()
    assert all(parameter.grad is not None for parameter in joint.parameters())
    assert not any(module.training for module in joint.modules())
    assert all(module.training for module in joint.train().modules())


def test_the_last_blocks_are_counted_from_each_part_s_end(make: Make) -> None:
    joint = create_encoder(f"fused:{make('clip', 32)}+{make('dinov2', 64)}")
    assert isinstance(joint, FusedEncoder)
    assert [len(part.blocks()) for part in joint.parts] == [2, 3]
    policy = StagePolicy("s", PartPolicy("train", lr=1.0, last_blocks=1), PartPolicy("train", lr=1.0))
    connector = build_connector("mlp", joint.token_spec, 32)
    model = apply_stage(VisionLanguageModel(joint, connector, tiny_llm(), image_token_id=70), policy)
    trained = [all(p.requires_grad for p in block.parameters()) for block in model.encoder.blocks()]
    assert trained == [False, True, False, False, True]


@pytest.fixture
def plugged(make: Make, kit: Any) -> tuple[VisionLanguageModel, Any]:
    name = f"fused:{make('clip', 32)}+{make('dinov2', 64)}"
    torch.manual_seed(5)
    return build_model(name, "mlp", kit.root / "llm")


def test_a_model_trains_is_saved_and_loaded(plugged: Any, photo: Image.Image, tmp_path: Path) -> None:
    model, processor = plugged
    apply_stage(model, STAGE_1).train()
    messages = [{"role": "user", "content": "<image> w1"}, {"role": "assistant", "content": "w2 w3"}]
    batch = processor.collate([processor.sample(messages, [photo])] * 2)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    losses = []
    for _ in range(2):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    model.eval().save_pretrained(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert not (tmp_path / "saved" / "encoder.safetensors").exists()
    assert torch.equal(loaded(**batch).loss, model(**batch).loss)
    saved = json.loads((tmp_path / "saved" / "model.json").read_text())["encoder"]
    assert [part["image_size"] for part in saved["pixels"]["parts"]] == [[32, 32], [64, 64]]
    other = create_encoder(model.encoder.spec.name.replace("clip-32+", "clip-32[resize=squash]+"))
    with pytest.raises(VlmError, match="was trained on pixels with parts"):
        load_model(tmp_path / "saved", encoder=other)


def test_relative_folders_are_saved_as_absolute_ones(
    plugged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    joint = create_encoder("fused:hf:clip-32+hf:dinov2-64[pretrained=dinov2-64]")
    model, _ = plugged
    model.encoder = joint
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir("/")
    assert isinstance(load_model(tmp_path / "saved").encoder, FusedEncoder)


def test_tiles_are_squashed_for_each_part(make: Make, kit: Any) -> None:
    names = make("clip", 32), make("dinov2", 64)
    _, processor = build_model(f"fused:{names[0]}+{names[1]}", "mlp", kit.root / "llm", tiler="internvl:markers=false")
    wide = Image.linear_gradient("L").resize((160, 80)).convert("RGB")
    sample = processor.prompt([{"role": "user", "content": "<image>"}], [wide])
    assert sample.pixel_values is not None
    plan = sample.plans[0]
    assert plan.grid == (1, 2)
    tiles = build_tiler("internvl", 64).cut(wide, plan)
    small = create_encoder(names[0], resize="squash").spec.altered(crop_pct=1.0)
    from vlm_encoders.view_pixels import ViewPixels

    assert torch.equal(sample.pixel_values[:, : 3 * 32 * 32], ViewPixels(small)(tiles).flatten(1))


def test_a_choice_for_each_part_reaches_each_part(make: Make) -> None:
    name = f"fused:{make('clip', 32)}+{make('dinov2', 64)}"
    joint = create_encoder(name, resize="squash", attn_implementation="eager", exact_pixels=True)
    assert [spec.resize for spec in joint.spec.pixel_specs] == ["squash", "squash"]
    assert all(spec.exact_pixels for spec in joint.spec.pixel_specs)
    assert isinstance(joint, FusedEncoder)
    networks: list[Any] = [part.network for part in joint.parts]
    assert [network.config._attn_implementation for network in networks] == ["eager", "eager"]
    assert create_encoder(**joint.origin).spec == joint.spec


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"image_size": 32}, r"cannot take 32x32 px; write \[image_size=...\] behind a part"),
        ({"feature_layer": -1}, r"neither feature_layer nor final_norm; write \[feature_layer=...\]"),
        ({"final_norm": True}, "neither feature_layer nor final_norm"),
        ({"revision": "main"}, r"one revision cannot be that of each part; write \[revision=...\]"),
        ({"pretrained": "folder"}, r"one place for the weights of 2 encoders; write \[pretrained=FOLDER\]"),
    ],
)
def test_what_belongs_to_a_part_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(VlmError, match=sentence):
        create_encoder("fused:tiny-digits+tiny-digits", **options)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fused[fuse=sequence]:tiny-digits+clip-vit-b-32", r"sequence needs one width, the parts have \[128, 768\]"),
        ("fused[fuse=interleave]:tiny-digits+tiny-digits[image_size=128]", "one grid, the parts have 8x8, 16x16; give"),
        ("fused:(fused[fuse=sequence]:tiny-digits+tiny-digits)+tiny-digits", "have no grid; use fuse=sequence"),
    ],
)
def test_parts_that_do_not_fit_are_refused(name: str, sentence: str) -> None:
    with pytest.raises(TokenShapeError, match=sentence):
        encoder_spec(name)


def test_parts_that_cannot_share_a_view_are_refused(clip: Encoder, clip_spec: Any) -> None:
    with pytest.raises(VlmError, match="stands in it twice"):
        FusedEncoder([clip, clip])
    other = create_encoder("tiny-digits", pretrained=False, dtype="bfloat16")
    with pytest.raises(VlmError, match="its parts are float32, bfloat16"):
        FusedEncoder([clip, other])
    with pytest.raises(VlmError, match="takes two encoders or more, got 0"):
        FusedEncoder(nn.ModuleList())  # type: ignore[arg-type]


def test_a_finer_grid_is_folded_window_by_window(make: Make, photo: Image.Image) -> None:
    names = make("clip", 32), make("dinov2", 64, hidden_size=16)
    joint = create_encoder(f"fused[fold=true]:{names[0]}+{names[1]}")
    (coarse, _), (_, fine) = (tokens_of(create_encoder(name), photo) for name in names)
    visual = joint.encode(photo)
    assert (visual.grid, joint.spec.dim, joint.token_spec) == ((4, 4), 32 + 4 * 16, visual.spec)
    for row in range(4):
        for column in range(4):
            window = [fine[0, :, 2 * row + down, 2 * column + right] for down in (0, 1) for right in (0, 1)]
            expected = torch.cat([coarse[0, 4 * row + column], *window])
            assert torch.equal(visual.tokens[0, 4 * row + column], expected)


def test_folding_is_pixel_shuffle_and_takes_oblong_grids(make: Make, photo: Image.Image) -> None:
    names = make("clip", 32), make("clip", 64)
    joint = create_encoder(f"fused[fold=true,grid=2x4]:{names[0]}[image_size=16x32]+{names[1]}[image_size=32x64]")
    second = create_encoder(names[1], image_size=(32, 64)).encode(photo)
    visual = joint.encode(photo)
    assert visual.grid == (2, 4)
    assert torch.equal(visual.tokens[..., 32:], PixelShuffle(2)(second).tokens)


def test_folded_encoders_feed_the_spatial_vision_aggregator(make: Make, photo: Image.Image) -> None:
    joint = create_encoder(f"fused[fold=true]:{make('clip', 32)}+{make('dinov2', 64, hidden_size=16)}")
    recipe = "sva:widths=32/16,folds=1/2,hidden=24,heads=2,depth=2"
    connector = build_connector(recipe, joint.token_spec, 20)
    out = connector(joint.encode([photo, photo]))
    assert out.spec == connector.out_spec(joint.token_spec)
    assert out.spec == TokenSpec(16, 20, (4, 4))


def test_a_folding_joint_is_made_again_by_its_name(make: Make, photo: Image.Image) -> None:
    parts = [create_encoder(make("clip", 32)), create_encoder(make("dinov2", 64))]
    joint = FusedEncoder(parts, fold=True).eval()
    again = create_encoder(**json.loads(json.dumps(joint.origin)))
    assert "fold=true" in joint.origin["name"]
    assert joint.spec == again.spec
    assert torch.equal(joint.encode(photo).tokens, again.encode(photo).tokens)
    assert "fold=" not in FusedEncoder(parts).origin["name"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fused[fold=yes]:A+A", "fold=yes is not understood; give true or false"),
        ("fused[fold=true,fuse=sequence]:A+A", "fold joins windows by channel and fuse is sequence; use fuse=channel"),
        ("fused[fold=true,resampling=area]:A+A", "in place of resampling, got resampling=area; leave one of them out"),
        (
            "fused[fold=true]:A+A[image_size=96x128]",
            "the 12x16 grid of .* does not fold to 8x8 by square windows; give",
        ),
        ("fused[fold=true]:A+A[image_size=128x64]", "the 16x8 grid of .* does not fold to 8x8 by square windows; give"),
        ("fused[fold=true]:A[image_size=128]+A", "the 8x8 grid of .* does not fold to 16x16 by square windows; give"),
    ],
)
def test_what_does_not_fold_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(VlmError, match=sentence):
        encoder_spec(name.replace("A", "tiny-digits"))
