"""Towers that take views of any grid, against the library's own input path, with the same small random weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from connectors.errors import VlmError
from vlm_encoders.registry import create_encoder, encoder_spec
from vlm_encoders.testing import check_encoder

QWEN: dict[str, Any] = {"depth": 4, "num_heads": 2, "patch_size": 4, "hidden_size": 32}
QWEN2: dict[str, Any] = {**QWEN, "embed_dim": 32, "hidden_size": 24, "mlp_ratio": 2}
QWEN25: dict[str, Any] = {
    **QWEN,
    "intermediate_size": 48,
    "out_hidden_size": 24,
    "window_size": 16,
    "fullatt_block_indexes": [2],
}
QWEN3: dict[str, Any] = {
    **QWEN,
    "intermediate_size": 48,
    "out_hidden_size": 24,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 1],
}
PIXTRAL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 64,
    "hidden_act": "silu",
}
NAFLEX: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "patch_size": 8,
    "num_patches": 25,
}
RADIO: dict[str, Any] = {
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 64,
    "max_img_size": 128,
    "num_cls_tokens": 2,
    "num_registers": 3,
}
SMALL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2_vl": ("qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel", "Qwen2VLVisionConfig", QWEN2),
    "qwen2_5_vl": (
        "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
        "Qwen2_5_VLVisionConfig",
        QWEN25,
    ),
    "qwen3_vl": ("qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel", "Qwen3VLVisionConfig", QWEN3),
    "pixtral": ("pixtral.modeling_pixtral.PixtralVisionModel", "PixtralVisionConfig", PIXTRAL),
    "naflex": ("siglip2.modeling_siglip2.Siglip2VisionModel", "Siglip2VisionConfig", NAFLEX),
    "radio": ("radio.modeling_radio.RadioModel", "RadioConfig", RADIO),
}
KINDS = tuple(SMALL)
QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SIZES = [(40, 40), (24, 56), (48, 16)]


def shake(model: nn.Module) -> nn.Module:
    """Give every parameter, the zero-initialised ones too, a random value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def whole(kind: str, folder: Path) -> Any:
    """Make the library's whole model and save it as the library does."""
    import importlib

    import transformers

    path, config, shape = SMALL[kind]
    module, _, name = path.rpartition(".")
    found = importlib.import_module(f"transformers.models.{module}")
    make = getattr(found, config, None) or getattr(transformers, config)
    torch.manual_seed(1)
    model = shake(getattr(found, name)(make(**copy.deepcopy(shape))))
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


def pixels_of(size: tuple[int, int], batch: int = 2) -> Tensor:
    """Give random pixels."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3))


def qwen_rows(pixels: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Give what the library's processor makes of pixels, and the place of each row in its view, row by row."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    patches, rows, columns = Qwen2VLImageProcessor().patchify(pixels, side, 2, 2)
    order = [
        (2 * block_row + row) * columns + 2 * block_column + column
        for block_row in range(rows // 2)
        for block_column in range(columns // 2)
        for row in range(2)
        for column in range(2)
    ]
    return patches.reshape(-1, patches.shape[-1]), torch.tensor(order)


def library_states(kind: str, model: Any, pixels: Tensor) -> list[Tensor]:
    """Give each block's tokens (B, P + N, D), row by row, by the library's own input path."""
    batch, _, height, width = pixels.shape
    if kind == "naflex":
        from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

        patches = torch.stack([convert_image_to_patches(view, 8) for view in pixels])
        mask = torch.ones(patches.shape[:2], dtype=torch.int32)
        shapes = torch.tensor([[height // 8, width // 8]] * batch)
        outputs = model(patches, pixel_attention_mask=mask, spatial_shapes=shapes, output_hidden_states=True)
        return [*outputs.hidden_states[1:], outputs.last_hidden_state]
    if kind in {"radio", "pixtral"}:
        outputs = model(pixels, output_hidden_states=True)
        return [found.reshape(batch, -1, found.shape[-1]) for found in outputs.hidden_states[1:]]
    side = model.config.patch_size
    rows, order = qwen_rows(pixels, side)
    grids = torch.tensor([[1, height // side, width // side]] * batch)
    states = model(rows, grid_thw=grids, output_hidden_states=True).hidden_states[1:]
    found = []
    for state in states:
        ordered = state
        if kind == "qwen2_5_vl":
            from transformers.vision_utils import get_vision_window_index

            windows, _ = get_vision_window_index(grids, 2, model.window_size, side)
            blocks = torch.empty(len(state) // 4, 4, state.shape[1])
            blocks[windows] = state.reshape(-1, 4, state.shape[1])
            ordered = blocks.reshape(len(state), -1)
        tokens = torch.empty(batch, len(order), state.shape[1])
        tokens[:, order] = ordered.reshape(batch, len(order), -1)
        found.append(tokens)
    return found


def is_equal(kind: str, found: Tensor, expected: Tensor) -> None:
    """Hold tokens to the library's: bit by bit, but where it masks what is left out here."""
    if kind == "pixtral":
        # The library sums over all images and masks; here each image has its own sum.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_every_block_is_the_librarys(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    model = whole(kind, tmp_path)
    pixels = pixels_of(size)
    with torch.no_grad():
        states = library_states(kind, model, pixels)
        for layer in (-1, -2, -4):
            encoder = create_encoder(f"hf:{tmp_path}", image_size=size, feature_layer=layer, final_norm=False)
            visual = encoder(pixels)
            expected = states[:4][layer]
            is_equal(kind, visual.tokens, expected[:, encoder.spec.num_prefix :])
            if visual.prefix is not None:
                assert torch.equal(visual.prefix, expected[:, : encoder.spec.num_prefix])
        both = create_encoder(f"hf:{tmp_path}", image_size=size, feature_layer=(-3, -1))(pixels)
        is_equal(kind, both.tokens[..., :32], states[:4][-3][:, both.spec.num_prefix :])


