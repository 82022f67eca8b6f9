"""What processes hold in shares, whole on the first one; and back. Checkpoints know nothing of the processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from connectors.errors import VlmError
from vlm_encoders.training.processes.sharding import is_engine, is_sharded, reshard

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer

    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["full_optimizer_state", "full_weights", "gathered", "load_optimizer_state", "load_weights", "model_of"]


def model_of(module: nn.Module) -> VisionLanguageModel:
    """Give the model inside a prepared module."""
    while isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    model: VisionLanguageModel = module.model  # type: ignore[assignment]
    return model


def full_weights(accelerator: Accelerator, module: nn.Module) -> dict[str, Tensor]:
    """Give what can move, by name and unsharded, on the CPU: trained parameters, and buffers that are saved.

    All processes take part.

    Args:
        accelerator: device and processes.
        module: a prepared module.

    Returns:
        The tensors on the first process, which may share memory with the model's; nothing on the others.
    """
    reshard(module)
    found: dict[str, Tensor] = {}
    for name, tensor in _moving(model_of(module)).items():
        whole = _whole(tensor)
        if accelerator.is_main_process:
            found[name] = whole.detach().cpu()
    return found


def load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put weights of `full_weights` into a prepared module; each process brings all of them.

    Raises:
        VlmError: the model has other trained parameters, or other shapes.
    """
    reshard(module)
    own = _moving(model_of(module))
    shapes = {name: getattr(tensor, "ds_shape", tensor.shape) for name, tensor in own.items()}
    wrong = sorted(own.keys() ^ weights.keys()) or [name for name in own if shapes[name] != weights[name].shape]
    if wrong:
        raise VlmError(
            f"the checkpoint does not fit the model: {', '.join(wrong[:3])} ({len(wrong)} in all) are missing, "
            "unexpected or of another shape; build the same model and stage"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            _fill(tensor, weights[name])
    if is_engine(module):
        from vlm_encoders.training.processes.zero import settle_weights

        settle_weights(module)


def full_optimizer_state(accelerator: Accelerator, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Give the state of a prepared optimizer by parameter name and unsharded, on the CPU.

    All processes take part.

    Returns:
        On the first process "groups", the options of each group with the "names" of its parameters, and
        "state", name -> values; nothing on the others.
    """
    parameters = dict(model_of(module).named_parameters())
    state: dict[str, dict[str, Any]] = {}
    if is_engine(module):
        from vlm_encoders.training.processes.zero import link_state

        link_state(module)
    for group, shares in zip(_groups(optimizer), optimizer.param_groups, strict=True):
        for place, name in enumerate(group["names"]):
            if is_engine(module):
                from vlm_encoders.training.processes.zero import state_of

                values = state_of(optimizer, parameters[name])
            else:
                values = optimizer.state[shares["params"][place]]
            state[name] = {key: _whole(value).detach().cpu() for key, value in values.items()}
    return {"groups": _groups(optimizer), "state": state} if accelerator.is_main_process else {}


def load_optimizer_state(module: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Put a state of `full_optimizer_state` into a prepared optimizer; each process brings all of it.

    Raises:
        VlmError: the optimizer has other parameters.
    """
    names = [group["names"] for group in optimizer.param_groups]
    if names != [group["names"] for group in state["groups"]]:
        raise VlmError(
            "the checkpoint's optimizer has other parameters, or other groups of them; build the same model and stage"
        )
    parameters = dict(model_of(module).named_parameters())
    if is_engine(module):
        from vlm_encoders.training.processes.zero import load_state

        load_state(module, optimizer, parameters, state)
        return
    numbers = {name: number for number, name in enumerate(name for group in names for name in group)}
    groups = [group | {"params": [numbers[name] for name in group["names"]]} for group in state["groups"]]
    values = {
        numbers[name]: {key: _share(value, parameters[name]) for key, value in each.items()}
        for name, each in state["state"].items()
    }
    optimizer.load_state_dict({"state": values, "param_groups": groups})


@contextmanager
def gathered(accelerator: Accelerator, module: nn.Module) -> Iterator[None]:
    """Hold the model's parameters whole on the first process, on the CPU where they were shares, so that it can save.

    All processes take part, and none may train meanwhile.
    """
    reshard(module)
    model, main = model_of(module), accelerator.is_main_process
    wholes: dict[int, nn.Parameter] = {}
    for parameter in model.parameters():
        if is_sharded(parameter) or hasattr(parameter, "ds_id"):
            whole = _whole(parameter)
            if main:
                wholes[id(parameter)] = nn.Parameter(whole.detach().cpu(), requires_grad=parameter.requires_grad)
    replaced = [
        (each, name, parameter)
        for each in model.modules()
        for name, parameter in each.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in wholes
    ]
    try:
        for each, name, parameter in replaced:
            setattr(each, name, wholes[id(parameter)])
        yield
    finally:
        for each, name, parameter in replaced:
            setattr(each, name, parameter)


def _moving(model: VisionLanguageModel) -> dict[str, Tensor]:
    frozen = {name for name, each in model.named_parameters(remove_duplicate=False) if not each.requires_grad}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in frozen}


def _whole(tensor: Tensor) -> Tensor:
    if is_sharded(tensor):
        whole: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
        return whole
    if hasattr(tensor, "ds_id"):
        from vlm_encoders.training.processes.zero import whole_parameter

        return whole_parameter(tensor)
    return tensor


def _share(whole: Tensor, like: Tensor) -> Tensor:
    """Give this process's share of a tensor that lies over the processes as another does."""
    from torch.distributed.tensor import distribute_tensor

    if not is_sharded(like) or whole.shape != like.shape:
        # One tensor for several parameters, such as a count of steps, would be moved by each of them.
        return whole.clone()
    # Each process has all of it, so nothing is sent.
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def _fill(tensor: Tensor, whole: Tensor) -> None:
    if hasattr(tensor, "ds_id"):
        from vlm_encoders.training.processes.zero import fill_parameter

        fill_parameter(tensor, whole)
    else:
        tensor.copy_(_share(whole, tensor))


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
