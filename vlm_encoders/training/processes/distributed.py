"""One process or many: what accelerate's configuration asks for, and the model wrapped for it."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import nn

from connectors.errors import VlmError
from vlm_encoders.training.processes.sharding import shard

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState
    from torch.optim import Optimizer

    from vlm_encoders.training.config import TrainConfig

__all__ = ["Kind", "forward_module", "join_processes", "kind_of", "make_accelerator", "prepare"]

Kind: TypeAlias = Literal["single", "ddp", "fsdp2", "deepspeed"]
"""How the processes share the work: one alone, each with all weights, or each with its share of them."""


def join_processes(*, cpu: bool) -> PartialState:
    """Join the processes of this launch; one where nothing was launched.

    Args:
        cpu: train on the CPU even where an accelerator is present.

    Raises:
        VlmError: several were launched and each would train alone.
    """
    from accelerate import PartialState

    # Without a device of its own accelerate knows no backend for DeepSpeed.
    options = {"backend": "gloo"} if _asked("DEEPSPEED") and os.environ.get("DS_ACCELERATOR") == "cpu" else {}
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # PartialState does not read what `accelerate launch` says of CPUs, nor take them where there is nothing else.
    cpu = cpu or _asked("CPU") or (launched > 1 and not torch.accelerator.is_available())
    state = PartialState(cpu=cpu and not options, **options)
    if launched > 1 and state.num_processes == 1:
        raise VlmError(
            f"{launched} processes were launched, but without an accelerator each would train alone; set cpu = true "
            "in the settings or ACCELERATE_USE_CPU=1 in the environment"
        )
    return state


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Make the accelerator that the user's accelerate configuration asks for; nothing else says so.

    Raises:
        VlmError: it asks for what this training does not do.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    if _asked("DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise VlmError("accelerate is set to DeepSpeed, which is not installed; pip install deepspeed, or use FSDP2")
    state = join_processes(cpu=config.cpu)
    if _asked("FSDP"):
        _check_fsdp()
    if _asked("DEEPSPEED"):
        _check_deepspeed(state)
    if _asked("MEGATRON_LM"):
        raise VlmError("accelerate is set to Megatron-LM, which has models of its own; use DDP, FSDP2 or DeepSpeed")
    # Some encoders hold weights behind the feature layer, which nothing reaches.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # Autocast is the model's own, around encoder, connector and LLM alike.
    cpu = config.cpu and state.distributed_type.value != "DEEPSPEED"
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[unused])


def kind_of(accelerator: Accelerator) -> Kind:
    """Say how the processes share the work."""
    if accelerator.distributed_type.value == "DEEPSPEED":
        return "deepspeed"
    if _asked("FSDP") and accelerator.use_distributed:
        return "fsdp2"
    return "ddp" if accelerator.use_distributed else "single"


def prepare(
    accelerator: Accelerator, module: nn.Module, optimizer: Optimizer, config: TrainConfig
) -> tuple[nn.Module, Optimizer]:
    """Bring a module to the device and wrap it for the processes.

    Call it once, after the optimizer is built and before it has stepped or a state is loaded. With FSDP2 the
    model's parameters are new objects afterwards, shares of the old ones: ask the model for them again.

    Args:
        accelerator: from `make_accelerator`.
        module: the summed loss, with the model as its `model`; on any device.
        optimizer: of the trained parameters.
        config: the settings of the run.

    Returns:
        What is called in place of the module, and what steps in place of the optimizer.

    Raises:
        VlmError: the settings and accelerate's contradict each other.
    """
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}  # type: ignore[union-attr]
    for group in optimizer.param_groups:
        # Objects and their order change with the number of processes, names do not.
        group["names"] = [names[id(parameter)] for parameter in group["params"]]
    kind = kind_of(accelerator)
    if kind == "fsdp2":
        return shard(accelerator, module, optimizer, config, _fsdp_plugin()), optimizer
    if kind == "deepspeed":
        from vlm_encoders.training.processes.zero import start_engine

        return start_engine(accelerator, module, optimizer, config)
    module.to(accelerator.device)
    wrapped: nn.Module = accelerator.prepare(module)
    return wrapped, optimizer


def forward_module(module: nn.Module) -> nn.Module:
    """Give what is called for a loss without a step: a prepared module, or what is inside where all is held whole."""
    from torch.nn.parallel import DistributedDataParallel

    return module.module if isinstance(module, DistributedDataParallel) else module


def _asked(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in {"1", "true"}


def _check_deepspeed(state: PartialState) -> None:
    if state.distributed_type.value != "DEEPSPEED":
        raise VlmError(
            "accelerate is set to DeepSpeed, but the processes train on the CPU without it; set DS_ACCELERATOR=cpu in "
            "the environment, or launch with another configuration"
        )


def _fsdp_plugin() -> Any:
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin()


def _check_fsdp() -> None:
    # Asked of the environment: accelerate's own reading of it fails on contradictions in words of its own.
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise VlmError(
            f"accelerate is set to FSDP version {version}, which flattens frozen and trained weights together; set "
            "fsdp_version: 2 in its configuration"
        )
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() in {"1", "true"}:
        raise VlmError(
            "accelerate is set to fsdp_activation_checkpointing, which would recompute what the settings say is kept; "
            "set it to false, and gradient_checkpointing = true in the settings"
        )
