"""One encoder at several scales, against a slow version written out plainly."""

import json
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from connectors.errors import TokenShapeError, VlmError
from vlm_encoders.budget import encoder_flops, token_budget
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.multiscale import MultiScale
from vlm_encoders.encoders.multiscale_spec import multiscale_spec
from vlm_encoders.registry import create_encoder, encoder_spec
from vlm_encoders.testing import check_encoder
from vlm_encoders.view_pixels import ViewPixels

SEED = 3


@pytest.fixture
def photo() -> Image.Image:
    noise = torch.randint(0, 256, (90, 150, 3), generator=torch.Generator().manual_seed(SEED), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def slowly(encoder: Encoder, pixels: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Encode each sub-view by itself and lay its tokens into the large map one place at a time."""
    height, width = encoder.spec.image_size
    maps: list[Tensor] = []
    for scale in scales:
        resized = interpolate(pixels, size=(scale * height, scale * width), mode="bicubic")
        rows, columns = encoder.token_spec.grid or (0, 0)
        large = torch.zeros(len(pixels), encoder.spec.dim, scale * rows, scale * columns)
        for row in range(scale):
            for column in range(scale):
                view = resized[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width]
                tokens = encoder(view).tokens
                for place in range(rows * columns):
                    down, right = row * rows + place // columns, column * columns + place % columns
                    large[:, :, down, right] = tokens[:, place]
        maps.append(large)
    brought = [interpolate(each, size=maps[0].shape[2:], mode="area") for each in maps]
    return torch.cat(brought, dim=1)


@pytest.mark.parametrize("scales", [(1, 2), (1, 2, 3), (2, 3), (2,), (1,)])
@pytest.mark.parametrize("size", [(28, 28), (14, 35)])
@torch.no_grad()
def test_the_plain_version_gives_the_same(clip_spec: Any, size: tuple[int, int], scales: tuple[int, ...]) -> None:
    from vlm_encoders.encoders.transformers_backend import TransformersEncoder

    torch.manual_seed(1)
    encoder = TransformersEncoder.build(clip_spec.resized(size), pretrained=False, dtype=torch.float32).eval()
    whole = MultiScale(encoder, scales=scales).eval()
    pixels = torch.randn(2, *whole.pixel_shape, generator=torch.Generator().manual_seed(SEED))
    visual = whole(pixels)
    assert whole.pixel_shape == (3, scales[-1] * size[0], scales[-1] * size[1])
    assert visual.grid == (scales[0] * size[0] // 7, scales[0] * size[1] // 7)
    # The same sub-views in batches of another size: matrix products may add in another order.
    assert torch.allclose(visual.as_map(), slowly(encoder, pixels, scales), atol=1e-5)


def test_sub_views_lie_in_their_places(clip: Encoder) -> None:
    whole = MultiScale(clip, scales=(2,)).eval()
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        grid, lower_left = whole(pixels).as_map(), clip(pixels[:, :, 28:, :28]).as_map()
    assert torch.allclose(grid[:, :, 4:, :4], lower_left, atol=1e-5)


def test_pixels_are_made_once_at_the_largest_scale(photo: Image.Image) -> None:
    whole = create_encoder("multiscale[scales=1/2]:tiny-digits")
    part = encoder_spec("tiny-digits").resized(128)
    assert torch.equal(whole.preprocess(photo), ViewPixels(part)(photo))
    assert whole.encode([photo, photo]).spec == whole.token_spec


@pytest.mark.parametrize(
    "name",
    [
        "multiscale:tiny-digits",
        "multiscale:tiny-digits[image_size=32x64,feature_layer=-2]",
        "multiscale[scales=1/3]:clip-vit-b-32",
        "multiscale[scales=2/3]:swin-t-224",
        "multiscale:(multiscale:tiny-digits)",
    ],
)
def test_the_contract_of_encoders_holds(name: str) -> None:
    check_encoder(name)


def test_the_budget_counts_each_encoding() -> None:
    name, part = "multiscale[scales=1/2/3]:clip-vit-l-14-336", encoder_spec("clip-vit-l-14-336")
    spec = encoder_spec(name)
    assert spec.image_size == (1008, 1008)
    assert (spec.token_spec().num_tokens, spec.dim) == (576, 3 * 1024)
    assert encoder_flops(spec) == (1 + 4 + 9) * (encoder_flops(part) or 0)
    assert (spec.parameters, spec.kept_layers, spec.num_prefix) == (part.parameters, part.kept_layers, 0)
    assert token_budget(name, "mlp").pixel_bytes == 2 * 3 * 1008 * 1008


def test_size_and_layer_are_the_part_s() -> None:
    whole = create_encoder("multiscale:tiny-digits", pretrained=False, image_size=(64, 192), feature_layer=(-1, -3))
    assert isinstance(whole, MultiScale)
    assert whole.spec.part.image_size == (32, 96)
    assert whole.token_spec.grid == (4, 12)
    assert whole.token_spec.dim == 2 * 2 * 128
    assert create_encoder(**json.loads(json.dumps({**whole.origin}))).spec == whole.spec
    assert encoder_spec("multiscale:tiny-digits").token_spec((64, 64)).grid == (4, 4)
    squashed = whole.spec.altered(resize="squash")
    assert [spec.resize for spec in squashed.pixel_specs] == ["squash"]


def test_python_and_name_are_one(photo: Image.Image) -> None:
    part = create_encoder("tiny-digits", image_size=(32, 64), feature_layer=-2)
    whole = MultiScale(part, scales=[1, 3]).eval()
    assert whole.blocks() == part.blocks()
    again = create_encoder(**json.loads(json.dumps(whole.origin)))
    assert again.spec == whole.spec
    assert torch.equal(whole.encode(photo).tokens, again.encode(photo).tokens)
    part.origin = {}
    assert MultiScale(part).origin == {}


def test_bfloat16_stays_bfloat16() -> None:
    whole = create_encoder("multiscale:tiny-digits", pretrained=False, dtype="bfloat16")
    assert whole(torch.randn(1, *whole.pixel_shape).bfloat16()).tokens.dtype == torch.bfloat16


@pytest.mark.parametrize("scales", [(), (2, 1), (1, 1), (0, 1), (1.5,), ("1",)])
def test_scales_that_do_not_grow_are_refused(clip: Encoder, scales: Any) -> None:
    with pytest.raises(VlmError, match="scales are growing whole numbers"):
        MultiScale(clip, scales=scales)


def test_a_size_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(VlmError, match="65x64 does not divide into 2x2 sub-views"):
        encoder_spec("multiscale:tiny-digits").resized((65, 64))
    with pytest.raises(VlmError, match="image size 33x32 is not a multiple of 8"):
        encoder_spec("multiscale:tiny-digits").resized((66, 64))


def test_tokens_without_a_grid_are_refused(clip: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    from connectors.tokens import TokenSpec

    monkeypatch.setattr(type(clip.spec), "token_spec", lambda _: TokenSpec(4, 32))
    with pytest.raises(TokenShapeError, match="have no grid to be put together by"):
        multiscale_spec(clip.spec, "multiscale:flat")
