"""Released weights against transformers: tiny models saved by it, loaded by us, its connector's output and keys."""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from connectors import TokenSpec, VisualTokens, VlmError, recipe_of
from connectors.released import load_released, released_layouts, to_released

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
LLAMA = {"model_type": "llama", **TEXT}
OPT = {
    "model_type": "opt",
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
CLIP = {"model_type": "clip_vision_model", **VISION}
SIGLIP = {"model_type": "siglip_vision_model", **VISION}
QFORMER = {
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "encoder_hidden_size": 12,
    "vocab_size": 130,
    "max_position_embeddings": 10,
}
PERCEIVER = {
    "hidden_size": 16,
    "resampler_n_latents": 3,
    "resampler_depth": 2,
    "resampler_n_heads": 4,
    "resampler_head_dim": 5,
    "num_key_value_heads": 2,
}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
SQUARE = [(4, 4)]
ANY = [(4, 4), (2, 6), (6, 2)]


def randomise(module: nn.Module) -> None:
    """Draw every parameter, norms and biases too, so that none hides behind 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def by_blocks(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Order tokens block of 2x2 by block, as Qwen's encoders give them."""
    rows, columns = grid
    return tokens.unflatten(1, (rows // 2, 2, columns // 2, 2)).transpose(2, 3).reshape(tokens.shape)


@dataclass
class Case:
    """A tiny model of transformers and what its connector gives."""

    layout: str
    make: Callable[[], Any]
    run: Callable[[Any, Tensor, tuple[int, int]], Tensor]
    recipe: str
    grids: list[tuple[int, int]] = field(default_factory=lambda: ANY)
    part: str = "projector|newline|connector|merger|perceiver|query_tokens|qformer|language_projection"
    hints: dict[str, Any] = field(default_factory=dict)
    dim: int = 12
    prefix: int = 0


def projector(model: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return model.model.multi_modal_projector(tokens)


def folded(model: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return model.model.multi_modal_projector(tokens).flatten(1, 2)


def internvl(model: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    shuffled = model.model.pixel_shuffle(tokens.unflatten(1, grid), scale_factor=0.5)
    return model.model.multi_modal_projector(shuffled.flatten(1, 2))


def merger(model: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    out = model.model.visual.merger(by_blocks(tokens, grid).flatten(0, 1))
    return out.unflatten(0, (tokens.shape[0], -1))


def gemma3(model: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return model.model.multi_modal_projector(tokens)


def got_ocr2(model: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return model.model.multi_modal_projector(VisualTokens(tokens, grid).as_map())


def idefics3(model: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return model.model.connector(tokens)


def perceiver(model: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return model.model.perceiver_resampler(tokens)


def idefics2(model: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return model.model.connector(tokens, torch.ones(tokens.shape[:2], dtype=torch.long))


def qformer(model: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    queries = model.query_tokens.expand(tokens.shape[0], -1, -1)
    out = model.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
    return model.language_projection(out)


def instruct_qformer(model: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    queries = model.query_tokens.expand(tokens.shape[0], -1, -1)
    ids = torch.tensor([[101, 102]]).expand(tokens.shape[0], -1)
    mask = torch.ones(tokens.shape[0], queries.shape[1] + 2, dtype=torch.long)
    out = model.qformer(ids, query_embeds=queries, encoder_hidden_states=tokens, attention_mask=mask)
    return model.language_projection(out.last_hidden_state[:, : queries.shape[1]])


def llava_like(config: type, model: type, vision: dict[str, Any], **options: Any) -> Any:
    return model(config(vision_config=dict(vision), text_config=dict(LLAMA), **options))


LLAVA = functools.partial(llava_like, hf.LlavaConfig, hf.LlavaForConditionalGeneration, CLIP)
CASES = {
    "llava": Case("llava-hf", LLAVA, projector, "mlp"),
    "llava-without-bias": Case(
        "llava-hf", functools.partial(LLAVA, multimodal_projector_bias=False), projector, "mlp:bias=false"
    ),
    "llava-silu": Case(
        "llava-hf",
        functools.partial(LLAVA, projector_hidden_act="silu"),
        projector,
        "mlp:activation=silu",
        hints={"activation": "silu"},
    ),
    "llava-of-two-layers": Case(
        "llava-hf", functools.partial(LLAVA, vision_feature_layer=[-1, -2]), projector, "mlp", dim=24
    ),
    "llava-next": Case(
        "llava-hf",
        functools.partial(llava_like, hf.LlavaNextConfig, hf.LlavaNextForConditionalGeneration, CLIP),
        projector,
        "mlp",
    ),
    "llava-next-video": Case(
        "llava-hf",
        functools.partial(llava_like, hf.LlavaNextVideoConfig, hf.LlavaNextVideoForConditionalGeneration, CLIP),
        projector,
        "mlp",
    ),
    "llava-onevision": Case(
        "llava-hf",
        functools.partial(llava_like, hf.LlavaOnevisionConfig, hf.LlavaOnevisionForConditionalGeneration, SIGLIP),
        projector,
        "mlp",
    ),
    "vip-llava": Case(
        "vip-llava-hf",
        lambda: llava_like(
            hf.VipLlavaConfig, hf.VipLlavaForConditionalGeneration, CLIP, vision_feature_layers=[-1, -2]
        ),
        projector,
        "norm+mlp",
        dim=24,
    ),
    "vip-llava-eps": Case(
        "vip-llava-hf",
        lambda: llava_like(
            hf.VipLlavaConfig,
            hf.VipLlavaForConditionalGeneration,
            CLIP,
            vision_feature_layers=[-1, -2],
            projector_layernorm_eps=0.5,
        ),
        projector,
        "norm:eps=0.5+mlp",
        hints={"eps": 0.5},
        dim=24,
    ),
    "aya-vision": Case(
        "aya-vision-hf",
        lambda: llava_like(
            hf.AyaVisionConfig, hf.AyaVisionForConditionalGeneration, SIGLIP, alignment_intermediate_size=20
        ),
        folded,
        "pixel_shuffle+norm:eps=1e-06+gated_mlp:hidden=10,bias=true",
        SQUARE,
    ),
    "cohere2-vision": Case(
        "cohere2-vision-hf",
        lambda: llava_like(
            hf.Cohere2VisionConfig, hf.Cohere2VisionForConditionalGeneration, SIGLIP, alignment_intermediate_size=20
        ),
        folded,
        "pixel_shuffle+gated_mlp:hidden=10,bias=true",
        SQUARE,
    ),
    "internvl": Case(
        "internvl-hf",
        lambda: hf.InternVLForConditionalGeneration(
            hf.InternVLConfig(
                vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]}, text_config=dict(LLAMA)
            )
        ),
        internvl,
        "pixel_shuffle+mlp:norm=layer",
    ),
    "idefics2": Case(
        "idefics2",
        lambda: hf.Idefics2ForConditionalGeneration(
            hf.Idefics2Config(vision_config=dict(VISION), text_config=dict(LLAMA), perceiver_config=dict(PERCEIVER))
        ),
        idefics2,
        "gated_mlp:hidden=24+perceiver:queries=3,depth=2,heads=4,head_dim=5,kv_heads=2",
        hints={"heads": 4},
    ),
    "idefics3": Case(
        "idefics3",
        lambda: hf.Idefics3ForConditionalGeneration(
            hf.Idefics3Config(vision_config=dict(VISION), text_config=dict(LLAMA), scale_factor=2)
        ),
        idefics3,
        "pixel_shuffle+linear:bias=false",
        SQUARE,
        hints={"factor": 2},
    ),
    "smolvlm": Case(
        "idefics3",
        lambda: hf.SmolVLMForConditionalGeneration(
            hf.SmolVLMConfig(vision_config=dict(VISION), text_config=dict(LLAMA), scale_factor=4)
        ),
        idefics3,
        "pixel_shuffle:factor=4+linear:bias=false",
        SQUARE,
        hints={"factor": 4},
    ),
    "blip-2": Case(
        "blip-2-hf",
        lambda: hf.Blip2ForConditionalGeneration(
            hf.Blip2Config(
                vision_config=dict(VISION), qformer_config=dict(QFORMER), text_config=dict(OPT), num_query_tokens=3
            )
        ),
        qformer,
        "keep_prefix+qformer:queries=3,dim=8,layers=4,heads=2,ffn=12+linear",
        hints={"heads": 2},
        prefix=1,
    ),
    "blip-2-every-third": Case(
        "blip-2-hf",
        lambda: hf.Blip2ForConditionalGeneration(
            hf.Blip2Config(
                vision_config=dict(VISION),
                qformer_config={
                    **QFORMER,
                    "cross_attention_frequency": 3,
                    "num_hidden_layers": 5,
                    "num_attention_heads": 4,
                },
                text_config=dict(OPT),
                num_query_tokens=3,
            )
        ),
        qformer,
        "keep_prefix+qformer:queries=3,dim=8,layers=5,heads=4,cross_every=3,ffn=12+linear",
        hints={"heads": 4},
        prefix=1,
    ),
    "instructblip": Case(
        "instructblip-hf",
        lambda: hf.InstructBlipForConditionalGeneration(
            hf.InstructBlipConfig(
                vision_config=dict(VISION), qformer_config=dict(QFORMER), text_config=dict(LLAMA), num_query_tokens=3
            )
        ),
        instruct_qformer,
        "keep_prefix+instruct_qformer:queries=3,dim=8,layers=4,heads=2,ffn=12,vocab=130,positions=10+linear",
        hints={"heads": 2},
        prefix=1,
    ),
    "qwen2-vl": Case(
        "qwen2-vl",
        lambda: hf.Qwen2VLForConditionalGeneration(
            hf.Qwen2VLConfig(
                vision_config={
                    "depth": 1,
                    "embed_dim": 12,
                    "hidden_size": 16,
                    "num_heads": 2,
                    "mlp_ratio": 2,
                    "patch_size": 4,
                },
                text_config={**TEXT, **ROPE},
            )
        ),
        merger,
        "patch_merger",
    ),
    "qwen2.5-vl": Case(
        "qwen2.5-vl",
        lambda: hf.Qwen2_5_VLForConditionalGeneration(
            hf.Qwen2_5_VLConfig(
                vision_config={
                    "depth": 1,
                    "hidden_size": 12,
                    "out_hidden_size": 16,
                    "num_heads": 2,
                    "intermediate_size": 16,
                    "patch_size": 4,
                },
                text_config={**TEXT, **ROPE},
            )
        ),
        merger,
        "patch_merger:norm=rms",
    ),
    "qwen3-vl": Case(
        "qwen3-vl",
        lambda: hf.Qwen3VLForConditionalGeneration(
            hf.Qwen3VLConfig(
                vision_config={
                    "depth": 3,
                    "hidden_size": 12,
                    "out_hidden_size": 16,
                    "num_heads": 2,
                    "intermediate_size": 16,
                    "patch_size": 4,
                    "deepstack_visual_indexes": [0, 1],
                    "num_position_embeddings": 16,
                },
                text_config={**TEXT, "head_dim": 8, **ROPE},
            )
        ),
        merger,
        "patch_merger",
        part="visual.merger",
        hints={"deepstack": False},
    ),
    "gemma3": Case(
        "gemma3-hf",
        lambda: hf.Gemma3ForConditionalGeneration(
            hf.Gemma3Config(vision_config=dict(VISION), text_config={**TEXT, "head_dim": 8}, mm_tokens_per_image=4)
        ),
        gemma3,
        "pooled_projector:grid=2x2",
        SQUARE,
        hints={"grid": (2, 2)},
    ),
    "got-ocr2": Case(
        "got-ocr2-hf",
        lambda: hf.GotOcr2ForConditionalGeneration(
            hf.GotOcr2Config(
                vision_config={
                    "hidden_size": 12,
                    "output_channels": 6,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 64,
                    "patch_size": 4,
                    "mlp_dim": 16,
                    "window_size": 2,
                    "global_attn_indexes": [0],
                },
                text_config={**TEXT, "model_type": "qwen2"},
            )
        ),
        got_ocr2,
        "conv:dim=12+conv+linear",
        dim=6,
    ),
    "idefics": Case(
        "idefics",
        lambda: idefics(qk_norm=False),
        perceiver,
        "flamingo:queries=3,depth=2,heads=2,head_dim=5,activation=relu",
        hints={"heads": 2},
    ),
    "idefics-qk-norm": Case(
        "idefics",
        lambda: idefics(qk_norm=True),
        perceiver,
        "flamingo:queries=3,depth=2,heads=2,head_dim=5,activation=relu,qk_norm=true",
        hints={"heads": 2},
    ),
}


def idefics(*, qk_norm: bool) -> Any:
    config = hf.IdeficsConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        use_resampler=True,
        vision_config={"embed_dim": 12, **{key: value for key, value in VISION.items() if key != "hidden_size"}},
        perceiver_config={
            "resampler_n_latents": 3,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 5,
            "qk_layer_norms_perceiver": qk_norm,
        },
    )
    return hf.IdeficsForVisionText2Text(config)


@pytest.fixture(scope="module", params=CASES)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, Any, dict[str, Tensor], Path]:
    """A model with random weights, and its file."""
    torch.manual_seed(0)
    case = CASES[request.param]
    model = case.make().eval()
    randomise(model)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    return case, model, load_file(file), file


def part_of(case: Case, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the connector's tensors, chosen by words and not by our own table."""
    outside = re.compile(r"language_model|model\.layers|vision_model\.|gated_cross|deepstack|vision_tower")
    return {key: value for key, value in state.items() if re.search(case.part, key) and not outside.search(key)}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first
    )


def test_the_file_is_recognised_and_gives_what_the_library_gives(saved: Any) -> None:
    case, model, state, _ = saved
    chain = load_released(state, **case.hints)
    out_dim = 12 if case.layout == "idefics" else 16
    assert recipe_of(chain, out_dim) == case.recipe
    for grid in case.grids:
        tokens = draw(2, case.prefix + math.prod(grid), case.dim)
        prefix = tokens[:, : case.prefix] if case.prefix else None
        with torch.no_grad():
            expected = case.run(model, tokens, grid)
            out = chain(VisualTokens(tokens[:, case.prefix :], grid, prefix)).tokens
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert chain.out_spec(TokenSpec(math.prod(grid), case.dim, grid, case.prefix)).num_tokens == out.shape[1]


def test_whole_part_memory_and_lazy_files_give_the_same(saved: Any) -> None:
    case, model, state, file = saved
    whole = load_released(state, **case.hints)
    part = part_of(case, state)
    assert part
    memory = model.state_dict()
    with safe_open(file, "pt") as lazy:
        chains = [
            load_released(part, **case.hints),
            load_released(memory, **case.hints),
            load_released(lazy, **case.hints),
            load_released(state, layout=case.layout, **case.hints),
        ]
    for chain in chains:
        assert recipe_of(chain, 16) == recipe_of(whole, 16)
        assert equal(chain.state_dict(), whole.state_dict())
        assert (chain.newline is None) == (whole.newline is None)


def test_the_same_keys_and_values_come_back(saved: Any) -> None:
    case, model, state, _ = saved
    part = part_of(case, state)
    back = to_released(load_released(state, **case.hints), case.layout)
    assert equal(back, part)
    memory = part_of(case, model.state_dict())
    roots = released_layouts()[case.layout].roots
    name = min(back, key=len).removeprefix(roots[0])
    prefix = next(root for root in roots if root + name in memory)
    assert equal(to_released(load_released(memory, **case.hints), case.layout, prefix=prefix), memory)


def test_every_missing_or_unexpected_tensor_is_refused(saved: Any) -> None:
    case, _, state, _ = saved
    part = part_of(case, state)
    for name in part:
        cut = {key: value for key, value in part.items() if key != name}
        if name.endswith("image_newline"):
            assert load_released(cut, layout=case.layout, **case.hints).newline is None
            continue
        with pytest.raises(VlmError, match=r"missing|fits? no|no connector|no tensor"):
            load_released(cut, layout=case.layout, **case.hints)
        with pytest.raises(VlmError):
            load_released({key: value for key, value in state.items() if key != name}, **case.hints)
    longest = max(part, key=len)
    stem = longest.rpartition(".")[0] or longest
    with pytest.raises(VlmError, match=r"unexpected .*lora_A \(1,\)"):
        load_released({**part, f"{stem}.lora_A": torch.ones(1)}, layout=case.layout, **case.hints)


def test_a_tensor_of_another_shape_is_refused_or_is_of_another_size_of_model(saved: Any) -> None:
    """What is accepted comes back whole: nothing is cut, filled up or drawn."""
    case, _, state, _ = saved
    part = part_of(case, state)
    refused = 0
    for name, tensor in part.items():
        for dim in range(tensor.ndim):
            if tensor.shape[dim] == 1:
                continue
            given = {**part, name: tensor.narrow(dim, 0, tensor.shape[dim] - 1)}
            try:
                chain = load_released(given, **case.hints)
            except VlmError:
                refused += 1
            else:
                assert equal(to_released(chain, case.layout), given)
    assert refused >= len(part) - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays_and_the_weights_are_copies(saved: Any, dtype: torch.dtype) -> None:
    case, _, state, _ = saved
    part = {key: value.to(dtype) for key, value in part_of(case, state).items()}
    chain = load_released(part, **case.hints)
    assert {parameter.dtype for parameter in chain.parameters()} == {dtype}
    before = {key: value.clone() for key, value in part.items()}
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(1)
    assert equal(part, before)
    assert all(parameter.requires_grad for parameter in chain.parameters())


def test_the_newline_comes_with_the_connector(saved: Any) -> None:
    case, _, state, _ = saved
    newline = load_released(state, **case.hints).newline
    if "image_newline" in state:
        assert torch.equal(newline, state["image_newline"])
        assert newline.requires_grad
    else:
        assert newline is None
