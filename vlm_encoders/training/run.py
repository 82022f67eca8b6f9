"""A run under way: what is set up once, moves with each step, and goes into a checkpoint."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from connectors.errors import VlmError
from vlm_encoders.training.config import TrainConfig
from vlm_encoders.training.guard import FreezeGuard
from vlm_encoders.training.optim import build_optimizer, build_schedule
from vlm_encoders.training.progress import LogEntry
from vlm_encoders.training.rng import random_state, restore_random_state
from vlm_encoders.training.state import RunState, restore_weights, save_checkpoint, weights_to_save
from vlm_encoders.training.step import StepResult, SummedLoss
from vlm_encoders.vlm.stages import PARTS

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["Run", "join_processes", "start_run"]

_SHARDED = {"FSDP", "DEEPSPEED", "MEGATRON_LM"}


@dataclass
class Run:
    """What the loop works with.

    Attributes:
        config: the settings of the run.
        samples: length of the dataset.
        model: the model itself.
        module: the model as it is trained: summed loss, wrapped for several processes.
        accelerator: device and processes.
        optimizer: of the trained parameters.
        schedule: of the learning rates.
        guard: hashes from before the first step.
        total: steps of the whole run.
        step: steps that are done.
        tokens: LLM tokens seen.
        losses: the loss of each step.
    """

    config: TrainConfig
    samples: int
    model: VisionLanguageModel
    module: nn.Module
    accelerator: Accelerator
    optimizer: Optimizer
    schedule: LambdaLR
    guard: FreezeGuard
    total: int
    step: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)

    def state(self) -> RunState:
        """Collect what a resume needs; every process takes part."""
        from accelerate.utils import gather_object

        randoms: list[dict[str, Any]] = gather_object([random_state()])
        return RunState(
            step=self.step,
            losses=list(self.losses),
            tokens=self.tokens,
            world=self.accelerator.num_processes,
            samples=self.samples,
            config=self.config.to_dict(),
            weights=weights_to_save(self.model),
            optimizer=self.optimizer.state_dict(),
            schedule=self.schedule.state_dict(),
            random=randoms,
            frozen=dict(self.guard.frozen),
        )

    def save(self, processor: VLMProcessor) -> Path:
        """Save a checkpoint on the first process and give its folder on all.

        Raises:
            VlmError: it cannot be written; raised on every process.
        """
        from accelerate.utils import broadcast_object_list

        state, output = self.state(), Path(self.config.output)
        outcome: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                outcome = [save_checkpoint(output, state, self.model, processor, keep=self.config.keep_checkpoints)]
            except VlmError as error:
                outcome = [error]
        # All must stop when the first cannot write, or they would wait for it forever.
        broadcast_object_list(outcome)
        if isinstance(outcome[0], VlmError):
            raise outcome[0]
        folder: Path = outcome[0]
        return folder

    def due(self, every: int | None) -> bool:
        """Say whether something is to be done at this step; at the last one it always is."""
        return self.step == self.total or (every is not None and self.step % every == 0)

    def entry(self, result: StepResult, elapsed: float, *, steps: int, tokens: int) -> LogEntry:
        """Make the log entry of a step; steps and tokens are those of the `elapsed` seconds."""
        return {
            "step": self.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            **{f"lr_{group['part']}": float(group["lr"]) for group in self.optimizer.param_groups},
            "tokens": self.tokens,
            "tokens_per_second": tokens / elapsed,
            "seconds_left": elapsed / steps * (self.total - self.step),
        }


def start_run(model: VisionLanguageModel, config: TrainConfig, samples: int, state: RunState | None) -> Run:
    """Set up a run at its beginning, or where a checkpoint left it.

    Raises:
        VlmError: nothing trains, or in float16; training is sharded; or the checkpoint is of another run.
    """
    from accelerate.utils import set_seed

    _refuse_float16(model)
    accelerator = _accelerator(config)
    model.to(accelerator.device).train()
    optimizer = build_optimizer(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    total = _total_steps(config, samples, accelerator.num_processes)
    schedule = build_schedule(
        optimizer, kind=config.schedule, total=total, warmup_ratio=config.warmup_ratio, floor=config.floor_ratio
    )
    set_seed(config.seed, device_specific=True)
    if state is not None:
        state.check_settings(config, accelerator.num_processes, samples)
        restore_weights(model, state.weights)
    guard = FreezeGuard(model)
    autocast = torch.bfloat16 if config.mixed_precision == "bf16" else None
    module = accelerator.prepare(SummedLoss(model, autocast))
    run = Run(config, samples, model, module, accelerator, optimizer, schedule, guard, total)
    if state is not None:
        state.check_frozen(guard.frozen)
        optimizer.load_state_dict(state.optimizer)
        schedule.load_state_dict(state.schedule)
        run.step, run.tokens, run.losses = state.step, state.tokens, list(state.losses)
        restore_random_state(state.random[accelerator.process_index])
    return run


def _refuse_float16(model: VisionLanguageModel) -> None:
    for part in PARTS:
        if any(each.requires_grad and each.dtype == torch.float16 for _, each in model.part_parameters(part)):
            raise VlmError(
                f"the {part} would train in float16, in which AdamW divides by 0; "
                "build it in float32 or bfloat16, or train adapters by stage-2-lora"
            )


def join_processes(*, cpu: bool) -> PartialState:
    """Join the processes of this launch; one where nothing was launched.

    Args:
        cpu: train on the CPU even where an accelerator is present.

    Raises:
        VlmError: several were launched and each would train alone.
    """
    from accelerate import PartialState

    state = PartialState(cpu=cpu)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and state.num_processes == 1:
        raise VlmError(
            f"{launched} processes were launched, but without an accelerator each would train alone; set cpu = true "
            "in the settings or ACCELERATE_USE_CPU=1 in the environment"
        )
    return state


def _accelerator(config: TrainConfig) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    join_processes(cpu=config.cpu)
    # Some batches of one process reach no connector, and some encoders hold weights behind the feature layer.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=config.cpu, mixed_precision="no", kwargs_handlers=[unused])
    kind = accelerator.distributed_type.value
    if kind in _SHARDED:
        raise VlmError(f"accelerate is set to {kind}, which shards the weights; launch with --multi_gpu instead")
    return accelerator


def _total_steps(config: TrainConfig, samples: int, world: int) -> int:
    if config.steps is not None:
        return config.steps
    return math.ceil((config.epochs or 1) * samples / (config.batch_size * config.gradient_accumulation * world))
