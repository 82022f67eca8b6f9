"""Gradient checkpointing: the same gradients to the bit, less memory, also where the LLM is frozen."""

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from connectors import build_connector
from vlm_encoders.registry import create_encoder
from vlm_encoders.testing import tiny_llm
from vlm_encoders.training.recompute import recompute_blocks
from vlm_encoders.vlm.decoder import decoder_layers
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.stages import STAGE_1, STAGE_2, STAGE_3, PartPolicy, StagePolicy, apply_stage

LORA = StagePolicy("lora", connector=PartPolicy("train", lr=1.0), llm=PartPolicy("lora", lr=1.0, lora_rank=2))
TAIL = StagePolicy("tail", PartPolicy("train", lr=1.0, last_blocks=1), PartPolicy("train", lr=1.0))
LAYERS = 4


def build(kit: Any, encoder: str = "clip", llm: str = "llama", **options: Any) -> VisionLanguageModel:
    name = f"hf:{kit.root}/clip" if encoder == "clip" else encoder
    vision = create_encoder(name, pretrained=False, **({} if encoder == "clip" else {"image_size": 64}))
    torch.manual_seed(0)
    connector = build_connector("mlp", vision.token_spec, 32)
    language = tiny_llm(llm, num_hidden_layers=LAYERS, **options)
    return VisionLanguageModel(vision, connector, language, image_token_id=kit.image)


def batch(model: VisionLanguageModel, text: int = 9) -> dict[str, Any]:
    tokens = model.token_spec.num_tokens
    ids = torch.randint(3, 60, (2, tokens + text), generator=torch.Generator().manual_seed(0))
    ids[:, 2 : 2 + tokens] = model.image_token_id
    pixels = torch.randn(2, *model.encoder.pixel_shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.masked_fill(ids == model.image_token_id, -100), "pixel_values": pixels}


