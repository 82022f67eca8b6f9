"""Packs size by size, what is refused of packs, and attention within the images of a pack."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner

from connectors.errors import TokenShapeError, VlmError
from vlm_encoders.cli.main import app
from vlm_encoders.encoders.pack_attention import PackAttention
from vlm_encoders.encoders.towers import SOURCES, tower
from vlm_encoders.registry import create_encoder, encoder_spec, list_encoders
from vlm_encoders.testing import check_encoder
from vlm_encoders.tiling import build_tiler

CONVNEXT: dict[str, Any] = {"image_size": 64, "hidden_sizes": [8, 12, 16], "depths": [1, 2, 1]}
SAM2: dict[str, Any] = {
    "backbone_config": {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "image_size": [64, 64],
        "blocks_per_stage": [1, 2, 3, 2],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [8, 4, 4, 2],
        "global_attention_blocks": [4],
    },
    "backbone_channel_list": [64, 32, 16, 8],
    "fpn_hidden_size": 24,
}
MAPS: dict[str, tuple[str, dict[str, Any]]] = {
    "convnext": ("ConvNextModel", {**CONVNEXT, "num_stages": 3}),
    "dinov3-convnext": ("DINOv3ConvNextModel", CONVNEXT),
    "sam2": ("Sam2VisionModel", SAM2),
}
DINO: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
    "mlp_ratio": 2,
}
QWEN2: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "embed_dim": 32,
    "hidden_size": 24,
    "mlp_ratio": 2,
}
SIZES = [(64, 96), (32, 64), (64, 96), (64, 64), (96, 32), (128, 64)]


def shake(model: nn.Module) -> nn.Module:
    """Give every parameter, the zero-initialised ones too, a random value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def saved(source: str, shape: dict[str, Any], folder: Path) -> Any:
    """Make the library's whole model and save it as the library does."""
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, source.replace("Model", "Config"))
    model = shake(getattr(transformers, source)(config(**copy.deepcopy(shape))))
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


