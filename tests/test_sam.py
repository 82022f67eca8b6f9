"""SAM, SAM 2 and SAM 3 against the libraries' own, and SAM's global attention made by rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from connectors.errors import VlmError
from vlm_encoders.encoders.sam_attention import RowAttention, attend_by_rows
from vlm_encoders.registry import create_encoder, encoder_spec
from vlm_encoders.testing import check_encoder

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
TRUNK: dict[str, Any] = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 8,
    "image_size": [64, 64],
    "blocks_per_stage": [1, 2, 3, 2],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [8, 4, 4, 2],
    "global_attention_blocks": [4],
}
SAM2: dict[str, Any] = {
    "backbone_config": TRUNK,
    "backbone_channel_list": [64, 32, 16, 8],
    "fpn_hidden_size": 24,
}
SAM3: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 64,
    "pretrain_image_size": 32,
    "window_size": 3,
    "global_attn_indexes": [1, 3],
}
SIZES = [(64, 64), (64, 96), (120, 40)]


def pixels_of(size: tuple[int, int], batch: int = 2) -> Tensor:
    """Give random pixels."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3))


def shake(model: nn.Module) -> nn.Module:
    """Give every parameter, the zero-initialised ones too, a random value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def whole(source: str, config: str, shape: dict[str, Any], folder: Path) -> Any:
    """Make the library's whole model and save it as the library does."""
    import transformers

    torch.manual_seed(1)
    model = shake(getattr(transformers, source)(getattr(transformers, config)(**copy.deepcopy(shape))))
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


@pytest.fixture
def sam(tmp_path: Path) -> Any:
    """A SAM of three blocks, the middle one global, saved in `tmp_path`."""
    return whole("SamVisionModel", "SamVisionConfig", SAM, tmp_path)


def layer_of(grid: tuple[int, int]) -> Any:
    """Give a global block of the library with random tables of another grid than `grid`."""
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionLayer

    config = SamVisionConfig(**{**SAM, "image_size": 8 * (max(grid) + 1)})
    config._attn_implementation = "sdpa"
    torch.manual_seed(1)
    return shake(SamVisionLayer(config, 0))


@pytest.mark.parametrize("grid", [(8, 8), (5, 9), (70, 3), (1, 6), (3, 70)])
def test_attention_by_rows_is_the_librarys(grid: tuple[int, int]) -> None:
    library = layer_of(grid)
    ours = copy.deepcopy(library)
    attend_by_rows([ours])
    hidden = torch.randn(2, *grid, 32, generator=torch.Generator().manual_seed(2))
    assert isinstance(ours.attn, RowAttention)
    assert list(ours.state_dict()) == list(library.state_dict())
    with torch.no_grad():
        # The same sums over all keys, cut differently into tiles: fp32 rounding alone.
        torch.testing.assert_close(ours(hidden), library(hidden), rtol=0, atol=1e-6)


def test_gradients_by_rows_are_the_librarys() -> None:
    library = layer_of((5, 70))
    ours = copy.deepcopy(library)
    attend_by_rows([ours])
    hidden = torch.randn(1, 5, 70, 32, generator=torch.Generator().manual_seed(2))
    found = {}
    for name, layer in (("library", library), ("ours", ours)):
        given = hidden.clone().requires_grad_(requires_grad=True)
        layer(given).square().mean().backward()
        found[name] = {"input": given.grad, **{key: value.grad for key, value in layer.named_parameters()}}
    for key, expected in found["library"].items():
        torch.testing.assert_close(found["ours"][key], expected, rtol=1e-4, atol=1e-6)


def test_attention_by_rows_never_makes_the_whole_bias() -> None:
    ours = layer_of((8, 64))
    attend_by_rows([ours])
    hidden = torch.randn(1, 8, 64, 32)
    whole_bias = 2 * 512 * 512
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                sizes.append(result.numel())
            return result

    with torch.no_grad(), Watch():
        ours(hidden)
    assert max(sizes) < whole_bias / 4


