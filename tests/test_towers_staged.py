"""Staged towers of transformers against the library's own whole models, with the same small random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from connectors.errors import VlmError
from vlm_encoders.registry import create_encoder, encoder_spec
from vlm_encoders.testing import check_encoder

SWIN: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 2, 1],
    "num_heads": [1, 2, 4],
    "window_size": 4,
    "drop_path_rate": 0.3,
}
HIERA: dict[str, Any] = {
    "image_size": [64, 64],
    "embed_dim": 8,
    "depths": [1, 2, 2, 1],
    "num_heads": [1, 2, 4, 8],
}
CONVNEXT: dict[str, Any] = {"image_size": 64, "hidden_sizes": [8, 12, 16], "depths": [1, 2, 1]}
SMALL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "swin": ("SwinModel", "SwinConfig", SWIN),
    "swinv2": ("Swinv2Model", "Swinv2Config", {**SWIN, "pretrained_window_sizes": [4, 4, 2]}),
    "hiera": ("HieraModel", "HieraConfig", HIERA),
    "convnext": ("ConvNextModel", "ConvNextConfig", {**CONVNEXT, "num_stages": 3}),
    "dinov3_convnext": ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", CONVNEXT),
}
KINDS = tuple(SMALL)
PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def shake(model: nn.Module) -> nn.Module:
    """Give every parameter, the zero-initialised ones too, a random value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def whole(kind: str, folder: Path, **changes: Any) -> Any:
    """Make the library's whole model and save it as the library does."""
    import transformers

    source, config, shape = SMALL[kind]
    torch.manual_seed(1)
    model = shake(getattr(transformers, source)(getattr(transformers, config)(**{**shape, **changes})))
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


def stage_maps(kind: str, model: Any, pixels: Tensor) -> list[Tensor]:
    """Give the map (B, D, R, C) of each stage before the step down, by the library's own words."""
    with torch.no_grad():
        if kind.startswith("swin"):
            embedded, size = model.embeddings(pixels)
            outputs = model.encoder(
                embedded, size, output_hidden_states=True, output_hidden_states_before_downsampling=True
            )
            return list(outputs.reshaped_hidden_states[1:])
        outputs = model(pixels, output_hidden_states=True)
    if kind == "hiera":
        return [found.permute(0, 3, 1, 2) for found in outputs.reshaped_hidden_states[1:]]
    return list(outputs.hidden_states[-len(model.config.depths) :])


