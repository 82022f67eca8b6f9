"""What each process of `test_training_distributed` does; `python distributed_worker.py FOLDER`, launched twice."""

import copy
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from connectors import build_connector
from connectors.errors import VlmError
from vlm_encoders.encoders.transformers_backend import TransformersEncoder
from vlm_encoders.registry import encoder_spec
from vlm_encoders.training import TrainConfig
from vlm_encoders.training.evaluate import summed_loss
from vlm_encoders.training.masters import hold_masters
from vlm_encoders.training.optim import build_optimizer
from vlm_encoders.training.processes.distributed import kind_of, make_accelerator, prepare
from vlm_encoders.training.processes.gather import (
    full_optimizer_state,
    full_weights,
    gathered,
    load_optimizer_state,
    load_weights,
)
from vlm_encoders.training.processes.sharding import is_sharded, local
from vlm_encoders.training.recompute import recompute_blocks
from vlm_encoders.training.step import SummedLoss, take_step
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.stages import STAGES, apply_stage

IMAGE = 70
CASES = [
    *itertools.product(["ddp"], ["replicated"], ["stage-1", "stage-2", "stage-2-lora"]),
    *itertools.product(["fsdp2"], ["replicated", "sharded"], ["stage-1", "stage-2", "stage-2-lora", "stage-3"]),
]


def make_model() -> VisionLanguageModel:
    """Make a CLIP of three blocks, an MLP and a Llama of three layers, all of 32 with random weights."""
    torch.manual_seed(0)
    spec = dataclasses.replace(encoder_spec("clip-vit-b-32"), name="clip-small", weights=None, image_size=(28, 28))
    spec = dataclasses.replace(spec, stride=7, dim=32, heads=4, mlp_dim=48, num_layers=4)
    clip = TransformersEncoder.build(spec, pretrained=False, dtype=torch.float32)
    layers = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, pad_token_id=0, **layers)
    connector = build_connector("mlp", clip.token_spec, 32)
    return VisionLanguageModel(clip, connector, LlamaForCausalLM(config), image_token_id=IMAGE)


class Joined:
    """Stands for a processor whose samples are made already."""

    @staticmethod
    def collate(samples: list[Any]) -> Any:
        return join(samples)


