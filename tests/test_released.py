"""Released weights: what is recognised, asked for and refused."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from connectors import MLP, Chain, TokenSpec, UnknownNameError, VlmError, build_connector
from connectors.recipe import recipe_of
from connectors.released import load_released, released_layouts, to_released

QFORMER = "queries=3,dim=8,layers=2,heads=2,ffn=12"
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("mlp:depth=3", {}),
    "llava-linear": ("linear", {}),
    "llava-hf": ("mlp:activation=gelu_tanh", {"activation": "gelu_tanh"}),
    "vip-llava-hf": ("norm+mlp", {}),
    "internvl": (
        "pixel_shuffle:transposed=true,on_odd=pad+mlp:norm=layer",
        {"on_odd": "pad", "transposed": True},
    ),
    "internvl-hf": ("pixel_shuffle:factor=3+mlp:norm=layer", {"factor": 3}),
    "idefics3": ("pixel_shuffle:factor=3+linear:bias=false", {"factor": 3}),
    "aya-vision-hf": ("pixel_shuffle+norm:eps=1e-06+gated_mlp:hidden=5,bias=true", {}),
    "cohere2-vision-hf": ("pixel_shuffle+gated_mlp:hidden=5,bias=true", {}),
    "qwen2-vl": ("patch_merger:factor=3", {}),
    "qwen2.5-vl": ("patch_merger:norm=rms,on_odd=crop", {"on_odd": "crop"}),
    "qwen3-vl": ("patch_merger:eps=0.001", {"eps": 0.001}),
    "gemma3-hf": ("pooled_projector:grid=2x3", {"grid": (2, 3)}),
    "got-ocr2-hf": ("conv:dim=9+conv:dim=7+linear", {}),
    "blip-2-hf": (f"keep_prefix+qformer:{QFORMER}+linear", {"heads": 2}),
    "instructblip-hf": (f"keep_prefix+instruct_qformer:{QFORMER},vocab=9,positions=5+linear", {"heads": 2}),
    "blip-2-opt-lavis": (f"keep_prefix+qformer:{QFORMER},dropout=0.1+linear", {"heads": 2, "dropout": 0.1}),
    "blip-2-t5-lavis": (f"keep_prefix+qformer:{QFORMER}+linear", {"heads": 2}),
    "instructblip-lavis": (f"keep_prefix+instruct_qformer:{QFORMER},vocab=9,positions=5+linear", {"heads": 2}),
    "instructblip-t5-lavis": (f"keep_prefix+instruct_qformer:{QFORMER},vocab=9,positions=5+linear", {"heads": 2}),
    "idefics2": ("gated_mlp:hidden=9+perceiver:queries=3,depth=2,heads=4,head_dim=3,kv_heads=2", {"heads": 4}),
    "idefics": ("flamingo:queries=3,depth=2,heads=3,head_dim=4,activation=relu,ffn=10", {"heads": 3}),
    "openflamingo": ("flamingo:queries=3,depth=2,heads=3,head_dim=4", {"heads": 3}),
    "honeybee": ("position:grid=3x3+c_abstractor:grid=2x3,hidden=8,depth=1,mlp_depth=3,eos=2", {"grid": (2, 3)}),
    "honeybee-mlp": ("position:grid=3x3+mlp:depth=3,activation=silu", {}),
    "mobilevlm": ("ldp", {}),
    "mobilevlm-v2": ("ldp_v2:grid=4x3", {"grid": (4, 3)}),
}
WIDE = {"idefics": 6, "openflamingo": 6}
LLAVA = {
    "model.mm_projector.0.weight": torch.ones(8, 6),
    "model.mm_projector.0.bias": torch.ones(8),
    "model.mm_projector.2.weight": torch.ones(8, 8),
    "model.mm_projector.2.bias": torch.ones(8),
}
IDEFICS3 = {"model.connector.modality_projection.proj.weight": torch.ones(8, 24)}


def made(layout: str) -> Chain:
    recipe, _ = RECIPES[layout]
    return build_connector(recipe, TokenSpec(36, 6, (6, 6), 1), WIDE.get(layout, 8), seed=1)


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_every_layout_is_tried_here_and_says_where_it_is_from() -> None:
    layouts = released_layouts()
    assert layouts.keys() == RECIPES.keys()
    for name, layout in layouts.items():
        assert layout.name == name == name.lower()
        assert layout.source
        assert layout.used_by
        assert layout.marks


@pytest.mark.parametrize("layout", RECIPES)
def test_a_chain_goes_to_a_layout_and_comes_back(layout: str) -> None:
    chain = made(layout)
    saved = to_released(chain, layout)
    before = torch.random.get_rng_state()
    loaded = load_released(saved, **RECIPES[layout][1])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert equal(loaded.state_dict(), chain.state_dict())
    assert recipe_of(loaded, 8) == recipe_of(chain, 8)
    root = released_layouts()[layout].roots[0]
    moved = {f"here.{name.removeprefix(root)}": tensor for name, tensor in saved.items()}
    assert equal(to_released(loaded, layout, prefix="here."), moved)
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in saved.values())


@pytest.mark.parametrize("layout", RECIPES)
def test_any_prefix_is_taken_when_it_is_told(layout: str) -> None:
    chain = made(layout)
    saved = to_released(chain, layout, prefix="student.")
    with pytest.raises(VlmError):
        load_released(saved, **RECIPES[layout][1])
    assert equal(load_released(saved, prefix="student.", **RECIPES[layout][1]).state_dict(), chain.state_dict())


class Lazy(Mapping[str, Tensor]):
    """A mapping that remembers what was read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.read = tensors, set[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.mark.parametrize("layout", RECIPES)
def test_only_the_connector_and_the_encoders_width_are_read(layout: str) -> None:
    saved = to_released(made(layout), layout)
    root = released_layouts()[layout].roots[0]
    others = {f"{root}vision_tower.blocks.{n}.weight": torch.ones(2) for n in range(30)}
    lazy = Lazy({**saved, **others, "lm_head.weight": torch.ones(3, 3)})
    load_released(lazy, **RECIPES[layout][1])
    assert lazy.read == saved.keys()


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        ("blip-2-hf", "weights of layout 'blip-2-hf' do not tell heads; pass heads=12, as the released models have it"),
        ("instructblip-lavis", "pass heads=12"),
        ("idefics2", "pass heads=16"),
        ("idefics", "pass heads=16"),
        ("openflamingo", "pass heads=8"),
        ("idefics3", "do not tell factor; pass factor=2"),
        ("honeybee", r"do not tell grid; pass grid=\(12, 12\)"),
        ("internvl", "do not tell transposed; pass transposed=False"),
    ],
)
def test_what_weights_do_not_tell_is_asked_for(layout: str, sentence: str) -> None:
    with pytest.raises(VlmError, match=sentence):
        load_released(to_released(made(layout), layout))