def in_rows(found: Tensor) -> Tensor:
    """Write a map row by row."""
    return torch.stack(
        [found[:, :, row, column] for row in range(found.shape[2]) for column in range(found.shape[3])], 1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_is_the_librarys(kind: str, tmp_path: Path) -> None:
    model = whole(kind, tmp_path)
    maps = stage_maps(kind, model, PIXELS)
    for layer in range(-len(maps), 0):
        encoder = create_encoder(f"hf:{tmp_path}", feature_layer=layer, final_norm=False)
        with torch.no_grad():
            visual = encoder(PIXELS)
        assert torch.equal(visual.tokens, in_rows(maps[layer])), layer
        assert len(encoder.blocks()) == len(maps) + 1 + layer
        assert visual.grid == maps[layer].shape[2:]


@pytest.mark.parametrize("kind", ["swin", "swinv2", "dinov3_convnext"])
def test_the_last_stage_is_normed_as_in_the_library(kind: str, tmp_path: Path) -> None:
    model = whole(kind, tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}")
    with torch.no_grad():
        expected = model(PIXELS).last_hidden_state
        tokens = encoder(PIXELS).tokens
    assert encoder.spec.final_norm
    assert torch.equal(tokens, expected[:, -tokens.shape[1] :])


@pytest.mark.parametrize("kind", KINDS)
def test_stages_are_joined_at_the_grid_of_the_first(kind: str, tmp_path: Path) -> None:
    maps = stage_maps(kind, whole(kind, tmp_path), PIXELS)
    encoder = create_encoder(f"hf:{tmp_path}", feature_layer=(-1, -2))
    with torch.no_grad():
        visual = encoder(PIXELS)
    assert visual.tokens.shape[2] == maps[-1].shape[1] + maps[-2].shape[1]
    assert torch.equal(visual.tokens[..., : maps[-1].shape[1]], in_rows(maps[-1]))
    assert visual.grid == maps[-1].shape[2:]


@pytest.mark.parametrize("kind", ["swin", "swinv2", "convnext", "dinov3_convnext"])
@pytest.mark.parametrize("size", [(32, 96), (96, 64)])
def test_other_sizes_are_the_librarys(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(5))
    maps = stage_maps(kind, whole(kind, tmp_path), pixels)
    for layer in (-1, -2):
        encoder = create_encoder(f"hf:{tmp_path}", image_size=size, feature_layer=layer, final_norm=False)
        with torch.no_grad():
            assert torch.equal(encoder(pixels).tokens, in_rows(maps[layer]))


@pytest.mark.parametrize("kind", ["swin", "swinv2"])
def test_swin_pads_what_does_not_fill_a_token(kind: str, tmp_path: Path) -> None:
    pixels = torch.randn(1, 3, 61, 75, generator=torch.Generator().manual_seed(5))
    maps = stage_maps(kind, whole(kind, tmp_path), pixels)
    encoder = create_encoder(f"hf:{tmp_path}", image_size=(61, 75), final_norm=False)
    with torch.no_grad():
        visual = encoder(pixels)
    assert torch.equal(visual.tokens, in_rows(maps[-1]))
    assert visual.grid == (8, 10)


@pytest.mark.parametrize("size", [(32, 96), (96, 96)])
def test_hiera_at_another_size_is_the_librarys(size: tuple[int, int], tmp_path: Path) -> None:
    model = whole("hiera", tmp_path)
    pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(pixels, interpolate_pos_encoding=True).last_hidden_state
        encoder = create_encoder(f"hf:{tmp_path}", image_size=size)
        assert torch.equal(encoder(pixels).tokens, expected)
        # Inner stages: a model that is built for the size, with the table that the library would resample.
        table = model.embeddings.interpolate_pos_encoding(
            torch.empty(1, size[0] * size[1] // 16, 8), model.embeddings.position_embeddings, *size
        )
        other = whole("hiera", tmp_path / "other", image_size=list(size))
        state = model.state_dict()
        other.load_state_dict({**state, "embeddings.position_embeddings": table})
        maps = stage_maps("hiera", other, pixels)
        for layer in (-2, -3, -4):
            found = create_encoder(f"hf:{tmp_path}", image_size=size, feature_layer=layer)
            assert torch.equal(found(pixels).tokens, in_rows(maps[layer]))


def test_a_view_smaller_than_a_window_is_refused(tmp_path: Path) -> None:
    whole("swin", tmp_path)
    with pytest.raises(
        VlmError, match=r"stage -1 has a 2x8 grid, smaller than its window of 4; use sides of at least 25"
    ):
        create_encoder(f"hf:{tmp_path}", image_size=(16, 64))
    assert create_encoder(f"hf:{tmp_path}", image_size=(16, 64), feature_layer=-2).token_spec.grid == (4, 16)
    smallest = create_encoder(f"hf:{tmp_path}", image_size=25)
    assert smallest(torch.zeros(1, 3, 25, 25)).grid == (4, 4)


def test_the_last_norm_fits_no_other_stage(tmp_path: Path) -> None:
    whole("swin", tmp_path)
    with pytest.raises(VlmError, match=r"as wide as its last stage; for stages .* pass final_norm=False"):
        create_encoder(f"hf:{tmp_path}", feature_layer=-2, final_norm=True)
    whole("convnext", tmp_path / "convnext")
    with pytest.raises(VlmError, match="no final norm on its tokens"):
        create_encoder(f"hf:{tmp_path / 'convnext'}", final_norm=True)


def test_a_cut_swin_keeps_its_drop_rates(tmp_path: Path) -> None:
    model = whole("swin", tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}", feature_layer=-2)
    kept: Any = encoder.blocks()
    for stage, library in zip(kept, model.encoder.layers, strict=False):
        for block, other in zip(stage.blocks, library.blocks, strict=True):
            ours, theirs = (getattr(found.drop_path, "drop_prob", 0.0) for found in (block, other))
            assert ours == pytest.approx(theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_each_keeps_the_contract(kind: str, tmp_path: Path) -> None:
    whole(kind, tmp_path)
    for layer in (-1, -2):
        check_encoder(f"hf:{tmp_path}", feature_layer=layer)
    check_encoder(f"hf:{tmp_path}", image_size=(96, 64), feature_layer=(-3, -1), device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_run_row_by_row(kind: str, tmp_path: Path) -> None:
    """A bright patch moves the token of its place, and the grid tells where that is."""
    whole(kind, tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}", image_size=(64, 96), feature_layer=-3)
    rows, columns = encoder.token_spec.grid or (0, 0)
    side = encoder.spec.stride
    row, column = 3, columns - 2
    plain = torch.zeros(1, 3, 64, 96)
    hot = plain.clone()
    hot[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side] = 1.0
    with torch.no_grad():
        change = (encoder(hot).tokens - encoder(plain).tokens).norm(dim=2)[0]
    assert divmod(int(change.argmax()), columns) == (row, column)
    assert rows > 1


def test_the_folders_pixels_are_the_processors(tmp_path: Path) -> None:
    whole("convnext", tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}")
    assert encoder.encode(Image.new("RGB", (90, 70))).grid == (4, 4)
    assert encoder_spec(f"hf:{tmp_path}").positions.startswith("none")
