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
from vlm_encoders.budget import encoder_flops, token_budget
from vlm_encoders.released_budget import RELEASED, released_budgets
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling import AnyResTiler, InternVLTiler, TileLayout

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
    rows = {row.name: (row.views, row.per_view, row.total) for row in released_budgets((1344, 1792))}
    assert rows == {
        "LLaVA-1.5": (1, 576, 576),
        "LLaVA-NeXT": (5, 576, 2340),
        "InternVL 1.5 to 3": (13, 256, 3328),
        "BLIP-2": (1, 32, 32),
    }
    assert all(model.source.startswith("https://") for model in RELEASED.values())


def test_budget_of_a_clip_encoder_is_that_of_the_released_llava() -> None:
    for size in SIZES:
        budget = token_budget(CLIP, "mlp", image_size=size, tiler="anyres")
        assert budget.total == total("LLaVA-NeXT", size)
        assert token_budget(CLIP, "mlp", image_size=size).total == total("LLaVA-1.5", size) == 576


def test_a_name_gives_the_budget_of_its_spec() -> None:
    budget = token_budget("clip-vit-l-14-336", "mlp")
    assert RELEASED["LLaVA-1.5"].tokens.num_tokens == budget.encoder_tokens == 576
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
        token_budget(CLIP, "qformer:layers=1+linear", tiler="anyres", layout=AnyResTiler.layout)
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