def sample(number: int, *, text: bool) -> dict[str, torch.Tensor]:
    """Make a sample of 24 tokens, of which two to five are supervised."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, 60, (1, 24), generator=generator)
    labels = ids.clone()
    labels[:, : 19 + number % 4] = -100
    made = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if not text:
        ids[:, 1:17] = IMAGE
        made["pixel_values"] = torch.randn(1, 3, 28, 28, generator=generator)
    return made


def join(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor] | None:
    """Make a batch; None of nothing, as where all samples were bad."""
    if not samples:
        return None
    keys = {key for each in samples for key in each}
    return {key: torch.cat([each[key] for each in samples if key in each]) for key in keys}


def feed(step: int, rank: int, world: int) -> Iterator[dict[str, torch.Tensor] | None]:
    """Give the two batches of a step: four samples over all processes, the first turn half of text alone.

    Step 1 has no image at all, and in the second turn of step 2 the last two samples are bad.
    """
    for turn in range(2):
        samples = [sample(100 * step + 10 * turn + n, text=step == 1 or (turn == 0 and n < 2)) for n in range(4)]
        left = 2 if (step, turn) == (2, 1) else 4
        mine = range(4 * rank // world, 4 * (rank + 1) // world)
        yield join([samples[n] for n in mine if n < left])


class Training:
    """A model under training by the functions that a run uses."""

    def __init__(
        self, model: VisionLanguageModel, stage: str, frozen_parts: str = "replicated", **options: Any
    ) -> None:
        settings: dict[str, Any] = {"data": "", "output": "", "stage": stage, "frozen_parts": frozen_parts}
        settings |= {"batch_size": 2, "gradient_accumulation": 2, "max_grad_norm": 0.1}
        self.config = TrainConfig(cpu=True, **settings, **options)
        torch.manual_seed(3)
        self.model = apply_stage(copy.deepcopy(model), STAGES[stage]).train()
        hold_masters(self.model, self.config.mixed_precision)
        if self.config.gradient_checkpointing:
            recompute_blocks(self.model)
        self.accelerator = make_accelerator(self.config)
        optimizer = build_optimizer(self.model, learning_rate=1e-3, weight_decay=0.1)
        autocast = torch.bfloat16 if self.config.mixed_precision == "bf16" else None
        self.module, self.optimizer = prepare(
            self.accelerator, SummedLoss(self.model, autocast), optimizer, self.config
        )

    def step(self, number: int, batches: Iterator[Any] | None = None) -> dict[str, Any]:
        accelerator = self.accelerator
        mine = batches or feed(number, accelerator.process_index, accelerator.num_processes)
        limit = self.config.max_grad_norm
        result = take_step(accelerator, self.module, self.optimizer, mine, accumulation=2, max_grad_norm=limit)
        return vars(result)

    def state(self) -> dict[str, Any]:
        weights = full_weights(self.accelerator, self.module)
        optimizer = full_optimizer_state(self.accelerator, self.module, self.optimizer)
        return {"weights": copy.deepcopy(weights), "optimizer": copy.deepcopy(optimizer)}

    def load(self, state: dict[str, Any]) -> None:
        load_weights(self.module, state["weights"])
        load_optimizer_state(self.module, self.optimizer, state["optimizer"])


def held(model: VisionLanguageModel, *, trained: bool) -> float:
    """Give which part of the parameters this process holds."""
    parameters = [each for each in model.parameters() if each.requires_grad is trained]
    return sum(local(each).numel() for each in parameters) / max(sum(each.numel() for each in parameters), 1)


def failing(number: int) -> Iterator[Any]:
    """Give one batch, and then fail."""
    yield next(feed(0, number, 2))
    raise VlmError("sample 7 is broken")


def run_case(folder: Path, model: VisionLanguageModel, kind: str, frozen_parts: str, stage: str) -> dict[str, Any]:
    """Train for two steps, save, and train on; and go on from where one process had come."""
    training = Training(model, stage, frozen_parts)
    seen: dict[str, Any] = {"kind": kind_of(training.accelerator)}
    seen["held"] = {name: held(training.model, trained=name == "trained") for name in ("trained", "frozen")}
    seen["steps"] = [training.step(number) for number in range(2)]
    state = training.state()
    with gathered(training.accelerator, training.module):
        whole = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
        inside = any(is_sharded(each) for each in training.model.parameters())
    seen["sharded"] = [inside, any(is_sharded(each) for each in training.model.parameters())]
    if training.accelerator.is_main_process:
        torch.save(state | {"whole": whole}, folder / f"{kind}-{frozen_parts}-{stage}.pt")
    seen["steps"] += [training.step(number) for number in range(2, 4)]
    resumed = Training(model, stage, frozen_parts)
    resumed.load(torch.load(folder / f"one-{stage}.pt"))
    seen["resumed"] = [resumed.step(number) for number in range(2, 4)]
    return seen


def run_more(model: VisionLanguageModel) -> dict[str, Any]:
    """Recompute, read in chunks, train in mixed precision, evaluate unevenly, and fail on one process."""
    seen: dict[str, Any] = {}
    samples: Any = [sample(number, text=number == 4) for number in range(5)]
    joined: Any = Joined()
    recomputed = Training(model, "stage-2", "sharded", gradient_checkpointing=True)
    seen["recomputed"] = [recomputed.step(number) for number in range(4)]
    chunked = copy.deepcopy(model)
    chunked.chunk_tokens = 17
    seen["chunked"] = [Training(chunked, "stage-3", "sharded").step(0)]
    half = copy.deepcopy(model)
    half.llm.bfloat16()
    mixed = Training(half, "stage-2-lora", "sharded", mixed_precision="bf16")
    seen["mixed"] = [mixed.step(number) for number in range(2)]
    seen["dtypes"] = sorted({str(each.dtype) for each in mixed.model.llm.parameters() if not each.requires_grad})
    training = Training(model, "stage-2", "sharded")
    rank = training.accelerator.process_index
    shares: tuple[list[int], list[int]] = ([0, 1, 2, 3], [4])
    loss, counted = summed_loss(
        training.model, joined, samples, shares[rank], batch_size=2, module=training.module, passes=2
    )
    seen["evaluated"] = [loss, counted]
    seen["after"] = training.step(0)["loss"]
    try:
        training.step(0, failing(rank) if rank == 1 else None)
    except VlmError as error:
        seen["error"] = str(error)
    return seen


def main(folder: Path) -> None:
    """Do all that the tests look at, and write what was seen."""
    torch.set_num_threads(1)
    model = make_model()
    seen: dict[str, Any] = {}
    for kind, frozen_parts, stage in CASES:
        # On the CPU accelerate leaves sharding to the caller, so that one launch can do both.
        os.environ["ACCELERATE_USE_FSDP"] = str(kind == "fsdp2").lower()
        seen[f"{kind}-{frozen_parts}-{stage}"] = run_case(folder, model, kind, frozen_parts, stage)
    for kind in ("ddp", "fsdp2"):
        os.environ["ACCELERATE_USE_FSDP"] = str(kind == "fsdp2").lower()
        seen[kind] = run_more(model)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
