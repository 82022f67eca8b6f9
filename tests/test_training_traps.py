"""Bugs that raise nothing elsewhere, planted one by one: each is caught, with a sentence that names it."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from connectors import build_connector
from connectors.errors import VlmError
from connectors.tokens import VisualTokens
from vlm_encoders.encoder import Encoder
from vlm_encoders.tiling import plan_tiles
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.training import ConversationDataset, TrainConfig, Trainer
from vlm_encoders.training.masters import hold_masters
from vlm_encoders.training.optim import build_optimizer
from vlm_encoders.training.proving.build_report import build_report
from vlm_encoders.training.proving.doctor import examine
from vlm_encoders.training.proving.proof import Proof, ProofError
from vlm_encoders.training.state import restore_weights
from vlm_encoders.training.step import StepError
from vlm_encoders.vlm import model as model_module
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import VLMProcessor
from vlm_encoders.vlm.stages import STAGE_1, STAGE_2, STAGE_3, PartPolicy, StagePolicy, apply_stage

IMAGE = 70
LAST = StagePolicy("last", PartPolicy("train", lr=1e-4, last_blocks=1), PartPolicy("train", lr=1e-3))
LLM = StagePolicy("llm", llm=PartPolicy("train", lr=1e-6))
Plant = Callable[[VisionLanguageModel], object]


@pytest.fixture
def model(clip: Encoder, llama: LlamaForCausalLM) -> VisionLanguageModel:
    torch.manual_seed(2)
    return VisionLanguageModel(clip, build_connector("mlp", clip.token_spec, 32), llama, image_token_id=IMAGE)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six samples with images."""
    records = []
    for index in range(6):
        Image.new("RGB", (28, 28), (40 * index, 255 - 40 * index, 90)).save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": "<image> w40"}, {"from": "gpt", "value": f"w{index}"}]
        records.append({"image": f"{index}.png", "conversations": turns})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path


def batch(seed: int = 3, *, behind: bool = False) -> dict[str, Tensor]:
    """One sample of 24 tokens; its image stands before the answer, or behind it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (1, 24), generator=generator)
    labels = torch.full_like(ids, -100)
    image, answer = (slice(8, 24), slice(1, 5)) if behind else (slice(1, 17), slice(19, 24))
    labels[0, answer] = ids[0, answer]
    ids[0, image] = IMAGE
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}


def run(
    model: VisionLanguageModel, steps: int = 1, optimizer: torch.optim.Optimizer | None = None, **options: Any
) -> Proof:
    """Take steps with the proof on."""
    optimizer = optimizer or build_optimizer(model)
    proof = Proof(model)
    proof.attach(optimizer)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = model(**batch(step, **options)).loss
        assert loss is not None
        loss.backward()
        proof.after_backward(step)
        optimizer.step()
        proof.after_step(step)
    return proof


def patch_forward(module: nn.Module, wrap: Callable[[Any], Any]) -> None:
    """Put a wrapped forward in place of a module's own."""
    module.forward = wrap(module.forward)  # type: ignore[method-assign]


def named(model: VisionLanguageModel, part: str, kind: type[nn.Module] = nn.Linear) -> nn.Module:
    """Give the first module of a kind in a part."""
    return next(each for each in model.get_submodule(part).modules() if isinstance(each, kind))


# What trains although it is frozen.


def unfreezing_hook(model: VisionLanguageModel) -> None:
    calls = []

    def unfreeze(module: nn.Module, *_: object) -> None:
        calls.append(module)
        if len(calls) == 3:
            module.requires_grad_(True)

    model.llm.register_forward_hook(unfreeze)


