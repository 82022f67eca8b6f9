"""Float32 master weights: what trains is held in float32, whatever the dtype in which it was built.

A weight in bfloat16 has 8 significant bits, so that an update below 1/256 of it is rounded away: at the learning
rates of a whole LLM that is nearly every update. The optimizer therefore works on float32 (Micikevicius et al.,
Mixed Precision Training, arXiv 1710.03740, section 3.1), autocast computes in bfloat16, and what is saved is
rounded once, to the dtype of the part.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from connectors.errors import VlmError
from vlm_encoders.vlm.blocks import is_adapter, plain_name
from vlm_encoders.vlm.stages import PARTS

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["hold_masters", "release_masters"]

_HALF = (torch.bfloat16, torch.float16)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)


def hold_masters(model: VisionLanguageModel, mixed_precision: str) -> None:
    """Hold each trained parameter in float32, and each frozen one in the dtype in which it was built.

    The frozen norms of a part that trains in part are float32 as well; that changes no value.

    The parameters stay the same objects, so optimizers, adapters and ties see the change. `model.master_of`
    remembers the dtypes, in which the model is hashed and saved. Call it when the stage is applied and before the
    model is wrapped; after another stage, call it again: what no longer trains gets its dtype back.

    Args:
        model: a model whose stage is applied.
        mixed_precision: "bf16" where the forward pass runs under autocast, or "no".

    Raises:
        VlmError: a parameter would train in half precision and there is no autocast, without which float32
            weights and half-precision ones cannot meet.
    """
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    built = {name: model.master_of.get(plain_name(name), each.dtype) for name, each in named.items()}
    half = [name for name, each in named.items() if each.requires_grad and built[name] in _HALF]
    if half and mixed_precision == "no":
        _refuse(half, built[half[0]])
    wanted = {*half, *_norms_beside(model, half)}
    for name, tensor in named.items():
        if name in wanted and built[name] in _HALF:
            # Adapters are new: nothing says that they are to be saved in the dtype of the weights they stand on.
            if not is_adapter(name):
                model.master_of[plain_name(name)] = built[name]
            _recast(tensor, torch.float32)
        elif model.master_of.pop(plain_name(name), None) is not None:
            _recast(tensor, built[name])


def release_masters(model: VisionLanguageModel) -> None:
    """Round all masters to the dtype in which they were built, as the model is saved.

    Behind it the model is as a loaded one, and needs no autocast where a part trained in part. What the optimizer
    knows of the weights is lost: it is the end of a run, not a pause.

    Args:
        model: not sharded.
    """
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        built = model.master_of.pop(plain_name(name), None)
        if built is not None:
            _recast(tensor, built)


def _norms_beside(model: VisionLanguageModel, trained: list[str]) -> set[str]:
    """Name the tensors of all norms of the parts in which some train.

    Behind float32 weights the stream may be float32, and the norm kernels of the CPU take no half-precision weights
    then. Those of an accelerator's autocast compute in float32 in any case. Running statistics are as a weight is:
    in bfloat16 they would lose their updates.
    """
    names = set()
    for part in PARTS:
        if any(name.startswith(f"{part}.") for name in trained):
            for path, module in model.part_module(part).named_modules(prefix=part):
                if isinstance(module, _NORMS):
                    tensors = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
                    names |= {f"{path}.{name}" for name, _ in tensors}
    return names


def _recast(tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        tensor.grad = None
        tensor.data = tensor.data.to(dtype)


def _refuse(names: list[str], dtype: torch.dtype) -> None:
    lost = "1/256" if dtype == torch.bfloat16 else "1/2048"
    raise VlmError(
        f"{len(names)} parameters would train in {str(dtype).removeprefix('torch.')}, '{names[0]}' first, and lose "
        f'each change below {lost} of a weight; set mixed_precision = "bf16", which holds them in float32 and '
        'computes in bfloat16, or dtype = "float32"'
    )