def test_pixtral_alone_is_bit_equal(tmp_path: Path) -> None:
    model = whole("pixtral", tmp_path)
    pixels = pixels_of((64, 40), batch=1)
    encoder = create_encoder(f"hf:{tmp_path}", image_size=(64, 40))
    with torch.no_grad():
        expected = model(pixels, image_sizes=[(64, 40)]).last_hidden_state
        torch.testing.assert_close(encoder(pixels).tokens, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["pixtral", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_views_of_a_batch_do_not_see_each_other(kind: str, tmp_path: Path) -> None:
    whole(kind, tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}", image_size=(40, 24))
    pixels = pixels_of((40, 24), batch=3)
    with torch.no_grad():
        together = encoder(pixels).tokens
        alone = torch.cat([encoder(view[None]).tokens for view in pixels])
    # A batch's matrix products may be cut into other tiles.
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_naflex_is_normed_as_in_the_library(size: tuple[int, int], tmp_path: Path) -> None:
    model = whole("naflex", tmp_path)
    pixels = pixels_of(size)
    with torch.no_grad():
        expected = library_states("naflex", model, pixels)[-1]
        assert torch.equal(create_encoder(f"hf:{tmp_path}", image_size=size)(pixels).tokens, expected)


def test_naflex_resamples_in_float32_as_the_library_on_the_cpu(tmp_path: Path) -> None:
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    from vlm_encoders.encoders.towers import tower

    model = whole("naflex", tmp_path).bfloat16()
    for rows, columns in ((3, 7), (5, 5), (4, 1)):
        encoder: Any = create_encoder(f"hf:{tmp_path}", image_size=(8 * rows, 8 * columns), dtype="bfloat16")
        pixels = pixels_of((8 * rows, 8 * columns), batch=1).bfloat16()
        naflex: Any = tower("Siglip2VisionModel")
        found = naflex.embed(encoder.network, pixels, encoder.spec).hidden
        expected = model.embeddings(convert_image_to_patches(pixels[0], 8)[None], torch.tensor([[rows, columns]]))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", QWENS)
def test_views_that_do_not_fill_a_block_are_refused(kind: str, tmp_path: Path) -> None:
    whole(kind, tmp_path)
    with pytest.raises(VlmError, match=r"28x40 is not a multiple of 8, the 2x2 patches .* use (24|32)x40"):
        create_encoder(f"hf:{tmp_path}", image_size=(28, 40))


@pytest.mark.parametrize("kind", QWENS)
def test_the_merger_is_dropped(kind: str, tmp_path: Path) -> None:
    whole(kind, tmp_path)
    names = {name.split(".")[0] for name, _ in create_encoder(f"hf:{tmp_path}").network.named_parameters()}  # type: ignore[union-attr]
    assert names <= {"patch_embed", "pos_embed", "blocks"}


def test_qwen_reads_a_preprocessor_whose_sizes_are_areas(tmp_path: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    whole("qwen2_vl", tmp_path)
    Qwen2VLImageProcessor().save_pretrained(tmp_path)
    spec = encoder_spec(f"hf:{tmp_path}")
    assert spec.image_size == (128, 128)
    assert spec.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_radio_takes_pixels_from_0_to_1_and_names_its_prefix(tmp_path: Path) -> None:
    model = whole("radio", tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}")
    assert encoder.spec.mean == (0.0, 0.0, 0.0)
    assert encoder.spec.std == (1.0, 1.0, 1.0)
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        visual, expected = encoder(pixels), model(pixels)
    assert torch.equal(visual.tokens, expected.features)
    assert torch.equal(encoder.prefix_tokens(visual, "cls").flatten(1), expected.summary)
    assert encoder.prefix_tokens(visual, "register").shape == (1, 3, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_each_keeps_the_contract(kind: str, tmp_path: Path) -> None:
    whole(kind, tmp_path)
    for layer in (-1, (-2, -3)):
        check_encoder(f"hf:{tmp_path}", image_size=(48, 24), feature_layer=layer)
    check_encoder(f"hf:{tmp_path}", image_size=(24, 48), attn_implementation="eager", device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_run_row_by_row(kind: str, tmp_path: Path) -> None:
    """A bright patch moves the token of its place, and the grid tells where that is."""
    whole(kind, tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}", image_size=(40, 56), feature_layer=-4)
    _, columns = encoder.token_spec.grid or (0, 0)
    side = encoder.spec.stride
    plain = torch.zeros(1, 3, 40, 56)
    hot = plain.clone()
    hot[:, :, 3 * side : 4 * side, (columns - 2) * side : (columns - 1) * side] = 1.0
    with torch.no_grad():
        change = (encoder(hot).tokens - encoder(plain).tokens).norm(dim=2)[0]
    assert divmod(int(change.argmax()), columns) == (3, columns - 2)