def gradients(model: nn.Module, inputs: dict[str, Any], *, autocast: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(**inputs).loss
    loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert torch.equal(other[name], gradient), name


class Live(TorchDispatchMode):
    """Counts the bytes that operations have made and that are still held, those of a model's weights apart."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}
        self._made: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                self._made.append((StorageWeakRef(storage), storage.nbytes()))
        return made

    def held(self) -> int:
        live = {ref.cdata: size for ref, size in self._made if not ref.expired()}
        return sum(size for storage, size in live.items() if storage not in self._weights)


def kept_bytes(model: VisionLanguageModel, inputs: dict[str, Any]) -> int:
    with Live(model) as live:
        output = model(**inputs)
        held = live.held()
    del output
    return held


@pytest.mark.parametrize(
    ("encoder", "stage", "recomputed"),
    [
        # All layers of the LLM but the last, and the blocks of a trained encoder; of TAIL the last block alone.
        ("clip", STAGE_1, LAYERS - 1),
        ("clip", STAGE_2, LAYERS - 1),
        ("clip", LORA, LAYERS - 1),
        ("clip", STAGE_3, LAYERS - 1 + 2),
        ("clip", TAIL, LAYERS - 1 + 1),
        ("timm:vit_tiny_patch16_224", STAGE_3, LAYERS - 1 + 12),
        ("open_clip:ViT-B-32/openai", TAIL, LAYERS - 1 + 1),
        ("timm:resnet10t", STAGE_3, None),
    ],
)
def test_gradients_are_equal_to_the_bit(kit: Any, encoder: str, stage: StagePolicy, recomputed: int | None) -> None:
    model = apply_stage(build(kit, encoder, attention_dropout=0.2), stage).train()
    if encoder == "clip":
        for layer in model.encoder.blocks():
            layer.self_attn.dropout = 0.2
    if encoder.startswith("timm:vit"):
        for block in model.encoder.network.blocks:
            block.attn.proj_drop.p = block.mlp.drop2.p = 0.3
    inputs, other = batch(model), copy.deepcopy(model)
    names = list(model.state_dict())
    with recompute_blocks(model) as recompute:
        assert list(model.state_dict()) == names
        found = gradients(model, inputs)
        assert recompute.count == recomputed if recomputed is not None else recompute.count > LAYERS
    assert_equal(gradients(other, inputs), found)
    # Batch norms count each batch once.
    for (name, buffer), wanted in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, wanted), name
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("llm", ["gpt_neox", "gemma3", "phi3"])
def test_other_families_and_autocast(kit: Any, llm: str) -> None:
    model = apply_stage(build(kit, llm=llm), STAGE_1).train()
    inputs = batch(model)
    plain = gradients(model, inputs, autocast=True)
    with recompute_blocks(model) as recompute:
        assert_equal(plain, gradients(model, inputs, autocast=True))
        assert recompute.count == LAYERS - 1


def test_stage_1_keeps_less_though_the_llm_is_frozen(kit: Any) -> None:
    model = apply_stage(build(kit), STAGE_1).train()
    inputs = batch(model, text=60)
    plain = kept_bytes(model, inputs)
    # The trap: transformers' own switch recomputes in train mode alone, and a frozen LLM stands in eval mode.
    theirs = copy.deepcopy(model)
    theirs.llm.gradient_checkpointing_enable({"use_reentrant": False})
    assert kept_bytes(theirs, inputs) >= plain
    with recompute_blocks(model) as recompute:
        assert kept_bytes(model, inputs) < 0.5 * plain
        assert recompute.count == 0
    assert kept_bytes(model, inputs) == plain


def test_what_passes_no_gradient_is_not_recomputed(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        held.append(1)
        return checkpoint(*args, **options)

    # What is handed to it is kept, also where nothing is computed again.
    monkeypatch.setattr("vlm_encoders.training.recompute.checkpoint", counted)
    model = apply_stage(build(kit), STAGE_1).train()
    with recompute_blocks(model) as recompute:
        assert recompute.blocks == decoder_layers(model.llm)[:-1]
        with torch.no_grad():
            model(**batch(model))
        assert not held
    # Gradients enter an LLM behind a frozen connector where its first trained layer stands.
    model = build(kit)
    apply_stage(model, STAGE_2).connector.requires_grad_(False)
    model.llm.requires_grad_(False)
    for layer in decoder_layers(model.llm)[2:]:
        layer.requires_grad_(True)
    with recompute_blocks(model) as recompute:
        gradients(model, batch(model))
        assert recompute.count == len(held) == 1


def test_wrapping_twice_recomputes_once_and_removing_leaves_others(kit: Any) -> None:
    model = apply_stage(build(kit), STAGE_1).train()
    inputs = batch(model)
    plain = gradients(model, inputs)
    first, second = recompute_blocks(model), recompute_blocks(model)
    assert_equal(plain, gradients(model, inputs))
    assert (first.count, second.count) == (0, LAYERS - 1)
    first.remove()
    layer = decoder_layers(model.llm)[0]
    assert "hidden_states" in inspect.signature(layer.forward).parameters
    copied = copy.deepcopy(model)
    copied.requires_grad_(False)
    assert decoder_layers(copied.llm)[0].forward.block is decoder_layers(copied.llm)[0]
    assert_equal(plain, gradients(model, inputs))
    inner, calls = layer.forward, []
    layer.forward = lambda *args, **kwargs: (calls.append(1), inner(*args, **kwargs))[1]
    second.remove()
    before = second.count
    assert_equal(plain, gradients(model, inputs))
    assert second.count == before
    assert calls == [1]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_it_stands_inside_the_hooks_of_ddp_and_fsdp(kit: Any) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = apply_stage(build(kit), StagePolicy("all", *[PartPolicy("train", lr=1.0)] * 3)).train()
    inputs = batch(model)
    plain = gradients(model, inputs)
    with recompute_blocks(model) as recompute:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        found = gradients(wrapped, inputs)
        assert_equal(plain, {name.removeprefix("module."): each for name, each in found.items()})
        del wrapped
        assert recompute.count == LAYERS - 1 + 2
    model.zero_grad()
    for block in [*model.encoder.blocks(), *decoder_layers(model.llm)]:
        fully_shard(block)
    fully_shard(model)
    plain = {name: each.full_tensor() for name, each in gradients(model, inputs).items()}
    with recompute_blocks(model) as recompute:
        found = gradients(model, inputs)
        assert_equal(plain, {name: each.full_tensor() for name, each in found.items()})
        assert recompute.count == LAYERS - 1 + 2
