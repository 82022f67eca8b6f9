"""Packs of views of many sizes against the library's own models on one view at a time, with the same small weights."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from connectors.tokens import PackedTokens
from vlm_encoders.encoder import Encoder
from vlm_encoders.registry import create_encoder

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 40,
}
DINO: dict[str, Any] = {key: value for key, value in VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
QWEN: dict[str, Any] = {"depth": 4, "num_heads": 2, "patch_size": 4, "hidden_size": 32}
QWEN25: dict[str, Any] = {**QWEN, "intermediate_size": 48, "out_hidden_size": 24}
LIBRARY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "aimv2": ("Aimv2VisionModel", "Aimv2VisionConfig", {**VIT, "is_native": True}),
    "dinov2": ("Dinov2Model", "Dinov2Config", DINO),
    "dinov2-reg": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {**DINO, "num_register_tokens": 3}),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**VIT, "num_register_tokens": 4}),
    "naflex": (
        "models.siglip2.modeling_siglip2.Siglip2VisionModel",
        "Siglip2VisionConfig",
        {key: value for key, value in VIT.items() if key != "image_size"} | {"num_patches": 25},
    ),
    "pixtral": ("PixtralVisionModel", "PixtralVisionConfig", {**VIT, "hidden_act": "silu"}),
    "qwen2": (
        "models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        "Qwen2VLVisionConfig",
        {**QWEN, "embed_dim": 32, "hidden_size": 24, "mlp_ratio": 2},
    ),
    "qwen25": (
        "models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
        "Qwen2_5_VLVisionConfig",
        {**QWEN25, "window_size": 16, "fullatt_block_indexes": [2]},
    ),
    "qwen3": (
        "models.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel",
        "Qwen3VLVisionConfig",
        {**QWEN25, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]},
    ),
    "tipsv2": ("Tipsv2VisionModel", "Tipsv2VisionConfig", DINO),
}
NAFLEXVIT: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "patch_size": 8,
    "pos_embed_grid_size": (5, 5),
}
TIMM = {
    "naflexvit": "naflexvit_base_patch16_gap",
    "naflexvit-cls": "naflexvit_base_patch16_map",
    "naflexvit-par": "naflexvit_base_patch16_par_gap",
    "naflexvit-parfac": "naflexvit_base_patch16_parfac_gap",
    "naflexvit-siglip": "naflexvit_base_patch16_siglip",
}
NORMS = {"aimv2": "rms_norm", "dinov3": "norm", "naflex": "post_layernorm"}
UNNORMED = ("pixtral", "qwen2", "qwen25", "qwen3", "naflexvit", "naflexvit-par", "naflexvit-parfac")
KINDS = (*LIBRARY, *TIMM)
# In patches, in blocks of 2 x 2 for Qwen: two of one size, one token or row alone, equal lengths, the native size.
GRIDS = [(3, 4), (1, 6), (4, 3), (1, 1), (3, 4), (5, 5), (2, 1), (7, 2)]
Sequenced = Callable[[Tensor, Tensor | None], list[Tensor]]


def shake(model: nn.Module) -> nn.Module:
    """Give every parameter, the zero-initialised ones too, a random value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@cache
def library(kind: str) -> Any:
    """Make the library's whole model."""
    import timm
    import transformers

    torch.manual_seed(1)
    if kind in TIMM:
        return shake(timm.create_model(TIMM[kind], num_classes=0, **NAFLEXVIT))
    path, config, shape = LIBRARY[kind]
    module, _, name = path.rpartition(".")
    found = importlib.import_module(f"transformers.{module}") if module else transformers
    make = getattr(found, config, None) or getattr(transformers, config)
    return shake(getattr(found, name)(make(**copy.deepcopy(shape))))


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Encoder]:
    """Give what builds the encoder of a kind from the folder that its library saved."""

    @cache
    def folder(kind: str) -> str:
        path = tmp_path_factory.mktemp(kind)
        if kind in TIMM:
            from timm.models import save_for_hf

            save_for_hf(library(kind), path, model_args=NAFLEXVIT, safe_serialization=True)
            return f"timm:{path}"
        library(kind).save_pretrained(path)
        return f"hf:{path}"

    def built(kind: str, **options: Any) -> Encoder:
        return create_encoder(folder(kind), **options)

    return built


