"""The optimizer of a stage: each trained parameter once, at the rate of its part."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from connectors.errors import VlmError
from vlm_encoders.vlm.stages import PARTS, Part, trainable_parameters

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["build_optimizer", "build_schedule", "cosine_with_warmup", "parameter_groups"]

# Learned tokens and positions are matrices by shape only: decay would pull content to zero.
_NO_DECAY = (
    *("queries", "cls_token", "reg_token", "register_tokens"),
    *("pos_embed", "position_embedding", "positional_embedding", "rel_pos", "relative_position"),
)
_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}


def build_optimizer(
    model: VisionLanguageModel, *, learning_rate: float | None = None, weight_decay: float = 0.0
) -> AdamW:
    """Make AdamW for what the model's stage trains.

    Args:
        model: a model whose stage is applied.
        learning_rate: one peak rate for every part; None for the stage's own rates.
        weight_decay: decay of the matrices.

    Raises:
        VlmError: see `parameter_groups`.
    """
    groups = parameter_groups(model, learning_rate=learning_rate, weight_decay=weight_decay)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return AdamW(groups, fused=devices <= _FUSED_DEVICES)


def parameter_groups(
    model: VisionLanguageModel, *, learning_rate: float | None, weight_decay: float
) -> list[dict[str, Any]]:
    """Sort the trained parameters into groups by part, with and without decay.

    Norms, biases and all else of one dimension, learned tokens and position embeddings
    have no decay.

    Raises:
        VlmError: no stage is applied, nothing trains, a part trains that the stage froze
            or the reverse, a parameter belongs to no part or to two, or is float16.
    """
    parts = trainable_parameters(model)
    _check_parts(model, parts)
    groups = []
    for part, named in parts.items():
        rate = learning_rate if learning_rate is not None else _stage_rate(model, part)
        for decays in (True, False):
            chosen = [parameter for name, parameter in named if _decays(name, parameter) is decays]
            if chosen:
                decay = weight_decay if decays else 0.0
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay, "part": part})
    return groups


def cosine_with_warmup(step: int, total: int, warmup: int, floor: float = 0.0) -> float:
    """Give the factor on the peak learning rate at a step, counted from 0.

    It rises in even parts over the warm-up, so that the first step moves too, is 1 at
    step `warmup`, and falls as half a cosine to `floor` at step `total`.

    Source: arXiv 1608.03983, section 3, without restarts.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_schedule(optimizer: Optimizer, *, kind: str, total: int, warmup_ratio: float, floor: float) -> LambdaLR:
    """Make the learning-rate schedule of a run of `total` steps."""
    warmup = math.ceil(warmup_ratio * total)
    # A floor of 1 is a warm-up and then the peak rate.
    factor = partial(cosine_with_warmup, total=total, warmup=warmup, floor=1.0 if kind == "constant" else floor)
    return LambdaLR(optimizer, factor)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not any(word in name for word in _NO_DECAY)


def _stage_rate(model: VisionLanguageModel, part: Part) -> float:
    return model.stage.part(part).lr if model.stage is not None else 0.0


def _check_parts(model: VisionLanguageModel, parts: dict[Part, list[tuple[str, nn.Parameter]]]) -> None:
    stage = model.stage
    if stage is None:
        raise VlmError("the model has no stage, so nothing says what trains; call apply_stage(model, STAGE_1) first")
    for part in PARTS:
        frozen = stage.part(part).mode == "frozen"
        if frozen and parts[part]:
            raise VlmError(
                f"stage '{stage.name}' froze the {part}, but {len(parts[part])} of its parameters require a gradient, "
                f"'{parts[part][0][0]}' first; call apply_stage again, or train the part by its policy"
            )
        if not frozen and not parts[part]:
            raise VlmError(f"stage '{stage.name}' trains the {part}, but it has no trainable parameter")
    named = [pair for pairs in parts.values() for pair in pairs]
    if not named:
        raise VlmError(f"stage '{stage.name}' trains nothing; use a stage such as STAGE_1 that trains a part")
    _check_once(named, ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad))
    half = [name for name, parameter in named if parameter.dtype == torch.float16]
    if half:
        raise VlmError(f"'{half[0]}' would train in float16, whose updates vanish or overflow; use bfloat16 or float32")


def _check_once(named: list[tuple[str, nn.Parameter]], trained: Iterable[tuple[str, nn.Parameter]]) -> None:
    seen: dict[int, str] = {}
    for name, parameter in named:
        if id(parameter) in seen:
            raise VlmError(f"'{name}' is the same parameter as '{seen[id(parameter)]}'; untie them or freeze one part")
        seen[id(parameter)] = name
    missed = [name for name, parameter in trained if id(parameter) not in seen]
    if missed:
        raise VlmError(
            f"{len(missed)} trained parameters belong to no part, '{missed[0]}' first; put them into the connector"
        )
