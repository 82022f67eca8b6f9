"""The newline vector of released weights: with a chain, in a model, through training and back."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from connectors import MLP, Chain, Linear, PatchMerger, TokenShapeError, TokenSpec, VlmError
from connectors.released import load_released, to_released
from connectors.testing import check_connector
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.training.checkpoints import STATE_FILE, load_state
from vlm_encoders.training.state import RunState
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.stages import STAGE_1, apply_stage

LLAVA = {
    "model.mm_projector.0.weight": torch.ones(8, 6),
    "model.mm_projector.0.bias": torch.ones(8),
    "model.mm_projector.2.weight": torch.ones(8, 8),
    "model.mm_projector.2.bias": torch.ones(8),
}


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_newline_is_a_parameter_of_its_chain() -> None:
    chain = load_released({**LLAVA, "model.image_newline": torch.arange(8.0)})
    newline = chain.newline
    assert newline is not None
    assert [name for name, each in chain.named_parameters() if each is newline] == ["newline"]
    assert torch.equal(chain.state_dict()["newline"], newline)
    assert chain.to(torch.bfloat16).newline.dtype == torch.bfloat16
    assert Chain(chain).newline is chain.newline
    chain.load_state_dict({name: tensor / 8 for name, tensor in chain.state_dict().items()}, assign=True)
    assert torch.equal(chain.newline, torch.arange(8.0).bfloat16() / 8)
    newline = chain.newline
    assert not chain.requires_grad_(requires_grad=False).newline.requires_grad
    check_connector(chain, TokenSpec(4, 6, (2, 2)))
    assert chain.newline is newline
    assert chain.to("meta").to_empty(device="cpu").newline.device.type == "cpu"
    twin = copy.deepcopy(chain)
    assert twin.newline is not chain.newline
    chain.newline = None
    assert "newline" not in chain.state_dict()
    assert Chain(Linear(4, 4)).newline is None
    with pytest.raises(VlmError, match="2 links have a newline, a chain has one; set it to None on the others"):
        Chain(twin, load_released({**LLAVA, "model.image_newline": torch.arange(8.0)}))


def test_a_layout_without_newline_does_not_drop_one() -> None:
    chain = Chain(PatchMerger(6, 8))
    chain.newline = nn.Parameter(torch.ones(8))
    with pytest.raises(VlmError, match="layout 'qwen2-vl' has no name for the chain's newline"):
        to_released(chain, "qwen2-vl")


def llava_of(kit: Any, *, newline: bool = True, width: int = 32) -> VisionLanguageModel:
    """A model whose connector is LLaVA-NeXT's, its newline 0, 1, 2, ..."""
    base = kit.build(newline=True)
    dim = base.encoder.token_spec.dim
    generator = torch.Generator().manual_seed(0)
    state = {
        "model.mm_projector.0.weight": torch.randn(32, dim, generator=generator),
        "model.mm_projector.0.bias": torch.zeros(32),
        "model.mm_projector.2.weight": torch.randn(32, 32, generator=generator),
        "model.mm_projector.2.bias": torch.zeros(32),
    }
    chain = load_released(state)
    chain.newline = nn.Parameter(torch.arange(float(width)))
    layout = TileLayout(unpad=newline, newline=newline)
    return VisionLanguageModel(base.encoder, chain, base.llm, image_token_id=kit.image, layout=layout).eval()


def test_a_model_starts_from_the_released_newline_and_shares_it(kit: Any) -> None:
    model = llava_of(kit)
    assert torch.equal(model.newline, torch.arange(32.0))
    assert model.newline is model.connector.newline
    names = [name for name, _ in model.part_parameters("connector")]
    assert names[-1] == "connector.newline"
    assert [name for name in model.state_dict() if "newline" in name] == ["connector.newline"]
    twin = copy.deepcopy(model)
    assert twin.newline is twin.connector.newline
    assert twin.newline is not model.newline


def test_a_new_newline_is_the_connectors_and_of_its_dtype(kit: Any) -> None:
    model = kit.build(dtype="bfloat16")
    assert model.newline is model.connector.newline
    assert model.newline.dtype == torch.bfloat16
    # An earlier checkpoint may hold it in float32, which is not the connector's.
    model.connector.newline = nn.Parameter(model.newline.float())
    assert model.embed_images(kit.inputs()["pixel_values"])[0].dtype == torch.bfloat16


def test_a_plain_connectors_newline_is_written_and_saved_once_in_a_chain(kit: Any) -> None:
    base = kit.build()
    plain = MLP(base.encoder.token_spec.dim, 32)
    model = VisionLanguageModel(base.encoder, plain, base.llm, image_token_id=kit.image, layout=base.layout)
    assert torch.equal(to_released(plain, "llava")["model.image_newline"], model.newline)
    chained = VisionLanguageModel(base.encoder, Chain(plain), base.llm, image_token_id=kit.image, layout=base.layout)
    assert chained.newline is model.newline
    chained.save_pretrained(kit.root / "run")
    assert torch.equal(VisionLanguageModel.from_pretrained(kit.root / "run").newline, model.newline)


def test_what_training_makes_of_the_newline_is_saved_once_loaded_and_written_back(kit: Any) -> None:
    from safetensors.torch import load_file

    model = llava_of(kit)
    batch = kit.inputs(16 + 4)
    assert model.token_spec.num_tokens == 16
    pixels, places = batch["pixel_values"], batch["input_ids"] == kit.image
    count = len(model.embed_images(pixels)[0])
    ids = batch["input_ids"].masked_fill(places, 5).repeat(1, 2)
    ids[0, :count] = kit.image
    apply_stage(model, STAGE_1)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    model(ids, labels=ids.masked_fill(ids == kit.image, -100), pixel_values=pixels).loss.backward()
    optimizer.step()
    assert not torch.equal(model.newline, torch.arange(32.0))
    written = to_released(model.connector, "llava")
    assert torch.equal(written["model.image_newline"], model.newline)
    model.save_pretrained(kit.root / "run")
    saved = load_file(kit.root / "run/connector.safetensors")
    assert [name for name in saved if "newline" in name] == ["newline"]
    loaded = VisionLanguageModel.from_pretrained(kit.root / "run")
    assert torch.equal(loaded.newline, model.newline)
    assert equal(to_released(loaded.connector, "llava"), written)


def test_a_newline_of_another_width_is_refused(kit: Any) -> None:
    with pytest.raises(TokenShapeError, match=r"the connector's newline has shape \(7,\), the LLM takes \(32,\)"):
        llava_of(kit, width=7)


def test_a_model_without_row_ends_has_no_newline(kit: Any) -> None:
    model = llava_of(kit, newline=False)
    assert model.newline is None
    assert torch.equal(model.connector.newline, torch.arange(32.0))
    apply_stage(model, STAGE_1)
    assert not model.connector.newline.requires_grad
    model.save_pretrained(kit.root / "run")
    loaded = VisionLanguageModel.from_pretrained(kit.root / "run")
    assert loaded.newline is None
    assert torch.equal(loaded.connector.newline, torch.arange(32.0))


def test_a_run_of_before_the_newline_was_the_connectors_goes_on(tmp_path: Path) -> None:
    values = dict.fromkeys((field.name for field in dataclasses.fields(RunState)), 0)
    torch.save(
        {**values, "weights": {"newline": torch.ones(3), "connector.proj.bias": torch.ones(2)}}, tmp_path / STATE_FILE
    )
    assert list(load_state(tmp_path).weights) == ["connector.newline", "connector.proj.bias"]
