"""Budgets against transformers: counts, parameters and FLOPs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from connectors.errors import TokenShapeError, UnknownNameError, VlmError
from vlm_encoders.budget import encoder_flops, image_counts, token_budget
from vlm_encoders.released_budget import RELEASED, released_budgets
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling import PRESETS, AnyResTiler, InternVLTiler, TileLayout, build_tiler
from vlm_encoders.tiling.counts import marks_in

CLIP = EncoderSpec(
    name="tiny-clip",
    family="clip",
    backend="transformers",
    source="CLIPVisionModel",
    weights=None,
    image_size=(336, 336),
    stride=14,
    dim=1024,
    heads=16,
    mlp_dim=4096,
    num_layers=24,
    num_prefix=1,
    feature_layer=-2,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
TINY = replace(CLIP, image_size=(56, 56), dim=48, heads=4, mlp_dim=112, num_layers=3)
SIZES = [(336, 336), (480, 640), (1080, 1920), (1920, 1080), (672, 672), (20, 1527), (352, 836)]


def total(name: str, size: tuple[int, int]) -> int:
    return next(row.total for row in released_budgets(size) if row.name == name)


@pytest.mark.parametrize("size", SIZES)
def test_released_counts_are_those_of_the_transformers_processors(size: tuple[int, int]) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<image>": 0}, "<image>")))
    processor: Any = LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": 336}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    theirs = processor._get_num_multimodal_tokens(image_sizes=[list(size)]).num_image_tokens
    assert [total("LLaVA-NeXT", size)] == theirs
    internvl: Any = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=12)
    assert total("InternVL 1.5 to 3", size) == 256 * internvl.get_number_of_image_patches(*size)


def test_released_counts_are_the_published_ones() -> None:
    published = {(336, 336): 1176, (480, 640): 2340, (1080, 1920): 1948, (1920, 1080): 1968, (672, 672): 2928}
    assert {size: total("LLaVA-NeXT", size) for size in published} == published
    assert total("LLaVA-NeXT", (20, 1527)) == 576
    rows = {row.name: (row.views, row.per_view, row.total, row.markers) for row in released_budgets((1344, 1792))}
    assert rows == {
        "LLaVA-1.5": (1, 576, 576, 0),
        "LLaVA-NeXT": (5, 576, 2340, 0),
        # The image has 102x135 tokens of 4x5 tiles; the cap of 9 x 729 brings them down to 70x93, and rows have ends.
        "LLaVA-OneVision": (21, 729, 729 + 70 * 94, 0),
        "InternVL 1.5 to 3": (13, 256, 3328, 2),
        # 12 tiles with two marks each, 3 ends of rows, and a line break with three marks at the whole image.
        "Idefics3": (13, 169, 13 * 169, 31),
        "SmolVLM": (13, 64, 13 * 64, 31),
        # 28 px a token, 1280 at most: 31x41; Pixtral's 16 px a token, at most 64 along a side, 48 ends of rows.
        "Qwen2-VL": (1, 1230, 30 * 41, 2),
        "Pixtral": (1, 3072, 48 * 64, 48),
        "BLIP-2": (1, 32, 32, 0),
    }
    assert all(model.source.startswith("https://") for model in RELEASED.values())


def test_budget_of_a_clip_encoder_is_that_of_the_released_llava() -> None:
    for size in SIZES:
        budget = token_budget(CLIP, "mlp", image_size=size, tiler="anyres")
        assert budget.total == total("LLaVA-NeXT", size)
        assert token_budget(CLIP, "mlp", image_size=size).total == total("LLaVA-1.5", size) == 576


def test_a_name_gives_the_budget_of_its_spec() -> None:
    budget = token_budget("clip-vit-l-14-336", "mlp")
    assert RELEASED["LLaVA-1.5"].encoder.token_spec().num_tokens == budget.encoder_tokens == 576
    assert (budget.encoder, budget.encoder_flops) == ("clip-vit-l-14-336", encoder_flops(CLIP))
    with pytest.raises(UnknownNameError, match="clip-vit-l-14-336"):
        token_budget("clip-vit-l-14-337", "mlp")


@pytest.mark.parametrize(
    ("recipe", "per_view", "grid"),
    [
        ("linear", 576, (24, 24)),
        ("avg_pool:factor=2+mlp", 144, (12, 12)),
        ("pixel_shuffle:factor=3+mlp", 64, (8, 8)),
        ("qformer:layers=2+linear", 32, None),
        ("keep_prefix+mlp", 577, None),
    ],
)
def test_tokens_behind_each_connector(recipe: str, per_view: int, grid: tuple[int, int] | None) -> None:
    budget = token_budget(CLIP, recipe)
    assert (budget.per_view, budget.total, budget.grid, budget.views) == (per_view, per_view, grid, 1)
    flat = token_budget(
        CLIP, recipe, image_size=(480, 640), tiler="anyres", layout=TileLayout(unpad=False, newline=False)
    )
    assert (flat.views, flat.total) == (5, 5 * per_view)


def test_connector_parameters_are_those_of_llava_next() -> None:
    text, vision = SimpleNamespace(hidden_size=4096), SimpleNamespace(hidden_size=1024)
    config: Any = SimpleNamespace(
        text_config=text,
        vision_config=vision,
        vision_feature_layer=-2,
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
    )
    with torch.device("meta"):
        theirs = sum(parameter.numel() for parameter in LlavaNextMultiModalProjector(config).parameters())
    assert token_budget(CLIP, "mlp").connector_parameters == theirs
    assert token_budget(CLIP, "mlp", tiler="anyres").connector_parameters == theirs + 4096


def towers() -> list[Any]:
    sizes = {"hidden_size": 48, "intermediate_size": 112, "num_attention_heads": 4, "patch_size": 14, "image_size": 56}
    dinov2 = {**sizes, "mlp_ratio": 2}
    return [
        pytest.param(CLIPVisionModel, CLIPVisionConfig(**sizes), replace(TINY, family="clip"), id="clip"),
        pytest.param(
            SiglipVisionModel,
            SiglipVisionConfig(**sizes, vision_use_head=False),
            replace(TINY, family="siglip", num_prefix=0, prefix_kinds=()),
            id="siglip",
        ),
        pytest.param(Dinov2Model, Dinov2Config(**dinov2), replace(TINY, family="dinov2", mlp_dim=96), id="dinov2"),
    ]


@pytest.mark.parametrize(("model", "config", "spec"), towers())
@pytest.mark.parametrize("layer", [-1, -2])
def test_encoder_flops_are_those_that_torch_counts(model: Any, config: Any, spec: EncoderSpec, layer: int) -> None:
    spec = replace(spec, feature_layer=layer)
    config.num_hidden_layers = spec.kept_layers
    tower: nn.Module = model(config).eval().requires_grad_(requires_grad=False)
    # Older torch counts no fused attention on the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tower(torch.zeros(1, 3, 56, 56))
    assert encoder_flops(spec) == counter.get_total_flops()


def test_flops_are_of_all_views_and_unknown_for_windows() -> None:
    one, five = token_budget(CLIP, "mlp"), token_budget(CLIP, "mlp", image_size=(480, 640), tiler="anyres")
    assert one.encoder_flops is not None
    assert five.encoder_flops == 5 * one.encoder_flops
    assert five.connector_flops == 5 * one.connector_flops == 5 * 2 * 576 * (1024 + 4096) * 4096
    assert token_budget(replace(CLIP, windowed=True), "mlp").encoder_flops is None
    assert token_budget(replace(CLIP, mlp_dim=0), "mlp").encoder_flops is None
    assert token_budget("swin-b-224", "mlp").encoder_flops is None


def test_bytes_are_those_of_the_tensors() -> None:
    budget = token_budget(CLIP, "mlp", image_size=(480, 640), tiler="anyres", llm_dim=512, llm_layers=3, kv_dim=128)
    assert budget.pixel_bytes == torch.empty(5, 3, 336, 336, dtype=torch.bfloat16).nbytes
    assert budget.embedding_bytes == torch.empty(2340, 512, dtype=torch.bfloat16).nbytes
    assert budget.kv_cache_bytes == torch.empty(3, 2, 2340, 128, dtype=torch.bfloat16).nbytes
    assert token_budget(CLIP, "mlp", value_bytes=4).embedding_bytes == torch.empty(576, 4096).nbytes
    assert token_budget(CLIP, "mlp").kv_cache_bytes is None


def test_parameters_that_nobody_knows_are_none() -> None:
    assert token_budget(CLIP, "mlp").encoder_parameters is None
    assert token_budget(replace(CLIP, parameters=7), "mlp").encoder_parameters == 7


def test_wrong_combinations_are_refused() -> None:
    with pytest.raises(VlmError, match="cuts tiles of 448 px, but tiny-clip sees 336x336 px; use tile_size=336"):
        token_budget(CLIP, "mlp", image_size=(480, 640), tiler=InternVLTiler())
    with pytest.raises(VlmError, match="square views"):
        token_budget(replace(CLIP, image_size=(336, 672)), "mlp", tiler=AnyResTiler())
    with pytest.raises(TokenShapeError, match="32 queries"):
        token_budget(CLIP, "qformer:layers=1+linear", tiler="anyres", layout=AnyResTiler().layout)
    with pytest.raises(UnknownNameError, match="did you mean anyres"):
        token_budget(CLIP, "mlp", tiler="anyress")
    with pytest.raises(VlmError, match="at least 1 px"):
        token_budget(CLIP, "mlp", image_size=(0, 640))


def test_budget_imports_nothing_heavier_than_torch() -> None:
    code = (
        "import json, sys\n"
        "import vlm_encoders.budget as budget\n"
        "light = [name for name in ('torch',) if name in sys.modules]\n"
        "import vlm_encoders.released_budget as released\n"
        "released.released_budgets((480, 640))\n"
        "heavy = ('transformers', 'timm', 'open_clip', 'torchvision', 'matplotlib', 'accelerate', 'peft')\n"
        "print(json.dumps([light, [name for name in heavy if name in sys.modules]]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [[], []]


NATIVE = replace(TINY, name="tiny-native", packs=True)


@pytest.mark.parametrize("name", PRESETS)
def test_every_tiler_has_a_budget(name: str) -> None:
    preset = PRESETS[name]
    spec = preset.spec()
    for size in ((1, 1), (300, 20000), (1080, 1920)):
        budget = token_budget(spec, preset.connector, tiler=name, image_size=size)
        plan = build_tiler(name, spec).plan(size)
        counts = image_counts(spec, preset.connector, build_tiler(name, spec))
        runs = [piece for piece in counts.pieces(plan) if isinstance(piece, int)]
        assert (budget.views, budget.total) == (plan.num_views, sum(runs))
        area = sum(height * width for height, width in plan.views)
        assert budget.pixel_bytes == 2 * 3 * area
        assert budget.connector_flops > 0


@pytest.mark.parametrize("size", [(20, 500), (60, 60), (333, 222)])
def test_native_views_cost_what_their_own_size_costs(size: tuple[int, int]) -> None:
    budget = token_budget(NATIVE, "pixel_shuffle:factor=2+mlp", tiler="native:patch=14,merge=2", image_size=size)
    ((height, width),) = build_tiler("native:patch=14,merge=2", NATIVE).plan(size).views
    assert height % 28 == width % 28 == 0
    alone = token_budget(NATIVE.resized((height, width)), "pixel_shuffle:factor=2+mlp")
    for field in ("encoder_tokens", "per_view", "total", "grid", "pixel_bytes", "encoder_flops", "connector_flops"):
        assert getattr(budget, field) == getattr(alone, field), field
    assert budget.grid == (height // 28, width // 28)


def test_native_flops_are_those_that_torch_counts_of_each_view() -> None:
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=112, num_attention_heads=4, patch_size=14, image_size=56, num_hidden_layers=2
    )
    tower: nn.Module = CLIPVisionModel(config).eval().requires_grad_(requires_grad=False)
    tiler = build_tiler("llava-uhd:tile_size=56,slice_size=56", NATIVE)
    plan = tiler.plan((80, 210))
    assert len(set(plan.views)) == 2
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for height, width in plan.views:
            tower(torch.zeros(1, 3, height, width), interpolate_pos_encoding=True)
    budget = token_budget(NATIVE, "mlp", tiler=tiler, image_size=(80, 210))
    assert budget.encoder_flops == counter.get_total_flops()
    assert budget.total == sum(height // 14 * (width // 14) for height, width in plan.views)


def test_joined_scales_cost_the_encoder_each_view_and_the_connector_one() -> None:
    one, joined = token_budget(CLIP, "mlp"), token_budget(CLIP, "mlp", tiler="s2", image_size=(480, 640))
    assert one.encoder_flops is not None
    assert (joined.views, joined.total, joined.encoder_flops) == (14, 576, 14 * one.encoder_flops)
    assert joined.connector_flops == 2 * 576 * (3 * 1024 + 4096) * 4096
    assert joined.connector_parameters == one.connector_parameters + 2 * 1024 * 4096


def test_a_limit_of_tokens_chooses_the_best_plan_within() -> None:
    for limit in (577, 1200, 2000, 5000):
        budget = token_budget(CLIP, "mlp", tiler="anyres", image_size=(900, 700), max_tokens=limit)
        assert budget.total <= limit
    free = token_budget(CLIP, "mlp", tiler="anyres", image_size=(900, 700))
    assert budget.total == free.total
    with pytest.raises(
        VlmError, match="'anyres' needs at least 577 tokens for an image of 900x700 px, 576 are allowed"
    ):
        token_budget(CLIP, "mlp", tiler="anyres", image_size=(900, 700), max_tokens=576)


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("", 0),
        ("<img>", 1),
        ("<|vision_start|>", 1),
        ("[IMG_BREAK]", 1),
        ("<fake_token_around_image><row_1_col_12>", 2),
        ("\n\n<fake_token_around_image><global-img>", 4),
        (",\n", 2),
        ("Picture 1 :", 3),
        ("a < b [ c", 5),
    ],
)
def test_marks_are_counted_one_by_one(text: str, marks: int) -> None:
    assert marks_in([text, 7, text]) == 2 * marks


def test_marks_are_the_tokens_that_a_tokenizer_with_each_of_them_makes() -> None:
    words = ["<fake_token_around_image>", "<global-img>", "\n", "<img>"]
    words += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    core = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    tokenizer.add_tokens(words, special_tokens=True)
    preset = PRESETS["smolvlm"]
    counts = image_counts(preset.spec(), preset.connector, build_tiler("smolvlm", preset.spec()))
    for size in SIZES:
        pieces = counts.pieces(counts.plan(size))
        text = "".join("<img>" if isinstance(piece, int) else piece for piece in pieces)
        runs = sum(isinstance(piece, int) for piece in pieces)
        assert len(tokenizer(text).input_ids) == marks_in(pieces) + runs