def test_bfloat16_flows_through() -> None:
    ours = layer_of((8, 8))
    attend_by_rows([ours])
    half = copy.deepcopy(ours).bfloat16()
    hidden = torch.randn(1, 8, 8, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact, rough = ours(hidden), half(hidden.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert (exact - rough).abs().max() < 0.05 * exact.abs().max()


def test_sam_is_the_librarys_at_every_block_and_behind_the_neck(sam: Any, tmp_path: Path) -> None:
    pixels = pixels_of((64, 64))
    with torch.no_grad():
        outputs = sam(pixels, output_hidden_states=True)
        neck = create_encoder(f"hf:{tmp_path}")(pixels)
        # The global block's sums are cut into other tiles than the library's.
        torch.testing.assert_close(neck.as_map(), outputs.last_hidden_state, rtol=0, atol=1e-5)
        for layer in (-1, -2, -3):
            encoder = create_encoder(f"hf:{tmp_path}", feature_layer=layer, final_norm=False)
            expected = outputs.hidden_states[layer].flatten(1, 2)
            torch.testing.assert_close(encoder(pixels).tokens, expected, rtol=0, atol=1e-5)
        joined = create_encoder(f"hf:{tmp_path}", feature_layer=(-1, -3))(pixels).tokens
    assert joined.shape == (2, 64, 64)
    torch.testing.assert_close(joined[..., 32:], outputs.hidden_states[-3].flatten(1, 2), rtol=0, atol=1e-5)


def test_eager_keeps_the_librarys_own(sam: Any, tmp_path: Path) -> None:
    pixels = pixels_of((64, 64))
    encoder = create_encoder(f"hf:{tmp_path}", attn_implementation="eager")
    assert not any(isinstance(module, RowAttention) for module in encoder.modules())
    library = type(sam).from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(encoder(pixels).as_map(), library(pixels).last_hidden_state)
    usual = create_encoder(f"hf:{tmp_path}")
    assert sum(isinstance(module, RowAttention) for module in usual.modules()) == 1


@pytest.mark.parametrize("size", [(64, 96), (120, 40), (40, 40)])
def test_sam_at_another_size_is_a_plain_model_with_resampled_tables(
    size: tuple[int, int], sam: Any, tmp_path: Path
) -> None:
    pixels = pixels_of(size)
    encoder = create_encoder(f"hf:{tmp_path}", image_size=size)
    grid = (size[0] // 8, size[1] // 8)
    library = sam.vision_encoder
    table = interpolate(library.pos_embed.permute(0, 3, 1, 2), size=grid, mode="bicubic", antialias=True)
    library.pos_embed = nn.Parameter(table.permute(0, 2, 3, 1))
    library.patch_embed.image_size = size
    with torch.no_grad():
        # The library interpolates its offsets itself at every call.
        expected = sam(pixels).last_hidden_state
        torch.testing.assert_close(encoder(pixels).as_map(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_sam_is_timms_at_any_size(size: tuple[int, int], sam: Any, tmp_path: Path) -> None:
    import timm

    model = timm.create_model(
        "samvit_base_patch16",
        img_size=64,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
        mlp_ratio=2,
        window_size=3,
        global_attn_indexes=(1,),
        neck_chans=16,
        num_classes=0,
        global_pool="",
    ).eval()
    state = {}
    for key, value in sam.state_dict().items():
        name = key.removeprefix("vision_encoder.").replace("patch_embed.projection", "patch_embed.proj")
        name = name.replace("layers.", "blocks.").replace("layer_norm1.", "norm1.").replace("layer_norm2.", "norm2.")
        for place, part in enumerate(("conv1", "norm1", "conv2", "norm2")):
            name = name.replace(f"neck.{part}.", f"neck.{place}.")
        state[name.replace("mlp.lin", "mlp.fc")] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing
    assert not unexpected
    encoder = create_encoder(f"hf:{tmp_path}", image_size=size)
    pixels = pixels_of(size)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels).as_map(), model.forward_features(pixels), rtol=0, atol=1e-5)


def test_tables_are_resampled_before_the_cast(sam: Any, tmp_path: Path) -> None:
    exact = create_encoder(f"hf:{tmp_path}", image_size=(64, 96)).state_dict()
    half = create_encoder(f"hf:{tmp_path}", image_size=(64, 96), dtype="bfloat16").state_dict()
    for key, value in exact.items():
        assert torch.equal(half[key], value.bfloat16()), key


@pytest.mark.parametrize("size", SIZES)
def test_sam_keeps_the_contract(size: tuple[int, int], sam: Any, tmp_path: Path) -> None:
    check_encoder(f"hf:{tmp_path}", image_size=size)
    check_encoder(f"hf:{tmp_path}", image_size=size, feature_layer=-2, device="cpu")
    check_encoder(f"hf:{tmp_path}", image_size=size, attn_implementation="eager")


@pytest.fixture
def sam2(tmp_path: Path) -> Any:
    """A SAM 2 of four stages, saved in `tmp_path`."""
    return whole("Sam2VisionModel", "Sam2VisionConfig", SAM2, tmp_path)


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (128, 32)])
def test_sam2_is_the_librarys_at_every_stage_and_behind_the_neck(
    size: tuple[int, int], sam2: Any, tmp_path: Path
) -> None:
    pixels = pixels_of(size)
    with torch.no_grad():
        outputs = sam2.backbone(pixels)
        pyramid = sam2(pixels).fpn_hidden_states
        neck = create_encoder(f"hf:{tmp_path}", image_size=size)
        assert torch.equal(neck(pixels).as_map(), pyramid[-1])
        for layer in range(-4, 0):
            encoder = create_encoder(f"hf:{tmp_path}", image_size=size, feature_layer=layer, final_norm=False)
            visual = encoder(pixels)
            expected = outputs.intermediate_hidden_states[layer]
            assert torch.equal(visual.tokens, expected.flatten(1, 2))
            assert visual.grid == expected.shape[1:3]
            kept = sum(TRUNK["blocks_per_stage"][: 5 + layer])
            assert len(encoder.network.backbone.blocks) == kept  # type: ignore[arg-type, union-attr]
    assert neck.spec.stride == 16
    assert len(neck.network.neck.convs) == 2  # type: ignore[arg-type, union-attr]


def test_sam2_has_no_neck_behind_another_stage(sam2: Any, tmp_path: Path) -> None:
    with pytest.raises(VlmError, match="neck stands behind"):
        create_encoder(f"hf:{tmp_path}", feature_layer=-2, final_norm=True)


def test_sam2_resamples_its_table_in_float32(sam2: Any, tmp_path: Path) -> None:
    half: Any = create_encoder(f"hf:{tmp_path}", dtype="bfloat16").network
    trunk = half.backbone
    exact = interpolate(trunk.pos_embed.float(), size=(16, 16), mode="bicubic")
    window = trunk.pos_embed_window.tile(1, 1, 2, 2)
    expected = (exact.bfloat16() + window).permute(0, 2, 3, 1)
    assert torch.equal(trunk._get_pos_embed((16, 16)), expected)


@pytest.mark.parametrize("layer", [-1, -2, (-1, -3)])
def test_sam2_keeps_the_contract(layer: Any, sam2: Any, tmp_path: Path) -> None:
    check_encoder(f"hf:{tmp_path}", feature_layer=layer, image_size=(64, 96))
    check_encoder(f"hf:{tmp_path}", feature_layer=layer, final_norm=False, device="cpu")


@pytest.fixture
def sam3(tmp_path: Path) -> Any:
    """A SAM 3 of four blocks, two of them global, saved in `tmp_path`."""
    return whole("Sam3ViTModel", "Sam3ViTConfig", SAM3, tmp_path)


def test_sam3_is_the_librarys_at_every_block(sam3: Any, tmp_path: Path) -> None:
    pixels = pixels_of((64, 64))
    with torch.no_grad():
        outputs = sam3(pixels, output_hidden_states=True)
        for layer in range(-4, 0):
            encoder = create_encoder(f"hf:{tmp_path}", feature_layer=layer)
            assert torch.equal(encoder(pixels).tokens, outputs.hidden_states[layer].flatten(1, 2))
        both = create_encoder(f"hf:{tmp_path}", feature_layer=(-1, -2))(pixels).tokens
        assert torch.equal(both[..., 32:], outputs.hidden_states[-2].flatten(1, 2))
        assert torch.equal(both[..., :32], outputs.last_hidden_state)


def test_sam3_at_another_side_is_a_model_built_for_it(sam3: Any, tmp_path: Path) -> None:
    other = whole("Sam3ViTModel", "Sam3ViTConfig", {**SAM3, "image_size": 104}, tmp_path / "other")
    other.load_state_dict(sam3.state_dict())
    pixels = pixels_of((104, 104))
    with torch.no_grad():
        assert torch.equal(create_encoder(f"hf:{tmp_path}", image_size=104)(pixels).tokens, other(pixels)[0])


def test_sam3_gives_oblong_views_their_own_places(sam3: Any, tmp_path: Path) -> None:
    """Row and column of each token, in the library's order of the pair, scaled by the columns."""
    encoder: Any = create_encoder(f"hf:{tmp_path}", image_size=(64, 96))
    places = encoder.network.layers[1].position_ids
    expected = [[column * 3 / 12, row * 3 / 12] for row in range(8) for column in range(12)]
    torch.testing.assert_close(places, torch.tensor(expected))
    check_encoder(f"hf:{tmp_path}", image_size=(64, 96))
    check_encoder(f"hf:{tmp_path}", image_size=(64, 96), device="cpu", feature_layer=-2)


@pytest.mark.parametrize("kind", ["sam", "sam2", "sam3"])
def test_tokens_run_row_by_row(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(kind)
    layer = {"sam": -3, "sam2": -4, "sam3": -4}[kind]
    encoder = create_encoder(f"hf:{tmp_path}", image_size=(64, 96), feature_layer=layer, final_norm=False)
    _, columns = encoder.token_spec.grid or (0, 0)
    side = encoder.spec.stride
    plain = torch.zeros(1, 3, 64, 96)
    hot = plain.clone()
    hot[:, :, 3 * side : 4 * side, (columns - 2) * side : (columns - 1) * side] = 1.0
    with torch.no_grad():
        change = (encoder(hot).tokens - encoder(plain).tokens).norm(dim=2)[0]
    assert divmod(int(change.argmax()), columns) == (3, columns - 2)


def test_specs_say_how_places_are_resampled(sam: Any, tmp_path: Path) -> None:
    assert "antialiasing" in encoder_spec(f"hf:{tmp_path}").positions


def test_sam2_s_trunk_alone_is_read_too(sam2: Any, tmp_path: Path) -> None:
    sam2.backbone.save_pretrained(tmp_path / "trunk")
    pixels = pixels_of((64, 64))
    with torch.no_grad():
        encoder = create_encoder(f"hf:{tmp_path / 'trunk'}")
        assert torch.equal(encoder(pixels).tokens, sam2.backbone(pixels).last_hidden_state.flatten(1, 2))
    with pytest.raises(VlmError, match="missing"):
        create_encoder(f"hf:{tmp_path / 'trunk'}", final_norm=True)


def test_sam3_is_found_in_front_of_its_pyramid(tmp_path: Path) -> None:
    shape = {"backbone_config": {"model_type": "sam3_vit_model", **SAM3}, "fpn_hidden_size": 16}
    pyramid = whole("Sam3VisionModel", "Sam3VisionConfig", shape, tmp_path)
    pixels = pixels_of((64, 64))
    with torch.no_grad():
        assert torch.equal(create_encoder(f"hf:{tmp_path}")(pixels).tokens, pyramid.backbone(pixels).last_hidden_state)