@pytest.mark.parametrize(
    ("layout", "hints", "sentence"),
    [
        ("llava", {"heads": 2}, "layout 'llava' takes no hint 'heads'; it takes none"),
        ("llava-hf", {"head": 2}, "takes no hint 'head'; it takes activation=gelu"),
        ("llava", {"depth": 2}, "the hint depth=2 contradicts the weights, which say 3; leave it out"),
        ("blip-2-hf", {"heads": 2, "queries": 4}, "the hint queries=4 contradicts the weights, which say 3"),
        ("blip-2-hf", {"heads": 3}, "heads=3 contradicts the weights: they do not divide the 8 rows of"),
        ("blip-2-hf", {"heads": "2"}, "layout 'blip-2-hf' has the hint heads='2'; give it as heads=12"),
        ("blip-2-hf", {"heads": True}, "has the hint heads=True; give it as heads=12"),
        ("idefics2", {"heads": 1}, "heads=1 contradicts the weights: heads of width 12 do not divide 6 rows of keys"),
        ("idefics3", {"factor": 5}, "factor=5 contradicts the weights: folded tokens have width 54, which must be"),
        ("idefics3", {"factor": 0}, "factor=0 contradicts the weights"),
        ("qwen2-vl", {"factor": 2}, "the hint factor=2 contradicts the weights, which say 3"),
        ("gemma3-hf", {"grid": 4}, r"has the hint grid=4; give it as grid=\(16, 16\)"),
        ("honeybee", {"grid": (2, 3), "eos": 1}, "the hint eos=1 contradicts the weights, which say 2"),
        (
            "honeybee",
            {"grid": ()},
            r"has the hint grid=\(\), which must be 2 whole numbers of at least 1, as \(12, 12\)",
        ),
        ("honeybee", {"grid": (1,)}, "2 whole numbers"),
        ("gemma3-hf", {"grid": (2, 3, 4)}, "2 whole numbers"),
        ("gemma3-hf", {"grid": (2, 0)}, "2 whole numbers"),
        ("gemma3-hf", {"grid": (2, 3.0)}, "2 whole numbers"),
        ("gemma3-hf", {"eps": float("inf")}, "has the hint eps=inf, which must be a small number above 0, as 1e-06"),
        ("qwen2-vl", {"eps": 1e6}, "a small number above 0"),
        ("qwen2-vl", {"eps": 0.0}, "a small number above 0"),
        ("qwen3-vl", {"eps": float("nan")}, "a small number above 0"),
        ("llava-hf", {"activation": "relu,depth=2"}, "activation='relu,depth=2', which must be one word, as 'gelu'"),
        ("qwen2-vl", {"on_odd": "pad+linear"}, "which must be one word, as 'error'"),
        ("internvl-hf", {"transposed": True, "factor": 3}, "the hint transposed=True contradicts the weights"),
    ],
)
def test_hints_that_are_wrong_are_refused(layout: str, hints: dict[str, Any], sentence: str) -> None:
    with pytest.raises(VlmError, match=sentence):
        load_released(to_released(made(layout), layout), **hints)


