"""Master weights: what trains is float32 while it trains, and of its own dtype where it is saved."""

import copy
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from connectors import build_connector
from connectors.errors import VlmError
from vlm_encoders.registry import create_encoder
from vlm_encoders.testing import tiny_llm
from vlm_encoders.training.masters import hold_masters, release_masters
from vlm_encoders.vlm.decoder import decoder_layers
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.part_weights import part_hashes
from vlm_encoders.vlm.stages import STAGE_1, STAGE_2, STAGE_2_LORA, STAGE_3, PartPolicy, StagePolicy, apply_stage

HALF = torch.bfloat16
TAIL = StagePolicy("tail", PartPolicy("train", lr=1.0, last_blocks=1), PartPolicy("train", lr=1.0))


def batch(model: VisionLanguageModel) -> dict[str, Any]:
    tokens = model.token_spec.num_tokens
    ids = torch.randint(3, 60, (2, tokens + 9), generator=torch.Generator().manual_seed(0))
    ids[:, 2 : 2 + tokens] = model.image_token_id
    pixels = torch.randn(2, *model.encoder.pixel_shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.masked_fill(ids == model.image_token_id, -100), "pixel_values": pixels}


def train(model: VisionLanguageModel, steps: int, lr: float) -> list[float]:
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=HALF):
            loss = model(**batch(model)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_small_updates_are_kept_and_the_run_is_that_of_float32(kit: Any) -> None:
    built = kit.build(dtype="bfloat16", newline=False)
    whole = copy.deepcopy(apply_stage(built, STAGE_2))
    for parameter in whole.parameters():
        parameter.data = parameter.data.float()
    plain = copy.deepcopy(built)
    hold_masters(built, "bf16")
    before = {name: each.clone() for name, each in built.llm.named_parameters()}
    assert {each.dtype for each in before.values()} == {torch.float32}
    assert {each.dtype for each in built.encoder.parameters()} == {HALF}
    losses = train(built, 100, 1e-6)
    expected = train(whole, 100, 1e-6)
    # bfloat16 has 8 bits: a logit of size 1 is known to 2**-8, and the loss is a mean over 28 tokens.
    assert losses == pytest.approx(expected, abs=2**-8)
    moves = {name: (each - before[name]).abs().max().item() for name, each in built.llm.named_parameters()}
    # Adam's step is at most 0.1 / sqrt(0.001) of its rate (arXiv 1412.6980, section 2.1), and near it mostly.
    assert min(moves.values()) > 1e-5
    assert max(moves.values()) < 3.2e-4
    # The same updates on bfloat16 weights are rounded away wherever a weight is above 256 of them.
    train(plain, 100, 1e-6)
    large = dict(plain.llm.named_parameters())["model.norm.weight"]
    assert torch.equal(large.float(), before["model.norm.weight"])


def test_what_is_saved_has_the_dtype_of_the_build_and_loads(kit: Any) -> None:
    model = apply_stage(kit.build(dtype="bfloat16", newline=False), STAGE_3)
    hold_masters(model, "bf16")
    train(model, 2, 1e-2)
    model.save_pretrained(kit.root / "run")
    assert json.loads((kit.root / "run/llm/config.json").read_text())["dtype"] == "bfloat16"
    manifest = json.loads((kit.root / "run/model.json").read_text())
    assert {manifest[part]["dtype"] for part in ("encoder", "llm")} == {"bfloat16"}
    for file in ("llm/model.safetensors", "encoder.safetensors", "connector.safetensors"):
        assert {each.dtype for each in load_file(kit.root / "run" / file).values() if each.is_floating_point()} == {
            HALF
        }
    loaded = VisionLanguageModel.from_pretrained(kit.root / "run")
    for (name, now), then in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert now.dtype == torch.float32
        assert torch.equal(now.to(HALF), then), name
    assert part_hashes(loaded) == part_hashes(model)


def test_tied_weights_are_one_master_and_are_saved_once(kit: Any) -> None:
    model = kit.build(dtype="bfloat16", newline=False)
    model.llm = tiny_llm("gemma").to(HALF)
    hold_masters(apply_stage(model, STAGE_2), "bf16")
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    model.save_pretrained(kit.root / "run")
    assert "lm_head.weight" not in load_file(kit.root / "run/llm/model.safetensors")
    loaded = VisionLanguageModel.from_pretrained(kit.root / "run")
    assert part_hashes(loaded) == part_hashes(model)


def test_another_stage_gives_what_it_freezes_its_dtype_back(kit: Any) -> None:
    model = kit.build(dtype="bfloat16", newline=False)
    hashes = part_hashes(model)
    hold_masters(apply_stage(model, STAGE_3), "bf16")
    held = dict(model.master_of)
    hold_masters(model, "bf16")
    assert model.master_of == held
    hold_masters(apply_stage(model, STAGE_1), "bf16")
    assert {each.dtype for each in model.llm.parameters()} == {HALF}
    assert {name.split(".")[0] for name in model.master_of} == {"connector"}
    assert part_hashes(model) == hashes


def test_adapters_stand_on_masters_of_an_earlier_stage(kit: Any) -> None:
    model = kit.build(dtype="bfloat16", newline=False)
    hold_masters(apply_stage(model, STAGE_2), "bf16")
    train(model, 1, 1e-2)
    lora = StagePolicy("lora", connector=PartPolicy("train", lr=1e-2), llm=PartPolicy("lora", lr=1e-2, lora_rank=2))
    hold_masters(apply_stage(model, lora), "bf16")
    kinds = {"lora_" in name: each.dtype for name, each in model.llm.named_parameters()}
    assert kinds == {True: torch.float32, False: HALF}
    train(model, 1, 1e-2)
    model.save_pretrained(kit.root / "run")
    loaded = VisionLanguageModel.from_pretrained(kit.root / "run")
    assert part_hashes(loaded) == part_hashes(model)
    hold_masters(apply_stage(model, STAGE_2), "bf16")
    assert {each.dtype for each in model.llm.parameters()} == {torch.float32}


def test_a_released_model_is_the_loaded_one_and_needs_no_autocast(kit: Any) -> None:
    model = kit.build(dtype="bfloat16", newline=False)
    model.llm = tiny_llm("gemma").to(HALF)
    tails(model)
    for parameter in model.llm.get_input_embeddings().parameters():
        parameter.requires_grad_(True)
    hold_masters(model, "bf16")
    train(model, 2, 1e-2)
    model.eval()
    with pytest.raises(RuntimeError, match="dtype"), torch.no_grad():
        model(**batch(model))
    hashes = part_hashes(model)
    release_masters(model)
    assert not model.master_of
    assert {each.dtype for each in model.parameters()} == {HALF}
    assert part_hashes(model) == hashes
    with torch.no_grad():
        assert torch.isfinite(model(**batch(model)).loss)


def test_half_precision_without_autocast_is_refused(kit: Any) -> None:
    model = apply_stage(kit.build(dtype="bfloat16"), STAGE_2)
    sentence = r"would train in bfloat16, 'connector\..*' first, and lose .* below 1/256 .* mixed_precision = .bf16"
    with pytest.raises(VlmError, match=sentence):
        hold_masters(model, "no")
    assert not model.master_of
    model = apply_stage(kit.build(), STAGE_3)
    hold_masters(model, "no")
    assert not model.master_of


def norms_alone(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_3)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            for parameter in module.parameters():
                parameter.requires_grad_(True)


def tails(model: VisionLanguageModel) -> None:
    apply_stage(model, TAIL)
    for parameter in decoder_layers(model.llm)[-1].parameters():
        parameter.requires_grad_(True)


@pytest.mark.parametrize(
    ("encoder", "llm"),
    [
        ("hf", "llama"),
        ("dinov2-vit-s-14", "gpt_neox"),
        ("timm:vit_tiny_patch16_224", "phi"),
        ("timm:resnet10t", "gemma2"),
        ("open_clip:ViT-B-32/openai", "qwen3"),
    ],
)
def test_float32_and_bfloat16_meet_inside_a_part(kit: Any, encoder: str, llm: str) -> None:
    sizes = {"image_size": 28 if encoder.startswith("dino") else 64}
    vision = create_encoder(
        f"hf:{kit.root}/clip" if encoder == "hf" else encoder,
        pretrained=False,
        dtype="bfloat16",
        **({} if encoder == "hf" else sizes),
    )
    connector = build_connector("mlp", vision.token_spec, 32)
    base = VisionLanguageModel(vision, connector, tiny_llm(llm).to(HALF), image_token_id=kit.image)
    for choose in (tails, norms_alone, lambda model: apply_stage(model, STAGE_3)):
        model = copy.deepcopy(base)
        choose(model)
        hold_masters(model, "bf16")
        model.train()
        with torch.autocast("cpu", dtype=HALF):
            loss = model(**batch(model)).loss
        loss.backward()
        assert torch.isfinite(loss)
        trained = [each for each in model.parameters() if each.requires_grad]
        assert {each.dtype for each in trained} == {torch.float32}
        assert all(each.grad is None or each.grad.dtype == torch.float32 for each in trained)
        assert sum(each.grad is not None for each in trained) > len(trained) / 2


def test_lora_of_the_embedded_policy_needs_no_master(kit: Any) -> None:
    model = apply_stage(kit.build(dtype="bfloat16", newline=False), STAGE_2_LORA)
    model.connector.float()
    hold_masters(model, "no")
    assert not model.master_of
    assert isinstance(model.connector, nn.Module)
