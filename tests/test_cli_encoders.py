"""`list`, `info` and `encode`: filters, cards, and pictures of tokens."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from connectors.errors import VlmError
from connectors.tokens import VisualTokens
from vlm_encoders.cli.main import app
from vlm_encoders.cli.values import read_layers, read_range, read_size
from vlm_encoders.registry import encoder_spec, list_encoders
from vlm_encoders.report.token_map import TokenColumn, check_drawing, draw_token_maps, token_colours


def run(*arguments: str) -> str:
    """Run a sub-command in this process and give what it prints; a VlmError is raised on."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def listed(*arguments: str) -> list[str]:
    return [line.split()[0] for line in run("list", *arguments).splitlines()[2:]]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(path)
    return path


def test_list_filters_combine() -> None:
    specs = [encoder_spec(name) for name in list_encoders()]
    assert listed("--tokens", "500-600") == [s.name for s in specs if 500 <= s.token_spec().num_tokens <= 600]
    assert listed("--dim", "1024-") == [s.name for s in specs if s.dim >= 1024]
    assert listed("--dim", "-384") == [s.name for s in specs if s.dim <= 384]
    assert listed("--licence", "apache") == [s.name for s in specs if "Apache" in s.licence]
    assert listed("clip-*", "--tokens", "576", "--licence", "MIT", "--dim", "1024") == ["clip-vit-l-14-336"]


def test_list_without_a_match_says_what_there_is() -> None:
    with pytest.raises(
        VlmError, match=r"'\*' --family clip --tokens 5 --dim 7; families are clip; tokens are 49-\d+; widths"
    ):
        run("list", "--family", "clip", "--tokens", "5", "--dim", "7")
    with pytest.raises(VlmError, match=r"no encoder matches 'nothing' --licence gpl; families .*; licences are Apache"):
        run("list", "nothing", "--licence", "gpl")
    with pytest.raises(VlmError, match=r"no encoder matches 'CLIP'; did you mean '\*clip\*'; families are"):
        run("list", "CLIP")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "dinov2-vit-s-14-reg",
            ["prefix:        5 tokens, kept apart (1 cls, 4 register)", "positions:     ", "sizes:         any"],
        ),
        ("swin-t-224", ["stages:        width 96, stride 4; width 192", "of 4 stages (4 are built)"]),
        ("sam-vit-b", ["neck:          width 256, stride 16", "with the neck", "revision "]),
        (
            "fused[fuse=interleave,grid=24x24]:dinov2-vit-l-14+clip-vit-l-14-336",
            [
                "built by:      vlm_encoders.encoders.fused:FusedEncoder: interleave of Dinov2Model, CLIPVisionModel",
                "encoders:      dinov2-vit-l-14 at 224x224 px, 1x; clip-vit-l-14-336 at 336x336 px, 1x",
                "licence:       Apache-2.0 + MIT",
                "view:          224x224 px, crop, bicubic; 336x336 px, crop, bicubic",
                "tokens:        1152 of width 1024, no grid",
                "parameters:    607.9M",
            ],
        ),
        (
            "multiscale:clip-vit-l-14-336",
            [
                "encoders:      clip-vit-l-14-336 at 336x336 px, 5x",
                "576 of width 2048, a grid of 24 rows by 24 columns",
            ],
        ),
    ],
)
def test_info_prints_the_card(name: str, lines: list[str]) -> None:
    card = run("info", name)
    for line in lines:
        assert line in card


def test_info_at_another_size_and_at_several_layers() -> None:
    card = run("info", "dinov2-vit-s-14", "--image-size", "336x448", "--feature-layer", "-2,-5")
    assert "768 of width 768, a grid of 24 rows by 32 columns" in card
    assert "-2 and -5 of 12 blocks (11 are built), without the final norm" in card


def test_info_of_a_folder(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig

    CLIPVisionConfig(hidden_size=32, num_attention_heads=2, image_size=32, patch_size=8).save_pretrained(tmp_path)
    assert "16 of width 32" in run("info", f"hf:{tmp_path}")
    assert "16 of width 160" in run("info", f"fused:(hf:{tmp_path})+tiny-digits")


@given(side=st.integers(1, 5000), other=st.integers(1, 5000))
@settings(max_examples=20, deadline=None)
def test_values_are_read(side: int, other: int) -> None:
    assert read_size(f"{side}x{other}") == (side, other)
    assert read_size(str(side)) == side
    assert read_layers(f"-{side}, -{other}") == (-side, -other)
    assert read_range(f"{min(side, other)}-{max(side, other)}") == (min(side, other), max(side, other))


@pytest.mark.parametrize(("text", "least", "most"), [(None, 0, None), ("5", 5, 5), ("5-", 5, None), ("-5", 0, 5)])
def test_ranges(text: str | None, least: int, most: int | None) -> None:
    assert read_range(text) == (least, most)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["list", "--tokens", "5-3"], "the range 5-3 holds no number"),
        (["list", "--dim", "wide"], "'wide' is no number and no range"),
        (["list", "--dim", "-"], "'-' is no number and no range"),
        (["info", "tiny-digits", "--image-size", "big"], "'big' is no size; write a side or HEIGHTxWIDTH"),
        (["info", "tiny-digits", "--feature-layer", "last"], "'last' names no layers"),
        (["info", "tiny-digits", "--feature-layer", "-9"], "feature layer -9 is not one of its 4 blocks"),
        (["encode", "x.png", "--show", "nowhere/map.png"], "the folder of 'nowhere/map.png' does not exist"),
        (["encode", "x.png", "--show", "map.gif"], "'map.gif' does not end like a picture; use .png"),
        (
            ["encode", "x.png", "--encoder", "a", "--encoder", "b", "--output", "t.safetensors"],
            "tokens of one encoder, got 2",
        ),
        (
            ["encode", "x.png", "--encoder", "a", "--encoder", "b", "--weights", "folder"],
            "--weights folder is one place for 2 encoders",
        ),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(VlmError, match=sentence):
        run(*arguments)