def test_a_hook_that_unfreezes_in_mid_run(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    unfreezing_hook(model)
    sentence = r"at step 3 'llm\..*weight' of the llm requires a gradient, but the stage froze it.*such as a hook"
    with pytest.raises(ProofError, match=sentence):
        run(model, 3)


@pytest.mark.parametrize("stage", [STAGE_1, LAST], ids=lambda stage: stage.name)
def test_unfreezing_after_the_stage(model: VisionLanguageModel, stage: StagePolicy) -> None:
    apply_stage(model, stage).train()
    next(model.encoder.parameters()).requires_grad_(True)
    with pytest.raises(VlmError, match=r"froze the encoder.* 1 of its parameters require a gradient, 'encoder\."):
        build_optimizer(model)
    with pytest.raises(ProofError, match=r"before the first step 'encoder\..*requires a gradient, but the stage froze"):
        Proof(model)


def test_an_optimizer_whose_weight_decay_moves_what_is_frozen(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    with pytest.raises(ProofError, match="which is frozen and which weight decay would move"):
        run(model, optimizer=torch.optim.AdamW(model.parameters()))


def test_code_that_writes_to_frozen_weights(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    weight = named(model, "encoder").weight

    def write(*_: object) -> None:
        weight.data.mul_(0.999)

    named(model, "connector").register_forward_hook(write)
    sentence = r"after step 1 frozen weights of the encoder had moved, 'encoder\..*: the optimizer does not hold it, so"
    with pytest.raises(ProofError, match=sentence):
        run(model)


def test_lora_by_a_suffix_that_the_encoder_has_too(model: VisionLanguageModel) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    apply_stage(model, STAGE_1).train()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    with pytest.raises(VlmError, match=r"froze the encoder, but \d+ of its parameters require a gradient.*lora_A"):
        build_optimizer(model)


# What is frozen and acts as in training.


def test_a_frozen_tower_in_train_mode_with_dropout(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    next(each for each in model.encoder.modules() if type(each).__name__ == "CLIPAttention").dropout = 0.1
    assert run(copy.deepcopy(model)).warnings == []
    nn.Module.train(model.encoder, True)
    sentence = (
        "'encoder.*' of the encoder is frozen and in train mode, in which it drops values at rate 0.1; set modes by"
    )
    with pytest.raises(ProofError, match=sentence):
        run(model)


class DropPath(nn.Module):
    """As in timm: whole residual branches are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_prob = 0.2

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def test_drop_path_of_the_frozen_blocks_of_a_half_open_tower(model: VisionLanguageModel) -> None:
    blocks = model.encoder.blocks()
    for block in blocks:
        block.drop_path = DropPath()
    apply_stage(model, LAST).train()
    run(copy.deepcopy(model))
    proof = Proof(model)
    blocks[0].train()
    model(**batch()).loss.backward()
    with pytest.raises(
        ProofError, match="of the encoder is frozen and in train mode, in which it drops values at rate"
    ):
        proof.after_backward(1)


class Counting(nn.Module):
    """A batch norm over channels, in front of a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.inner = inner

    def forward(self, pixels: Tensor, **options: Any) -> Any:
        return self.inner(self.norm(pixels), **options)


def test_batch_norm_statistics_of_a_frozen_tower_that_move(model: VisionLanguageModel) -> None:
    model.encoder.network = Counting(model.encoder.network)
    apply_stage(model, STAGE_1).train()
    assert run(copy.deepcopy(model)).check()["encoder"] is False
    norm = model.encoder.network.norm
    proof = Proof(model)
    norm.train()
    with pytest.raises(
        ProofError, match="norm' of the encoder is frozen and in train mode, in which it moves its stat"
    ):
        proof.after_step(1)
    norm.eval()
    norm.running_mean += 1.0
    with pytest.raises(ProofError, match="running_mean': it is a buffer that its module writes to, as a batch norm"):
        proof.check()


# What is to train and does not.


def test_a_forward_that_is_decorated_with_no_grad(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_3).train()
    patch_forward(model.encoder.network, torch.no_grad())
    sentence = (
        "the encoder, which is to be trained, has .*ran without gradients, turned off by the decorator of CLIPVis"
    )
    with pytest.raises(ProofError, match=sentence):
        run(model)


def test_a_call_inside_no_grad(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()

    def silent(forward: Any) -> Any:
        def call(visual: VisualTokens) -> VisualTokens:
            with torch.no_grad():
                return forward(visual)

        return call

    patch_forward(model.connector, silent)
    with pytest.raises(
        ProofError, match=r"the connector.*turned off by a torch.no_grad\(\) around its call; take that"
    ):
        run(model)


@pytest.mark.parametrize("cut", ["no_grad", "detach"])
def test_a_connector_that_is_cut_off_behind_a_row_end_that_trains(model: VisionLanguageModel, cut: str) -> None:
    layout = TileLayout(unpad=True, newline=True)
    model = VisionLanguageModel(model.encoder, model.connector, model.llm, image_token_id=IMAGE, layout=layout)
    apply_stage(model, STAGE_1).train()
    if cut == "no_grad":
        patch_forward(model.connector, torch.no_grad())
    else:
        model.connector.register_forward_hook(lambda *each: VisualTokens(each[-1].tokens.detach(), each[-1].grid))
    inputs = batch()
    inputs["input_ids"] = torch.cat(
        [inputs["input_ids"][:, :1], torch.full((1, 4), IMAGE), inputs["input_ids"][:, 1:]], 1
    )
    inputs["labels"] = nn.functional.pad(inputs["labels"], (4, 0), value=-100)
    plan = plan_tiles((28, 28), 28, [(1, 1)], thumbnail=False)
    optimizer, proof = build_optimizer(model), Proof(model)
    proof.attach(optimizer)
    model(**inputs, plans=[plan]).loss.backward()
    assert model.newline.grad.any()
    proof.after_backward(1)
    optimizer.step()
    with pytest.raises(
        ProofError, match=r"the connector, which is to be trained, has no gradient: its (forward|output)"
    ):
        proof.after_step(1)


def test_one_block_of_a_trained_tower_without_gradients(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_3).train()
    patch_forward(model.encoder.blocks()[1], torch.no_grad())
    with pytest.raises(
        ProofError, match=r"'encoder\.network.*' of the encoder, which is .*turned off by the decorator"
    ):
        run(model)


def test_a_forward_without_gradients_that_text_alone_hides(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_2).train()
    patch_forward(model.connector, torch.no_grad())
    optimizer, proof = build_optimizer(model), Proof(model)
    proof.attach(optimizer)
    for step in range(1, 14):
        optimizer.zero_grad()
        inputs = batch(step)
        if step < 13:
            inputs = {"input_ids": inputs["input_ids"].clamp(max=60), "labels": inputs["labels"]}
        model(**inputs).loss.backward()
        proof.after_backward(step)
        optimizer.step()
        if step < 13:
            proof.after_step(step)
    with pytest.raises(
        ProofError, match=r"after step 13 the connector, .*ran without gradients, turned off by the dec"
    ):
        proof.after_step(13)


def test_reentrant_checkpointing_behind_inputs_without_gradients(model: VisionLanguageModel) -> None:
    apply_stage(model, LAST).train()
    block = model.encoder.blocks()[-1]
    patch_forward(
        block,
        lambda forward: (
            lambda *args, **options: checkpoint(lambda x: forward(x, *args[1:], **options), args[0], use_reentrant=True)
        ),
    )
    with pytest.raises(
        ProofError, match=r"the encoder.*ran under reentrant gradient checkpointing.*use_reentrant=False"
    ):
        run(model)


def test_an_output_that_is_detached(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    apply_stage(model, STAGE_1).train()
    fill = model_module.fill_placeholders
    monkeypatch.setattr(
        model_module, "fill_placeholders", lambda text, images, *rest: fill(text, images.detach(), *rest)
    )
    with pytest.raises(
        ProofError, match="the loss has no gradient for the connector, which is to be trained: its output is cut"
    ):
        run(model)


def test_embeddings_that_are_not_put_at_the_image_places(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply_stage(model, STAGE_2).train()
    monkeypatch.setattr(model_module, "fill_placeholders", lambda text, *_: text)
    with pytest.raises(
        ProofError, match=r"the connector.*cut off from the loss; look for a detach.* image places that are not filled"
    ):
        run(model)


def test_images_behind_the_answers(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    with pytest.raises(
        ProofError, match=r"after step 10 .* no supervised token stands behind an image, so the loss does not depend on"
    ):
        run(model, 10, behind=True)


def test_a_parameter_that_no_group_holds(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(VlmError, match="1 trained parameters belong to no part, 'scale' first"):
        build_optimizer(model)
    del model.scale
    short = torch.optim.SGD(list(model.connector.parameters())[1:], lr=1.0)
    with pytest.raises(ProofError, match=r"the optimizer lacks 1 of the 4 tensors of the connector that train, 'conn"):
        run(model, optimizer=short)


def test_an_optimizer_of_another_copy_of_the_model(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    with pytest.raises(ProofError, match="the optimizer lacks 4 of the 4 tensors"):
        run(model, optimizer=build_optimizer(copy.deepcopy(model)))


def test_a_step_that_is_skipped(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    apply_stage(model, STAGE_1).train()
    optimizer = build_optimizer(model)
    monkeypatch.setattr(optimizer, "step", lambda: None)
    with pytest.raises(ProofError, match=r"the connector.*has not moved: the optimizer's step is skipped, is undone"):
        run(model, optimizer=optimizer)


def test_requires_grad_set_on_a_module(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    model.llm.lm_head.requires_grad = True
    assert not model.llm.lm_head.weight.requires_grad
    with pytest.raises(ProofError, match=r"was set on the module 'llm.lm_head' of the llm, which changes nothing; let"):
        run(model)


def test_a_row_end_that_does_not_train(model: VisionLanguageModel) -> None:
    layout = TileLayout(unpad=True, newline=True)
    model = VisionLanguageModel(model.encoder, model.connector, model.llm, image_token_id=IMAGE, layout=layout)
    apply_stage(model, STAGE_1).train()
    model.newline.requires_grad_(False)
    with pytest.raises(
        ProofError, match=r"'connector.newline' of the connector requires no gradient, but the stage trains"
    ):
        run(model)


def test_weights_in_float16_and_updates_that_bfloat16_loses(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    model.connector.half()
    for refuse in (build_optimizer, lambda held: hold_masters(held, "no")):
        with pytest.raises(VlmError, match="would train in float16"):
            refuse(model)
    model.connector.bfloat16()
    with pytest.raises(VlmError, match=r"would train in bfloat16.* below 1/256 of a weight.*; set mixed_precision"):
        hold_masters(model, "no")
    apply_stage(model, LLM)
    model.llm.bfloat16()
    lost = torch.optim.AdamW(model.llm.parameters(), lr=1e-6, weight_decay=0.0)
    proof = run(model, 10, optimizer=lost)
    assert any(
        "norm.weight" in each and "held in bfloat16, in which an update below 1/256" in each for each in proof.warnings
    )


# What the data and the loss hide.


def parts(
    model: VisionLanguageModel, tokenizer: Any, data: Path
) -> tuple[VisionLanguageModel, VLMProcessor, TrainConfig]:
    processor = VLMProcessor(model.encoder, model.connector, tokenizer)
    config = TrainConfig(
        data=str(data), output=str(data.parent / "out"), steps=3, batch_size=3, cpu=True, progress=False, tracker="none"
    )
    model.image_token_id = processor.image_token_id
    return apply_stage(model, STAGE_1), processor, config


def test_a_template_that_writes_no_answer(model: VisionLanguageModel, tokenizer: Any, data: Path) -> None:
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    model, processor, config = parts(model, tokenizer, data)
    dataset = ConversationDataset(data, data.parent, processor)
    with pytest.raises(
        VlmError, match=r"sample \d.*the chat template writes the content of turn 2 \(assistant\) 0 times"
    ):
        Trainer(model, processor, dataset, config).fit()
    found = examine(model, processor, dataset, config, samples=3)
    assert "3 of 3 samples cannot be made and would stop the run" in found.failures[0]


class Masked:
    """A dataset whose labels are masked, all or in one sample."""

    def __init__(self, dataset: ConversationDataset, first: int) -> None:
        self.dataset = dataset
        self.first = first

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        return sample if index < self.first else replace(sample, labels=[-100] * len(sample.labels))


def test_labels_that_are_masked_until_nothing_is_learned(
    model: VisionLanguageModel, tokenizer: Any, data: Path
) -> None:
    model, processor, config = parts(model, tokenizer, data)
    masked = Masked(ConversationDataset(data, data.parent, processor), 0)
    with pytest.raises(StepError, match="no token of the batch is supervised, so it has no loss"):
        Trainer(model, processor, masked, config).fit()
    found = examine(model, processor, masked, config)
    assert "6 of 6 samples have no supervised token, so nothing is learned from them" in found.failures[0]
    some = examine(model, processor, Masked(masked.dataset, 5), config)
    assert "1 of 6 samples have no supervised token" in some.failures[0]


def test_features_and_places_that_do_not_match(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    short = batch()
    short["input_ids"][0, 1] = 5
    with pytest.raises(VlmError, match="the text holds 15 image placeholders, the images gave 16 tokens"):
        model(**short)


def test_a_model_that_ignores_the_image(
    model: VisionLanguageModel, tokenizer: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, config = parts(model, tokenizer, data)
    monkeypatch.setattr(model_module, "fill_placeholders", lambda text, *_: text)
    found = examine(model, processor, ConversationDataset(data, data.parent, processor), config)
    assert "the image makes no difference at all: the loss is the same to the bit with any image" in found.failures[0]
    assert "the loss has no gradient for the connector" in found.failures[1]


# What is lost between runs.


def test_a_connector_that_is_not_restored(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    saved = {f"mm_projector.{name}": weight for name, weight in model.connector.state_dict().items()}
    assert model.load_state_dict(saved, strict=False).missing_keys
    with pytest.raises(
        VlmError, match=r"the checkpoint does not fit the model: connector\..*missing, unexpected or of"
    ):
        restore_weights(model, saved)


def test_tokens_that_a_connector_changes_in_place(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()

    def careless(forward: Any) -> Any:
        def call(visual: VisualTokens) -> VisualTokens:
            visual.tokens.add_(1.0)
            return forward(visual)

        return call

    patch_forward(model.connector, careless)
    with pytest.raises(
        ProofError, match=r"at step 1 the connector changed what it was given in place.*write x = x \+ y"
    ):
        run(model)


def test_a_graph_that_is_kept_through_a_frozen_tower(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1).train()
    named(model, "encoder", nn.Conv2d).register_forward_hook(lambda *args: args[-1].requires_grad_(True))
    assert "the frozen encoder keeps a graph for gradients, which costs memory" in run(model).warnings[0]


def test_a_constructor_that_resets_the_global_generator(model: VisionLanguageModel, tokenizer: Any, data: Path) -> None:
    losses = []
    before = torch.random.get_rng_state()
    for name in ("mlp", "qformer:queries=4+linear"):
        VisionLanguageModel(
            model.encoder, build_connector(name, model.encoder.token_spec, 32), model.llm, image_token_id=IMAGE
        )
    assert torch.equal(torch.random.get_rng_state(), before)
    for layer in model.llm.model.layers:
        layer.self_attn.attention_dropout = 0.5
    for seed in (1, 2):
        torch.manual_seed(seed)
        built, processor, config = parts(copy.deepcopy(model), tokenizer, data)
        built.llm.train()
        built = apply_stage(built, STAGE_2)
        config = replace(config, stage=STAGE_2.name, output=str(data.parent / str(seed)))
        losses.append(Trainer(built, processor, ConversationDataset(data, data.parent, processor), config).fit().losses)
    assert losses[0] == losses[1]


def test_frozen_float32_under_autocast_and_the_dtype_that_is_really_held(model: VisionLanguageModel) -> None:
    apply_stage(model, STAGE_1)
    model.llm.bfloat16()
    report = build_report(model, mixed_precision="bf16")
    assert [row.about.dtype for row in report.rows] == ["float32", "float32", "bfloat16"]
    assert ["the encoder holds" in sentence for sentence in report.warnings] == [True]
