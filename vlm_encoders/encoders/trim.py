"""Weights that no token depends on: found on the meta device, and dropped or set aside."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["drop_parameters", "park_parameters", "trace_parameters"]


def trace_parameters(network: nn.Module, outputs: Sequence[Iterable[Tensor | None]]) -> list[list[str]]:
    """Name the parameters that each output depends on and those before it do not.

    Args:
        network: best built on the meta device, where nothing is computed.
        outputs: one after another, each one or several tensors that track gradients.
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    seen: set[Any] = set()
    return [[names[found] for found in _leaves(output, seen) if found in names] for output in outputs]


def drop_parameters(network: nn.Module, names: Collection[str]) -> None:
    """Drop these parameters: modules that hold no others become identities, the rest None.

    A parameter that is shared under several names is dropped under all that are given.
    """
    names = set(names)
    for path, module in list(network.named_modules()):
        own = {f"{path}.{name}" if path else name for name, _ in module.named_parameters(remove_duplicate=False)}
        if not own or not names.intersection(own):
            continue
        if path and own <= names:
            parent, _, child = path.rpartition(".")
            setattr(network.get_submodule(parent), child, nn.Identity())
            names -= own
        else:
            for name, _ in list(module.named_parameters(recurse=False)):
                if (f"{path}.{name}" if path else name) in names:
                    module.register_parameter(name, None)


def park_parameters(network: nn.Module, names: Collection[str], *, persistent: bool = False) -> None:
    """Make buffers of these parameters, which the network runs with and which are not to be trained.

    Args:
        network: the owner of the parameters.
        names: of parameters, from the network.
        persistent: whether they stay in the state dict: those that change tokens must.
    """
    for name in names:
        path, _, own = name.rpartition(".")
        module = network.get_submodule(path)
        value = module.get_parameter(own).detach()
        delattr(module, own)
        module.register_buffer(own, value, persistent=persistent)


def _leaves(output: Iterable[Tensor | None], seen: set[Any]) -> list[int]:
    """Walk the graph behind an output, past the nodes seen, to the ids of its parameters."""
    found = []
    waiting: list[Any] = [tensor.grad_fn for tensor in output if tensor is not None]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(id(node.variable))
        waiting.extend(step for step, _ in node.next_functions)
    return found