def test_encode_shows_each_encoder_beside_the_picture(photo: Path, tmp_path: Path) -> None:
    target = tmp_path / "map.png"
    names = ["tiny-digits", "fused:tiny-digits[image_size=128]+tiny-digits"]
    printed = run("encode", str(photo), str(photo), "--encoder", names[0], "--encoder", names[1], "--show", str(target))
    assert [line.split()[2:4] for line in printed.splitlines()[2:6]] == [["64", "8x8"]] * 2 + [["256", "16x16"]] * 2
    assert f"drawn to {target}" in printed
    width, height = Image.open(target).size
    # Three columns, two rows.
    assert 1.2 < width / height < 1.8


def test_encode_keeps_tokens_and_prefix(photo: Path, tmp_path: Path) -> None:
    target = tmp_path / "tokens.safetensors"
    options = ["--weights", "random", "--image-size", "28x42", "--feature-layer", "-11,-12"]
    printed = run("encode", str(photo), "--encoder", "dinov2-vit-s-14", *options, "--output", str(target))
    assert "and 1 prefix tokens an image, kept apart" in printed
    assert {key: tuple(value.shape) for key, value in load_file(target).items()} == {
        "tokens": (1, 6, 768),
        "prefix": (1, 1, 768),
    }


def test_tokens_without_a_grid_have_no_map(photo: Path, tmp_path: Path) -> None:
    name = "fused[fuse=sequence]:tiny-digits+tiny-digits"
    with pytest.raises(VlmError, match="its 128 tokens have no grid and so no map; leave --show out"):
        run("encode", str(photo), "--encoder", name, "--show", str(tmp_path / "map.png"))


def test_pictures_need_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(VlmError, match=r"pip install 'vlm-encoders\[report\]'"):
        check_drawing(tmp_path / "map.png")


def test_colours_are_the_first_three_components() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(200, 3)) * (9, 3, 1)
    axes, _ = np.linalg.qr(generator.normal(size=(12, 3)))
    colours = token_colours(scores @ axes.T + 5)
    for component in range(3):
        # Clipped at two percentiles, so close to a straight line but not on it.
        assert abs(np.corrcoef(colours[:, component], scores[:, component])[0, 1]) > 0.97
    assert (colours.min(), colours.max()) == (0, 1)


@given(flip=st.sampled_from([1.0, -1.0]), scale=st.floats(0.01, 100), seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_colours_hold_their_sign(flip: float, scale: float, seed: int) -> None:
    tokens = np.random.default_rng(seed).normal(size=(40, 6)).astype(np.float32)
    assert np.array_equal(token_colours(tokens), token_colours(tokens.copy()))
    assert np.allclose(token_colours(tokens), token_colours(tokens * np.float32(scale)), atol=1e-4)
    # The sign follows the axis, not the values, so tokens turned over are colours turned over.
    turned = token_colours(tokens * np.float32(flip))
    assert np.allclose(turned if flip > 0 else 1 - turned, token_colours(tokens), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 5), (2, 5), (9, 1), (9, 5)])
def test_tokens_with_little_to_show_are_grey(shape: tuple[int, int]) -> None:
    assert (token_colours(np.ones(shape)) == 0.5).all()
    colours = token_colours(np.random.default_rng(0).normal(size=shape))
    assert np.isfinite(colours).all()
    assert (colours[:, min(shape[1], shape[0] - 1) :] == 0.5).all()


def test_the_map_has_the_grid_s_colours_in_their_places(tmp_path: Path) -> None:
    picture = tmp_path / "black.png"
    Image.new("RGB", (30, 20)).save(picture)
    tokens = torch.zeros(1, 4, 3)
    tokens[0, :2, 0] = 9.0
    column = TokenColumn("two rows", VisualTokens(tokens, (2, 2)), "squash", (20, 30))
    draw_token_maps([picture], [column], tmp_path / "map.png")
    pixels = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).astype(int)
    right = pixels[:, pixels.shape[1] // 2 :]
    # One component alone has spread: red at its top, and no red at its bottom, green and blue in the middle.
    upper, lower = (np.abs(right - colour).max(axis=2) <= 1 for colour in ((255, 127, 127), (0, 127, 127)))
    assert upper.sum() > 1000
    assert lower.sum() > 1000
    assert np.nonzero(upper)[0].max() <= np.nonzero(lower)[0].min()


def test_a_slip_in_a_joint_is_seen_before_anything_is_built() -> None:
    with pytest.raises(VlmError, match="clip-vit-l-14: it has no option 'image_sze'; did you mean image_size"):
        run("info", "fused:clip-vit-l-14[image_sze=336]+clip-vit-l-14")


def test_a_picture_that_cannot_be_read_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(VlmError, match="is no image that Pillow can read"):
        run("encode", str(tmp_path / "text.jpg"), "--encoder", "clip-vit-b-32")
    image = tmp_path / "grey.png"
    Image.new("L", (8, 8)).save(image)
    name = "fused[fuse=sequence]:tiny-digits+tiny-digits"
    with pytest.raises(VlmError, match="its 128 tokens have no grid and so no map"):
        run("encode", str(image), "--encoder", name, "--show", str(tmp_path / "map.png"))