def test_a_hint_that_says_what_the_weights_say_is_let_be() -> None:
    assert recipe_of(load_released(LLAVA, depth=2), 8) == "mlp"


def test_the_factor_follows_from_the_encoder_of_a_whole_checkpoint() -> None:
    encoder = {"model.vision_model.embeddings.patch_embedding.weight": torch.ones(6, 3, 2, 2)}
    assert recipe_of(load_released({**IDEFICS3, **encoder}), 8) == "pixel_shuffle+linear:bias=false"
    with pytest.raises(VlmError, match="factor=1 contradicts the weights: folded tokens have width 24 and the enc"):
        load_released({**IDEFICS3, **encoder}, factor=1)
    wrong = {"model.vision_model.embeddings.patch_embedding.weight": torch.ones(7, 3, 2, 2)}
    with pytest.raises(VlmError, match="contradicts the weights: folded tokens have width 24 and the encoder's 7"):
        load_released({**IDEFICS3, **wrong})


def test_weights_that_fit_several_layouts_are_told_apart_by_name() -> None:
    both = {**LLAVA, **IDEFICS3}
    sentence = "these weights fit several layouts; pass the one that is meant of layout='llava', .* and layout='idef"
    with pytest.raises(VlmError, match=sentence):
        load_released(both, factor=2)
    assert recipe_of(load_released(both, layout="llava"), 8) == "mlp"
    assert recipe_of(load_released(both, layout="idefics3", factor=2), 8) == "pixel_shuffle+linear:bias=false"


def test_two_connectors_of_one_layout_are_told_apart_by_prefix() -> None:
    both = {**LLAVA, **{name.removeprefix("model."): 2 * tensor for name, tensor in LLAVA.items()}}
    with pytest.raises(VlmError, match=r"layout='llava', prefix='model.' and layout='llava', prefix=''"):
        load_released(both)
    assert load_released(both, prefix="").connectors[0].layers[0].weight[0, 0] == 2


def test_an_unknown_checkpoint_is_told_the_layouts_and_its_nearest_names() -> None:
    state = {f"model.layers.{n}.self_attn.q_proj.weight": torch.ones(1) for n in range(40)}
    state["model.my_projector.0.weight"] = torch.ones(1)
    sentence = (
        r"no connector that is known is in these 41 names; the nearest are model.my_projector.0.weight \(1,\); "
        r"rename them as one of the known layouts has them, which are aya-vision-hf, blip-2-hf, .*, vip-llava-hf"
    )
    with pytest.raises(VlmError, match=sentence):
        load_released(state)
    with pytest.raises(VlmError, match="in these 0 names; the nearest are none at all"):
        load_released({})
    sentence = "no tensor of layout 'llava' is here, which has names like mm_projector.0.weight behind 'model.' or "
    with pytest.raises(VlmError, match=sentence + ".* the nearest names are model.my_projector.0.weight"):
        load_released(state, layout="llava")
    with pytest.raises(VlmError, match=r"behind 'mine.'; the nearest names are"):
        load_released(state, layout="llava", prefix="mine.")


def test_an_unknown_layout_is_told_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="no layout 'lava'; did you mean llava"):
        load_released(LLAVA, layout="lava")
    with pytest.raises(UnknownNameError, match="no layout 'qwen2'; did you mean qwen2"):
        to_released(made("qwen2-vl"), "qwen2")


