"""Sharded training (FSDP2): the model is wrapped by part, whatever its classes are called.

Each block of the encoder and each decoder layer of the LLM is gathered, used and let go by itself; what stands
between them (connector, embeddings, norms, head) belongs to the root and is gathered for the whole step. Every
parameter is sharded by itself, so frozen and trained ones, and those of several dtypes, stand side by side.

Every process must reach the same units in the same order: see `training.processes.blank`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from connectors.errors import VlmError
from vlm_encoders.vlm.decoder import decoder_layers

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["is_engine", "is_fsdp", "is_sharded", "local", "reshard", "shard", "sharding_units"]


def shard(
    accelerator: Accelerator, module: nn.Module, optimizer: Optimizer, config: TrainConfig, plugin: Any
) -> nn.Module:
    """Shard a module over the processes, in place, and hand its new parameters to the optimizer.

    What the first process holds is what all get, as in DDP.

    Args:
        accelerator: device and processes.
        module: has the model as its `model`.
        optimizer: of the trained parameters, before its first step.
        config: says by `frozen_parts` whether frozen parts are sharded too.
        plugin: accelerate's settings of FSDP.
    """
    from torch.distributed.fsdp import fully_shard

    model: VisionLanguageModel = module.model  # type: ignore[assignment]
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    device, mesh = accelerator.device, _mesh(accelerator)
    ignored = _ignored(model, config)
    options = {"mesh": mesh, "offload_policy": plugin.cpu_offload, "ignored_params": ignored}
    for unit in sharding_units(model):
        _send(unit, device, mesh)
        if any(parameter not in ignored for parameter in unit.parameters()):
            fully_shard(unit, reshard_after_forward=plugin.reshard_after_forward, **options)
    _send(module, device, mesh)
    fully_shard(module, **options)
    module.even = True  # type: ignore[assignment]
    sharded = dict(module.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[names[id(parameter)]] for parameter in group["params"]]
    return module


def sharding_units(model: VisionLanguageModel) -> list[nn.Module]:
    """Give what is sharded by itself: blocks of the encoder, and decoder layers of the LLM.

    An encoder that reads in chunks runs as often as it has chunks, and not equally often on all
    processes, so it is left to the root.
    """
    blocks = model.encoder.blocks() if model.chunk_tokens is None else []
    return [unit for unit in [*blocks, *decoder_layers(model.llm)] if not isinstance(unit, nn.ModuleList)]


def is_engine(module: nn.Module) -> bool:
    """Say whether a module is wrapped by DeepSpeed."""
    return hasattr(module, "zero_optimization_stage")


def is_fsdp(module: nn.Module) -> bool:
    """Say whether a module is wrapped by FSDP2."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is a process's share of a larger one."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Give what of a tensor this process holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def reshard(module: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has gathered, so that parameters are shares again."""
    from torch.distributed.fsdp import FSDPModule

    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def _ignored(model: VisionLanguageModel, config: TrainConfig) -> set[nn.Parameter]:
    """Give the parameters that each process holds whole: frozen ones if asked, and those that cannot be sharded."""
    cached = {id(parameter) for parameter in model.encoder.parameters()} if config.token_cache is not None else set()
    return {
        parameter
        for parameter in model.parameters()
        if not parameter.requires_grad
        # Four-bit weights are bytes with a state beside them. An encoder whose tokens are kept runs outside the step.
        and (config.frozen_parts == "replicated" or not parameter.is_floating_point() or id(parameter) in cached)
    }


def _send(module: nn.Module, device: torch.device, mesh: DeviceMesh) -> None:
    """Bring what is not sharded yet to the device, as the first process holds it."""
    from torch import distributed

    tensors: Iterable[Tensor] = [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        if not is_sharded(tensor):
            tensor.data = tensor.data.to(device)
            for group in mesh.get_all_groups():
                distributed.broadcast(tensor.data, group_src=0, group=group)


def _mesh(accelerator: Accelerator) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    parallel, mesh = accelerator.parallelism_config, accelerator.torch_device_mesh
    if parallel is None or mesh is None:
        return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    if parallel.tp_enabled or parallel.cp_enabled:
        raise VlmError(
            "accelerate is set to tensor or context parallelism, which split what this training keeps whole; "
            "set parallelism_config_tp_size and parallelism_config_cp_size to 1"
        )
    whole: DeviceMesh = mesh[tuple(parallel.fsdp_dim_names)]
    return whole
