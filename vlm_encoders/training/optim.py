"""The optimizer of a stage: each trained parameter once, at the rate of its unit and depth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import AdamW

from connectors.errors import VlmError
from vlm_encoders.vlm.blocks import chosen_parameters, layer_scales
from vlm_encoders.vlm.units import Unit, unit_parameters, units

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["build_optimizer", "parameter_groups"]

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
    """Sort the trained parameters into groups by unit, with and without decay, and by depth.

    Norms, biases and all else of one dimension, learned tokens and position embeddings
    have no decay. Where a policy has `layer_decay`, the rate falls with the depth of the layer,
    and a unit's groups run from the deepest, the embedding, to the last.

    Returns:
        Groups of `params`, `lr`, `weight_decay`, `part` and `unit`.

    Raises:
        VlmError: no stage is applied, nothing trains, a unit trains that the stage froze
            or the reverse, a parameter belongs to no unit or to two, or is float16.
    """
    trained = _trained(model)
    groups = []
    for unit, named in trained:
        rate = unit.policy.lr if learning_rate is None else learning_rate
        decay = weight_decay if unit.policy.weight_decay is None else unit.policy.weight_decay
        scales = layer_scales(unit)
        chosen: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in named:
            chosen.setdefault((scales.get(id(parameter), 1.0), not _decays(name, parameter)), []).append(parameter)
        groups += [
            {
                "params": chosen[scale, bare],
                "lr": rate * scale,
                "weight_decay": 0.0 if bare else decay,
                "part": unit.part,
                "unit": unit.name,
            }
            for scale, bare in sorted(chosen)
        ]
    return groups


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not any(word in name for word in _NO_DECAY)


def _trained(model: VisionLanguageModel) -> list[tuple[Unit, list[tuple[str, nn.Parameter]]]]:
    """Give what trains by unit, held to the policies of the model's stage."""
    stage = model.stage
    if stage is None:
        raise VlmError("the model has no stage, so nothing says what trains; call apply_stage(model, STAGE_1) first")
    trained = []
    for unit in units(model):
        named = list(unit_parameters(model, unit))
        chosen = chosen_parameters(unit, named)
        mine = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        strays = [name for name, parameter in mine if id(parameter) not in chosen]
        if strays:
            rest = "" if not unit.policy.trains else f" but for {unit.policy.words()}"
            raise VlmError(
                f"stage '{stage.name}' froze the {unit.name}{rest}, but {len(strays)} of its parameters require a "
                f"gradient, '{strays[0]}' first; call apply_stage again, or train the part by its policy"
            )
        if unit.policy.trains and not mine:
            raise VlmError(f"stage '{stage.name}' trains the {unit.name}, but it has no trainable parameter")
        trained.append((unit, mine))
    together = [pair for _, mine in trained for pair in mine]
    if not together:
        raise VlmError(f"stage '{stage.name}' trains nothing; use a stage such as STAGE_1 that trains a part")
    _check_once(together, ((name, each) for name, each in model.named_parameters() if each.requires_grad))
    half = [name for name, parameter in together if parameter.dtype == torch.float16]
    if half:
        raise VlmError(f"'{half[0]}' would train in float16, whose updates vanish or overflow; use bfloat16 or float32")
    return trained


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