def views_of(sizes: list[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def is_close(found: Tensor, expected: Tensor) -> None:
    """Hold one to the other within a part of the largest value: a batch's sums may be cut into other tiles."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * max(float(expected.abs().max()), 1.0))


def map_of(kind: str, model: Any, view: Tensor) -> Tensor:
    """Give what the library gives of a view, as a map (D, R, C) or tokens (N, D)."""
    if kind == "sam2":
        return model(view[None]).fpn_hidden_states[-1][0].flatten(1).T
    last = model(view[None]).last_hidden_state[0]
    return last.flatten(1).T if kind == "convnext" else last[1:]


@pytest.mark.parametrize("kind", MAPS)
def test_whole_maps_are_the_librarys_on_one_view_at_a_time(kind: str, tmp_path: Path) -> None:
    model = saved(*MAPS[kind], tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}")
    several = create_encoder(f"hf:{tmp_path}", feature_layer=(-1, -2), final_norm=False)
    with torch.no_grad():
        packed = encoder.forward_packed(views_of(SIZES))
        for view, found in zip(views_of(SIZES), packed.split(), strict=True):
            is_close(found.tokens[0], map_of(kind, model, view))
            assert found.grid == encoder.spec.token_spec((view.shape[1], view.shape[2])).grid
        for view, found in zip(views_of(SIZES), several.forward_packed(views_of(SIZES)).split(), strict=True):
            sized = create_encoder(
                f"hf:{tmp_path}", image_size=(view.shape[1], view.shape[2]), feature_layer=(-1, -2), final_norm=False
            )
            is_close(found.tokens, sized(view[None]).tokens)
    with pytest.raises(VlmError, match="reads whole maps, so no token can be dropped; drop none"):
        encoder.forward_packed(views_of(SIZES)[:1], [torch.arange(2)])


def test_timm_s_convnext_is_timm_s_on_one_view_at_a_time() -> None:
    encoder = create_encoder("timm:test_convnext", pretrained=False)
    views = views_of([(96, 64), (64, 32), (96, 64), (160, 160)])
    with torch.no_grad():
        packed = encoder.forward_packed(views)
        for view, found in zip(views, packed.split(), strict=True):
            (expected,) = encoder.network.forward_intermediates(view[None], indices=1, intermediates_only=True)  # type: ignore[operator, union-attr]
            torch.testing.assert_close(found.as_map(), expected, rtol=0, atol=1e-6)


def test_qwen_refuses_views_that_do_not_fill_its_blocks(tmp_path: Path) -> None:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import (
        Qwen2VisionTransformerPretrainedModel,
        Qwen2VLVisionConfig,
    )

    Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**QWEN2)).save_pretrained(tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}")
    with pytest.raises(VlmError, match=r"28x40 is not a multiple of 8, the 2x2 patches .* use (24|32)x40"):
        encoder.forward_packed(views_of([(16, 16), (28, 40)]))
    with pytest.raises(VlmError, match="30x40 is not a multiple of 4"):
        encoder.forward_packed(views_of([(30, 40)]))


def test_other_attention_than_torch_s_own_is_refused(tmp_path: Path) -> None:
    saved("Dinov2Model", DINO, tmp_path / "dino")
    encoder = create_encoder(f"hf:{tmp_path / 'dino'}", attn_implementation="eager")
    assert not encoder.spec.packs
    with pytest.raises(VlmError, match="an encoder of native resolution with torch's own attention"):
        encoder.forward_packed(views_of([(16, 16)]))
    with pytest.raises(VlmError, match=r"takes one; .* with torch's own attention"):
        build_tiler("native", encoder.spec).check(encoder.spec)
    changed: Any = create_encoder(f"hf:{tmp_path / 'dino'}")
    changed.network.set_attn_implementation("eager")
    with pytest.raises(VlmError, match="this network has attn_implementation='eager'; build it with 'sdpa'"):
        changed.forward_packed(views_of([(16, 16)]))
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    network = timm.create_model("naflexvit_base_patch16_gap", num_classes=0, **small)
    save_for_hf(network, tmp_path / "timm", model_args=small, safe_serialization=True)
    name = f"timm:{tmp_path / 'timm'}"
    spelled = create_encoder(name, attn_implementation="eager")
    with pytest.raises(VlmError, match="2 of its blocks ran and 0 of them attended by torch's"):
        spelled.forward_packed(views_of([(16, 16)]))
    turned = create_encoder(name, pretrained=False, rope_type="axial")
    with pytest.raises(VlmError, match="rotary angles are those of one grid; leave rope_type out"):
        turned.forward_packed(views_of([(16, 16)]))
    dropping = create_encoder(name, patch_drop_rate=0.5).train()
    with pytest.raises(VlmError, match="drops patches by itself; leave patch_drop_rate out"):
        dropping.forward_packed(views_of([(16, 16)]))


@pytest.mark.parametrize(
    "places",
    [
        torch.tensor([0, 1, 48]),
        torch.tensor([-1, 0]),
        torch.tensor([1, 1]),
        torch.tensor([2, 0]),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([[0, 1]]),
        torch.tensor([0.0, 1.0]),
        torch.ones(16, dtype=torch.bool),
        [0, 1],
    ],
    ids=str,
)
def test_kept_places_that_are_not_those_of_a_view_are_refused(tmp_path: Path, places: Any) -> None:
    saved("Dinov2Model", DINO, tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}")
    views = views_of([(16, 16), (16, 16)])
    with pytest.raises(VlmError, match=r"the kept tokens of view 1 are to be growing places \(n,\) from 0 to"):
        encoder.forward_packed(views, [torch.arange(2), places])


def test_gradient_checkpointing_is_refused(tmp_path: Path) -> None:
    saved("Dinov2Model", DINO, tmp_path)
    encoder: Any = create_encoder(f"hf:{tmp_path}").train()
    encoder.network.activation_checkpointing_enable()
    with pytest.raises(VlmError, match=r"gradient checkpointing would compute blocks again .* switch it off"):
        encoder.forward_packed(views_of([(16, 16)]))
    encoder.eval().forward_packed(views_of([(16, 16)]))


def test_encoders_of_one_size_refuse_packs() -> None:
    for name in ("clip-vit-b-32", "aimv2-l-14-224", "timm:vit_small_patch14_reg4_dinov2"):
        assert not encoder_spec(name).packs
    with pytest.raises(VlmError, match="it encodes views of one size"):
        create_encoder("timm:test_vit", pretrained=False).forward_packed(views_of([(160, 160)]))


def test_joints_of_encoders_that_pack_do_not() -> None:
    part = "naflexvit-b-16"
    for name in (f"multiscale:{part}", f"fused:{part}+{part}"):
        spec = encoder_spec(name)
        assert not spec.packs
        assert not spec.altered(exact_pixels=True).packs


def test_the_table_says_what_the_towers_say() -> None:
    native = ("qwen", "pixtral", "siglip2-naflex", "naflexvit", "dinov2", "dinov3", "sam2", "tipsv2", "convnext")
    for spec in map(encoder_spec, list_encoders()):
        wanted = spec.name.startswith(native) or spec.name == "aimv2-l-14-native"
        assert spec.packs == wanted, spec.name
        assert spec.resized(spec.image_size).packs == wanted
        if spec.source in SOURCES and spec.family != "aimv2":
            assert tower(spec.source).packs == wanted, spec.name  # type: ignore[union-attr]


def test_info_says_so() -> None:
    said = CliRunner().invoke(app, ["info", "siglip2-naflex-b-16"]).output
    assert "any whose tokens come out whole; views of many sizes are encoded together" in said
    assert "together" not in CliRunner().invoke(app, ["info", "clip-vit-b-32"]).output


def test_the_contract_holds_a_pack() -> None:
    check_encoder("dinov3-vit-s-16", feature_layer=-11)


def test_the_contract_finds_a_pack_that_breaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_encoders.encoders.pack_views import Pack

    unpack = Pack.unpack

    def first_layer_of_all(pack: Pack, hidden: Tensor) -> Any:
        found = unpack(pack, hidden)
        return found.with_tokens(found.tokens[:, :-1])

    monkeypatch.setattr(Pack, "unpack", first_layer_of_all)
    with pytest.raises(VlmError, match="in a pack it gives TokenSpec"):
        check_encoder("siglip2-naflex-b-16", feature_layer=-11)


def attention_inputs(total: int, heads: int = 3) -> list[Tensor]:
    """Give queries, keys and values (1, heads, M, d) as networks have them: heads next to last in memory."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(1, total, heads, 8, generator=generator).transpose(1, 2) for _ in range(3)]


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [1, 3, 3, 2, 7, 7], [2, 5, 2]])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}])
def test_attention_in_a_pack_is_masked_attention(lengths: list[int], options: dict[str, Any]) -> None:
    """The reference is one call with a mask: images are blocks on its diagonal."""
    parts = [part.requires_grad_() for part in attention_inputs(sum(lengths))]
    image = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = image[:, None] == image
    if options.get("is_causal"):
        mask = mask & torch.ones_like(mask).tril()
    scale = options.get("scale")
    expected = scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale)
    with PackAttention(lengths, "x") as attention:
        found = nn.functional.scaled_dot_product_attention(*parts, **options)
    attention.check(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    weight = torch.randn_like(found)
    ours = torch.autograd.grad((found * weight).sum(), parts)
    for one, other in zip(ours, torch.autograd.grad((expected * weight).sum(), parts), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_attention_of_another_shape_is_refused() -> None:
    query, key, value = attention_inputs(6)
    with PackAttention([2, 4], "x"):
        with pytest.raises(TokenShapeError, match="attends under a mask by a query"):
            scaled_dot_product_attention(query, key, value, torch.ones(6, 6, dtype=torch.bool))
        with pytest.raises(TokenShapeError, match="a pack of 6 tokens is one sequence without a mask"):
            scaled_dot_product_attention(query[:, :, :1], key, value)
    # Outside, and in other threads, nothing is split.
    assert scaled_dot_product_attention(query[:, :, :1], key, value).shape == (1, 3, 1, 8)


def test_attention_of_another_thread_is_its_own() -> None:
    from concurrent.futures import ThreadPoolExecutor

    parts = attention_inputs(6)
    with ThreadPoolExecutor(1) as pool, PackAttention([2, 4], "x"):
        whole = pool.submit(scaled_dot_product_attention, *parts).result()
        split = scaled_dot_product_attention(*parts)
    assert not torch.allclose(whole, split)
    assert torch.equal(whole, scaled_dot_product_attention(*parts))


def test_timm_s_names_tell_packs() -> None:
    assert encoder_spec("timm:naflexvit_base_patch16_map").packs
    assert encoder_spec("timm:test_convnext").packs
    assert not encoder_spec("timm:test_resnet").packs