def test_a_checkpoint_around_the_weights_is_told_apart() -> None:
    with pytest.raises(VlmError, match="this is a checkpoint around the weights; pass what it holds under 'model'"):
        load_released({"step": 3, "model": LLAVA})  # type: ignore[dict-item]
    with pytest.raises(VlmError, match=r"'model.mm_projector.0.bias' is a list, not a tensor"):
        load_released({**LLAVA, "model.mm_projector.0.bias": [1.0]})  # type: ignore[dict-item]


def test_shapes_of_both_sides_are_told() -> None:
    wrong = {**LLAVA, "model.mm_projector.0.bias": torch.ones(5), "model.mm_projector.2.weight": torch.ones(8, 7)}
    sentence = (
        r"the weights are not those of layout 'llava' as mlp:depth=2,activation=gelu: of another shape "
        r"mm_projector.0.bias is \(5,\), not \(8,\), mm_projector.2.weight is \(8, 7\), not \(8, 8\)"
    )
    with pytest.raises(VlmError, match=sentence):
        load_released(wrong)
    with pytest.raises(VlmError, match=r"'mm_projector.0.weight' has shape \(8,\), layout 'llava' needs 2 dimensions"):
        load_released({**LLAVA, "model.mm_projector.0.weight": torch.ones(8)})


def test_missing_and_unexpected_names_are_told_with_their_shapes() -> None:
    cut = {name: tensor for name, tensor in LLAVA.items() if not name.endswith("2.bias")}
    with pytest.raises(VlmError, match=r": missing mm_projector.2.bias \(8,\)$"):
        load_released(cut)
    more = {**LLAVA, **{f"model.mm_projector.0.lora_{n}": torch.ones(2) for n in range(5)}}
    with pytest.raises(VlmError, match=r": unexpected mm_projector.0.lora_0 \(2,\), .* and 2 more$"):
        load_released(more)
    with pytest.raises(VlmError, match=r"layout 'llava' needs 'mm_projector.0.weight', which is missing"):
        load_released({"model.mm_projector.2.bias": torch.ones(8)}, layout="llava")


@pytest.mark.parametrize(("dtype", "word"), [(torch.int8, "int8"), (torch.float8_e4m3fn, "float8_e4m3fn")])
def test_quantised_weights_are_refused(dtype: torch.dtype, word: str) -> None:
    quantised = {name: tensor.to(dtype) for name, tensor in LLAVA.items()}
    with pytest.raises(VlmError, match=f"'mm_projector.0.weight' is {word}, which is quantised or no weight"):
        load_released(quantised)


def test_a_merger_that_lost_its_bias_is_not_taken_for_another_models() -> None:
    saved = to_released(made("qwen2-vl"), "qwen2-vl")
    del saved["visual.merger.ln_q.bias"]
    with pytest.raises(VlmError, match=r"missing visual.merger.ln_q.bias"):
        load_released(saved, layout="qwen2-vl")
    with pytest.raises(VlmError, match="no connector that is known"):
        load_released({**saved, "visual.blocks.0.norm1.bias": torch.ones(6)})


def test_deepstack_mergers_are_left_out_only_when_told() -> None:
    saved = to_released(made("qwen3-vl"), "qwen3-vl")
    whole = {**saved, "model.visual.deepstack_merger_list.0.norm.weight": torch.ones(24)}
    with pytest.raises(VlmError, match=r"there are 1 deepstack mergers, .* pass deepstack=False to leave them out"):
        load_released(whole)
    assert equal(load_released(whole, deepstack=False).state_dict(), load_released(saved).state_dict())


@pytest.mark.parametrize("name", [None, "llava-hf"])
@pytest.mark.parametrize("other", ["model.vision_tower.timm_model.blocks.0.weight", "model.audio_tower.conv1.weight"])
def test_another_connector_under_the_names_of_llava_is_told_by_its_encoder(other: str, name: str | None) -> None:
    saved = to_released(made("llava-hf"), "llava-hf", prefix="model.")
    sentence = f"no file of (it|layout 'llava-hf') has '{other}', which is of a model with another connector; pass with"
    with pytest.raises(VlmError, match=sentence):
        load_released({**saved, other: torch.ones(1)}, layout=name)
    chain = load_released({**saved, other: torch.ones(1)}, layout=name, without=other, activation="gelu_tanh")
    assert equal(chain.state_dict(), made("llava-hf").state_dict())