def views_of(grids: Sequence[tuple[int, int]] = GRIDS, seed: int = 3) -> list[Tensor]:
    """Give random pixels; of 8 px a patch, or a block of Qwen's."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 8 * rows, 8 * columns, generator=generator) for rows, columns in grids]


def one(encoder: Encoder, view: Tensor, build: Callable[..., Encoder], kind: str, **options: Any) -> PackedTokens:
    """Encode one view by the same weights, built for its size."""
    sized = build(kind, image_size=(view.shape[1], view.shape[2]), **options)
    return PackedTokens.join([sized(view[None])])


def joined(packed: PackedTokens) -> list[Tensor]:
    """Give each view's tokens (P + N, D)."""
    return [
        visual.tokens[0] if visual.prefix is None else torch.cat([visual.prefix[0], visual.tokens[0]])
        for visual in packed.split()
    ]


def block_places(rows: int, columns: int) -> Tensor:
    """Give the place of each of Qwen's patches, row by row."""
    return torch.tensor(
        [
            (2 * block_row + row) * columns + 2 * block_column + column
            for block_row in range(rows // 2)
            for block_column in range(columns // 2)
            for row in range(2)
            for column in range(2)
        ]
    )


def qwen_states(kind: str, model: Any, view: Tensor) -> list[Tensor]:
    """Give each block's tokens by the library's own way, put row by row."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.vision_utils import get_vision_window_index

    patches, rows, columns = Qwen2VLImageProcessor().patchify(view[None], 4, 2, 2)
    grid = torch.tensor([[1, rows, columns]])
    order = block_places(rows, columns)
    if kind == "qwen25":
        windows, _ = get_vision_window_index(grid, 2, model.window_size, 4)
        order = order.reshape(-1, 4)[windows].flatten()
    states = model(patches.reshape(-1, patches.shape[-1]), grid_thw=grid, output_hidden_states=True).hidden_states[1:]
    return [torch.empty_like(state).index_copy(0, order, state) for state in states]


def library_states(kind: str, view: Tensor) -> list[Tensor]:
    """Give each block's tokens (P + N, D) of one view, by the library's own way."""
    model = library(kind)
    if kind.startswith("qwen"):
        return qwen_states(kind, model, view)
    if kind in TIMM:
        options = {"return_prefix_tokens": True} if model.num_prefix_tokens else {}
        found = model.forward_intermediates(view[None], output_fmt="NLC", intermediates_only=True, **options)
        return [torch.cat([layer[1][0], layer[0][0]]) if options else layer[0] for layer in found]
    if kind == "naflex":
        from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

        patches = convert_image_to_patches(view, 8)[None]
        shape = torch.tensor([[view.shape[1] // 8, view.shape[2] // 8]])
        mask = torch.ones(patches.shape[:2], dtype=torch.int32)
        outputs = model(patches, pixel_attention_mask=mask, spatial_shapes=shape, output_hidden_states=True)
    else:
        outputs = model(view[None], output_hidden_states=True)
    return [state[0] for state in outputs.hidden_states[1:]]


def is_close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Hold one to the other within a part of the largest value: sums of other lengths are cut into other tiles."""
    largest = max(float(expected.detach().abs().max()), 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * largest)


def apart(found: Tensor, expected: Tensor) -> float:
    """Give the largest difference as a part of the largest value."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_is_the_library_on_one_view_at_a_time(kind: str, build: Callable[..., Encoder]) -> None:
    views = views_of()
    with torch.no_grad():
        states = [library_states(kind, view) for view in views]
        for layers in ((-1,), (-2,), (-3, -1)):
            encoder = build(kind, feature_layer=layers, final_norm=False)
            packed = encoder.forward_packed(views)
            assert packed.grids == [encoder.spec.token_spec((v.shape[1], v.shape[2])).grid for v in views]
            for found, own in zip(joined(packed), states, strict=True):
                is_close(found, torch.cat([own[layer] for layer in layers], dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_is_the_same_encoder_built_for_each_size(kind: str, build: Callable[..., Encoder]) -> None:
    """With its own last norm, or none, as it comes; places are those that a size is built with."""
    views = [views_of()[place] for place in (0, 1, 5)]
    with torch.no_grad():
        for view, found in zip(views, joined(build(kind).forward_packed(views)), strict=True):
            sized = build(kind, image_size=(view.shape[1], view.shape[2]))
            is_close(found, joined(PackedTokens.join([sized(view[None])]))[0])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNNORMED])
def test_each_layer_is_normed_as_in_the_library(kind: str, build: Callable[..., Encoder]) -> None:
    views = views_of()
    norm = library(kind).get_submodule(NORMS.get(kind, "norm" if kind in TIMM else "layernorm"))
    with torch.no_grad():
        packed = build(kind, feature_layer=(-1, -3), final_norm=True).forward_packed(views)
        for view, found in zip(views, joined(packed), strict=True):
            states = library_states(kind, view)
            is_close(found, torch.cat([norm(states[layer]) for layer in (-1, -3)], dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_views_do_not_see_each_other_and_keep_their_order(kind: str, build: Callable[..., Encoder]) -> None:
    encoder, views = build(kind), views_of()
    with torch.no_grad():
        found = joined(encoder.forward_packed(views))
        other = joined(encoder.forward_packed([*views[:3], 2 * views[3], *views[4:]]))
        order = [5, 0, 7, 2, 4, 1, 6, 3]
        turned = joined(encoder.forward_packed([views[place] for place in order]))
    for place, view in enumerate(found):
        # The same sums in the same places: not one bit may change.
        assert torch.equal(view, other[place]) == (place != 3), place
    for place, view in zip(order, turned, strict=True):
        is_close(view, found[place])


def gradients(encoder: Encoder) -> dict[str, Tensor]:
    """Give what reached the parameters, and clear it."""
    found = {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}  # type: ignore[union-attr]
    encoder.zero_grad()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_view_at_a_time(kind: str, build: Callable[..., Encoder]) -> None:
    encoder, views = build(kind, feature_layer=(-2, -1)), views_of()
    weights = [torch.randn_like(found) for found in joined(encoder.forward_packed(views))]

    def loss(packed: PackedTokens, places: Sequence[int]) -> Tensor:
        found = joined(packed)
        return torch.stack([(found[at] * weights[place]).sum() for at, place in enumerate(places)]).sum()

    loss(encoder.forward_packed(views), range(len(views))).backward()
    together = gradients(encoder)
    for place, view in enumerate(views):
        loss(encoder.forward_packed([view]), [place]).backward()
    alone = gradients(encoder)
    assert together.keys() == alone.keys()
    for name, gradient in together.items():
        is_close(gradient, alone[name], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_near_as_its_digits(kind: str, build: Callable[..., Encoder]) -> None:
    views = [view.bfloat16() for view in views_of()]
    encoder, exact = build(kind, dtype="bfloat16"), build(kind)
    with torch.no_grad():
        packed = joined(encoder.forward_packed(views))
        single = [joined(encoder.forward_packed([view]))[0] for view in views]
        wanted = joined(exact.forward_packed([view.float() for view in views]))
        with torch.autocast("cpu", torch.bfloat16):
            cast = joined(exact.forward_packed([view.float() for view in views]))
    for found, alone, own, mixed in zip(packed, single, wanted, cast, strict=True):
        assert found.dtype == torch.bfloat16
        assert apart(found.float(), alone.float()) < 0.01
        assert apart(found.float(), own) < 0.03
        assert apart(mixed.float(), own) < 0.05


def subset_of_qwen(kind: str, model: Any, view: Tensor, chosen: Tensor) -> Tensor:
    """Run the library's blocks on some patches, in rows or, where there are windows, window by window."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    patches, rows, columns = Qwen2VLImageProcessor().patchify(view[None], 4, 2, 2)
    in_blocks = model.patch_embed(patches.reshape(-1, patches.shape[-1]))
    hidden = torch.empty_like(in_blocks).index_copy(0, block_places(rows, columns), in_blocks)
    if kind == "qwen3":
        table = model.pos_embed.weight.unflatten(0, (1, 6, 6)).permute(0, 3, 1, 2)
        table = nn.functional.interpolate(table, (rows, columns), mode="bilinear", align_corners=True)
        hidden = hidden + table.flatten(2)[0].T
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))[chosen]
    hidden = hidden[chosen]
    order, bounds = torch.arange(len(chosen)), torch.tensor([0, len(chosen)])
    windows = bounds
    if kind == "qwen25":
        # A window of 16 px is 4 x 4 patches.
        window = (places // 4) @ torch.tensor([100, 1])
        order = window.argsort(stable=True)
        windows = torch.tensor([0, *window.unique(return_counts=True)[1].cumsum(0).tolist()])
    hidden, angles = hidden[order], model.rotary_pos_emb(hidden, places[order])
    for number, block in enumerate(model.blocks):
        within = bounds if kind != "qwen25" or number in model.fullatt_block_indexes else windows
        hidden = block(hidden, cu_seqlens=within, position_embeddings=angles)
    return torch.empty_like(hidden).index_copy(0, order, hidden)


def subset_of_timm(kind: str, model: Any, view: Tensor, chosen: Tensor) -> Tensor:
    """Let timm drop patches by itself, as it does in training, but these."""
    count = model.num_prefix_tokens
    kept = torch.cat([torch.arange(count), count + chosen])
    model.patch_drop = lambda hidden: (hidden[:, kept], chosen[None])
    model.train()
    try:
        return library_states(kind, view)[-1]
    finally:
        model.eval()
        model.patch_drop = None


def subset_of(kind: str, view: Tensor, chosen: Tensor) -> Tensor:
    """Run the library's parts on some patches of one view, places as in the whole; the last block's (P + n, D)."""
    model = library(kind)
    if kind.startswith("qwen"):
        return subset_of_qwen(kind, model, view, chosen)
    if kind in TIMM:
        return subset_of_timm(kind, model, view, chosen)
    told: dict[str, Any] = {}
    prefix = 0
    if kind == "naflex":
        from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

        shape = torch.tensor([[view.shape[1] // 8, view.shape[2] // 8]])
        hidden = model.embeddings(convert_image_to_patches(view, 8)[None], shape)
    elif kind == "pixtral":
        maps = model.patch_conv(view[None])
        hidden = model.ln_pre(maps.flatten(2).transpose(1, 2))
        places = torch.cartesian_prod(torch.arange(maps.shape[2]), torch.arange(maps.shape[3]))
        told = {"position_embeddings": model.patch_positional_embedding(hidden, places[chosen])}
    else:
        hidden = model.embeddings(view[None])
        prefix = hidden.shape[1] - (view.shape[1] // 8) * (view.shape[2] // 8)
    if kind == "dinov3":
        told = {"position_embeddings": tuple(each[chosen] for each in model.rope_embeddings(view[None]))}
    hidden = torch.cat([hidden[:, :prefix], hidden[:, prefix + chosen]], dim=1)
    owner = {"dinov3": "model", "pixtral": "transformer"}.get(kind, "encoder")
    for layer in getattr(getattr(model, owner), "layer", None) or getattr(model, owner).layers:
        found = layer(hidden, attention_mask=None, **told)
        hidden = found[0] if isinstance(found, tuple) else found
    return hidden[0]


@pytest.mark.parametrize("kind", KINDS)
def test_kept_tokens_are_the_librarys_blocks_on_them_alone(kind: str, build: Callable[..., Encoder]) -> None:
    encoder, views = build(kind, feature_layer=-1, final_norm=False), views_of()
    generator = torch.Generator().manual_seed(5)
    kept = []
    for number, view in enumerate(views):
        total = encoder.spec.token_spec((view.shape[1], view.shape[2])).num_tokens
        count = total if number == 0 else -(-total // (1 + number % 3))
        kept.append(torch.randperm(total, generator=generator)[:count].sort().values)
    with torch.no_grad():
        packed = encoder.forward_packed(views, kept)
        assert packed.lengths == [len(chosen) for chosen in kept]
        assert [grid is None for grid in packed.grids][:3] == [False, True, True]
        for view, chosen, found in zip(views, kept, joined(packed), strict=True):
            is_close(found, subset_of(kind, view, chosen))
        whole = [torch.arange(spec.num_tokens) for spec in encoder.forward_packed(views).specs]
        assert torch.equal(encoder.forward_packed(views, whole).tokens, encoder.forward_packed(views).tokens)
