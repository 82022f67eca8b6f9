"""Apply a stage to a model: what trains in each unit, and what stays as it is.

Frozen means three things: no gradient, eval mode that outlives `model.train()`, and
no optimizer state. What a stage is, as data, stands in `policy.py` and `published.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from connectors.errors import VlmError
from vlm_encoders.vlm.adapters import adapted, add_adapters, check_adapters, has_adapter, merge_adapters
from vlm_encoders.vlm.blocks import chosen_modules, chosen_parameters, is_adapter, layer_scales, plain_name
from vlm_encoders.vlm.policy import (
    PARTS,
    STAGE_1,
    STAGE_2,
    STAGE_2_LORA,
    STAGE_3,
    Part,
    PartPolicy,
    StagePolicy,
    TrainedPart,
)
from vlm_encoders.vlm.published import STAGES
from vlm_encoders.vlm.units import unit_parameters, units_of

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = [
    "PARTS",
    "STAGES",
    "STAGE_1",
    "STAGE_2",
    "STAGE_2_LORA",
    "STAGE_3",
    "Part",
    "PartPolicy",
    "StagePolicy",
    "TrainedPart",
    "apply_stage",
    "has_adapter",
    "hold_frozen",
    "trainable_parameters",
]


def apply_stage(model: VisionLanguageModel, policy: StagePolicy) -> VisionLanguageModel:
    """Freeze and unfreeze the parts of a model as a stage says, and keep it so.

    `model.train()` afterwards leaves frozen parts, and what is frozen of a partly trained
    one, in eval mode. A stage that is refused leaves the model as it was.

    Args:
        model: the model; adapters are put on its units where the stage asks for them,
            and merged into a unit where the stage trains the unit itself.
        policy: the stage.

    Raises:
        VlmError: the stage has another number of encoder policies than the model has encoders, a unit has
            fewer blocks than `last_blocks` or no norms, or it has adapters of another kind, or weights of
            4 bits that the mode cannot train, or the reverse.
    """
    _check(model, policy)
    for unit in units_of(model, policy):
        if unit.policy.adapts:
            add_adapters(model, unit)
        elif unit.policy.trains and adapted(unit.module):
            # Left in place, they would stand frozen on weights that move beneath them.
            merge_adapters(model, unit.name)
    for unit in units_of(model, policy):
        named = list(unit_parameters(model, unit))
        chosen = chosen_parameters(unit, named)
        for name, parameter in named:
            parameter.requires_grad_(id(parameter) in chosen)
            if id(parameter) in chosen and not is_adapter(name):
                model.trained_names.add(plain_name(name))
        if unit.policy.trains:
            model.trained.add(_trained_part(unit.part, adapters=unit.policy.adapts))
    if model.newline is None and model.connector.newline is not None:
        # The layout has no row ends, so nothing could train it.
        model.connector.newline.requires_grad_(False)
    model.stage = policy
    model.train(model.training)
    return model


def hold_frozen(model: VisionLanguageModel, policy: StagePolicy) -> None:
    """Put what a stage froze in eval mode, and what it trains of a partly trained unit in train mode."""
    for part in PARTS:
        if not policy.part(part).trains:
            model.part_module(part).eval()
    for unit in units_of(model, policy):
        modules = chosen_modules(unit) if unit.policy.trains else []
        if modules is not None:
            # Norms and embeddings outside the blocks are frozen with the rest.
            unit.module.eval()
            for module in modules:
                module.train()


def trainable_parameters(model: VisionLanguageModel) -> dict[Part, list[tuple[str, nn.Parameter]]]:
    """Give the parameters that train, by part, with their names in the model."""
    return {
        part: [(name, parameter) for name, parameter in model.part_parameters(part) if parameter.requires_grad]
        for part in PARTS
    }


def _check(model: VisionLanguageModel, policy: StagePolicy) -> None:
    """Refuse what the model cannot follow before anything of it is changed."""
    for unit in units_of(model, policy):
        try:
            check_adapters(unit)
            if unit.policy.trains:
                chosen_modules(unit)
                layer_scales(unit)
        except VlmError as error:
            raise VlmError(f"stage '{policy.name}' does not fit the model: {error}") from error


def _trained_part(part: Part, *, adapters: bool) -> TrainedPart:
    if not adapters:
        return part
    names: dict[Part, TrainedPart] = {"encoder": "encoder adapter", "connector": "connector adapter", "llm": "adapter"}
    return names[part]