def test_fastvlm_has_an_encoder_of_timm_and_the_projector_of_llava() -> None:
    saved = to_released(made("llava-hf"), "llava-hf", prefix="model.")
    encoder = {f"model.vision_tower.timm_model.{name}": torch.ones(1) for name in ("stem.0.bias", "stages.0.blocks.0")}
    assert equal(load_released({**saved, **encoder}).state_dict(), made("llava-hf").state_dict())


@pytest.mark.parametrize(
    ("layout", "prefix", "more", "lost"),
    [
        (
            "llava",
            "model.",
            ("mm_projector_aux_0.0.weight", "vision_query"),
            "model.mm_projector_aux_0., model.vision_",
        ),
        ("llava", "model.", ("vision_sampler_0.layers.0.weight",), "model.vision_sampler_0."),
        ("llava", "model.", ("vlm_uni_query_projector.0.weight",), "model.vlm_uni_query_projector."),
        ("llava-linear", "model.", ("ctm0.score.weight", "block0.norm1.weight"), "model.block0., model.ctm0."),
        ("instructblip-lavis", "", ("vision_project.weight",), "vision_project."),
        ("qwen2-vl", "thinker.", ("visual.merger_list.0.ln_q.weight",), "thinker.visual.merger_list."),
        ("vip-llava-hf", "model.", ("image_newline",), "model.image_newline"),
        ("mobilevlm", "", ("adapter.weight",), "adapter."),
    ],
)
def test_further_parts_beside_the_connector_are_not_lost(
    layout: str, prefix: str, more: tuple[str, ...], lost: str
) -> None:
    chain = made(layout)
    saved = to_released(chain, layout, prefix=prefix)
    whole = {**saved, **{prefix + name: torch.ones(2) for name in more}, "model.layers.0.mlp.up_proj": torch.ones(2)}
    told = {} if prefix in released_layouts()[layout].roots else {"prefix": prefix}
    sentence = f"beside the connector of layout '{layout}' stand {lost}.*, which look like further parts of it and"
    for named in ({}, {"layout": layout}):
        with pytest.raises(VlmError, match=sentence):
            load_released(whole, **told, **named, **RECIPES[layout][1])
    left = load_released(whole, without=[prefix + name for name in more], **told, **RECIPES[layout][1])
    assert equal(left.state_dict(), chain.state_dict())


def test_what_is_passed_over_must_be_there() -> None:
    for nothing in ("model.mm_projectors", ""):
        with pytest.raises(VlmError, match=f"without='{nothing}' leaves nothing out of these 4 names; pass how a name"):
            load_released(LLAVA, without=nothing)
    with pytest.raises(VlmError, match="without has 3, a int; names are text"):
        load_released(LLAVA, without=(3,))  # type: ignore[arg-type]
    with pytest.raises(VlmError, match="without has None, a NoneType; names are text"):
        load_released(LLAVA, without=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["x.safetensors", None, [1], torch.nn.Linear(2, 2)])
def test_what_is_no_mapping_is_told_apart(given: Any) -> None:
    kind = type(given).__name__
    with pytest.raises(
        VlmError, match=rf"was given a {kind}; pass a mapping .*load_file\(path\) or the module's state_"
    ):
        load_released(given)


def test_names_are_text() -> None:
    with pytest.raises(VlmError, match="a name is 1, a int; names are text"):
        load_released({1: torch.ones(1)})  # type: ignore[dict-item]
    with pytest.raises(VlmError, match="prefix is 3, a int; names are text"):
        load_released(LLAVA, prefix=3)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="no layout '3'"):
        load_released(LLAVA, layout=3)  # type: ignore[arg-type]


def test_an_empty_tensor_is_refused() -> None:
    saved = {**to_released(made("qwen2-vl"), "qwen2-vl"), "visual.merger.ln_q.weight": torch.ones(0)}
    with pytest.raises(VlmError, match=r"'visual.merger.ln_q.weight' has shape \(0,\) and is empty; gather"):
        load_released(saved)


def test_an_unknown_prefix_is_told() -> None:
    saved = {f"module.{name}": tensor for name, tensor in LLAVA.items()}
    with pytest.raises(VlmError, match=r"layout 'llava' is behind another prefix, pass prefix='module.model.'"):
        load_released(saved)
    with pytest.raises(
        VlmError, match=r"behind 'mine.'; layout 'llava' is behind another prefix, pass prefix='model.'"
    ):
        load_released(LLAVA, layout="llava", prefix="mine.")
    assert len(load_released(saved, prefix="module.model.").connectors) == 1


def test_a_shard_is_told_what_it_lacks() -> None:
    saved = to_released(made("gemma3-hf"), "gemma3-hf")
    shard = {name: tensor for name, tensor in saved.items() if "norm" not in name}
    sentence = (
        "of layout 'gemma3-hf' multi_modal_projector.mm_soft_emb_norm.weight are missing; merge the model's shards"
    )
    with pytest.raises(VlmError, match=sentence):
        load_released(shard)


def test_a_hidden_layer_of_another_width_is_no_llava() -> None:
    """LFM2-VL has such a projector, behind a fold, under the names of LLaVA."""
    saved = {
        "multi_modal_projector.linear_1.weight": torch.ones(9, 24),
        "multi_modal_projector.linear_1.bias": torch.ones(9),
        "multi_modal_projector.linear_2.weight": torch.ones(8, 9),
        "multi_modal_projector.linear_2.bias": torch.ones(8),
    }
    with pytest.raises(VlmError, match=r"linear_1.bias is \(9,\), not \(8,\)"):
        load_released(saved)


def test_place_numbers_of_old_instructblip_files_are_checked_and_not_written() -> None:
    saved = to_released(made("instructblip-hf"), "instructblip-hf")
    name = "qformer.embeddings.position_ids"
    old = {**saved, name: torch.arange(512)[None]}
    assert equal(to_released(load_released(old, heads=2), "instructblip-hf"), saved)
    with pytest.raises(VlmError, match=f"'{name}' does not count 0 to 511"):
        load_released({**saved, name: torch.zeros(1, 512, dtype=torch.int64)}, heads=2)
    with pytest.raises(VlmError, match=rf"of another shape {name} is \(1, 9\), not \(1, 512\)"):
        load_released({**saved, name: torch.arange(9)[None]}, heads=2)


def test_honeybees_positions_are_missed() -> None:
    saved = to_released(made("honeybee"), "honeybee")
    del saved["abstractor.pos_emb"]
    with pytest.raises(VlmError, match=r"'abstractor.pos_emb' is missing, .* pass positions=False"):
        load_released(saved, grid=(2, 3))
    assert len(load_released(saved, grid=(2, 3), positions=False).connectors) == 1
    saved = to_released(made("honeybee-mlp"), "honeybee-mlp")
    del saved["abstractor.pos_emb"]
    with pytest.raises(VlmError, match=r"'abstractor.pos_emb' is missing, .* pass positions=False"):
        load_released(saved)
    assert len(load_released(saved, positions=False).connectors) == 1


@pytest.mark.parametrize(
    ("recipe", "layout", "sentence"),
    [
        ("linear", "llava", "layout 'llava' has no name for the chain's linear.proj.weight; choose another layout"),
        ("mlp+mlp", "llava", "has no name for the chain's mlp2.layers.0.weight"),
        ("mlp:activation=silu", "llava", "holds mlp, this chain is mlp:activation=silu; keep its recipe, or another"),
        ("norm:eps=0.1+mlp", "llava-hf", "has no name for the chain's norm.norm.weight"),
        ("mlp:bias=false", "llava", "layout 'llava' holds mlp, this chain is mlp:bias=false"),
        ("pixel_shuffle+gated_mlp", "cohere2-vision-hf", "holds .*bias=true, this chain is pixel_shuffle"),
        ("pixel_shuffle:transposed=true+mlp:norm=layer", "internvl-hf", "holds pixel_shuffle.mlp:norm=layer, this"),
        ("mlp:norm=layer", "internvl", "does not hold this chain: factor=2 contradicts the weights"),
        ("mlp+pixel_shuffle:factor=1", "internvl", "holds pixel_shuffle:factor=1.mlp:norm=layer, this chain is mlp"),
        ("pixel_shuffle+mlp:depth=1", "internvl", "layout 'internvl' does not hold this chain: .*'mlp1.3.weight'"),
        ("qformer:layers=2,heads=2,dim=8,ffn=8+linear", "blip-2-hf", "holds keep_prefix.*, this chain is qformer"),
    ],
)
def test_a_chain_that_a_layout_does_not_hold_is_refused(recipe: str, layout: str, sentence: str) -> None:
    with pytest.raises(VlmError, match=sentence):
        to_released(build_connector(recipe, TokenSpec(16, 6, (4, 4)), 8), layout)


def test_a_single_link_is_written_like_a_chain_of_it() -> None:
    mlp = MLP(6, 8)
    assert equal(to_released(mlp, "llava"), to_released(Chain(mlp), "llava"))
