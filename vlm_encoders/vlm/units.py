"""The units of a model: what one part policy governs each, so that all that can train is in exactly one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from connectors.errors import VlmError
from vlm_encoders.encoders.fused import FusedEncoder
from vlm_encoders.vlm.policy import PARTS, Part, PartPolicy, StagePolicy

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["Unit", "unit_parameters", "units", "units_of"]


@dataclass(frozen=True)
class Unit:
    """What one part policy governs.

    Attributes:
        name: "encoder", or "encoder.0" and so on where several are fused; "connector"; "llm".
        part: the part that it is, or belongs to.
        module: its module, as it stands: an LLM with adapters is peft's wrapper.
        policy: what the model's stage does to it; frozen where no stage is applied.
        path: the module's name in the model.
    """

    name: str
    part: Part
    module: nn.Module
    policy: PartPolicy
    path: str


def units(model: VisionLanguageModel) -> list[Unit]:
    """Give the units of a model with the policies of its stage, encoders first, the LLM last."""
    return units_of(model, model.stage)


def units_of(model: VisionLanguageModel, stage: StagePolicy | None) -> list[Unit]:
    """Give the units of a model with the policies of a stage; None for frozen ones.

    Raises:
        VlmError: the stage has another number of encoder policies than there are encoders.
    """
    found = []
    for part in PARTS:
        modules = _modules(model, part)
        policies = (PartPolicy(),) if stage is None else stage.policies(part)
        several = stage is not None and part == "encoder" and isinstance(stage.encoder, tuple)
        if not several:
            policies *= len(modules)
        if len(policies) != len(modules):
            assert stage is not None
            raise VlmError(
                f"stage '{stage.name}' has {len(policies)} encoder policies, the model has {len(modules)} "
                f"encoder{'s' * (len(modules) > 1)} ({model.encoder.spec.name}); give one for each, or one for all"
            )
        for (name, path, module), policy in zip(modules, policies, strict=True):
            found.append(Unit(name, part, module, policy, path))
    return found


def unit_parameters(model: VisionLanguageModel, unit: Unit) -> Iterator[tuple[str, nn.Parameter]]:
    """Give the parameters of a unit, named as in `part_parameters`; the newline vector is the connector's, its last."""
    inside = f"{unit.path}."
    for name, parameter in model.part_parameters(unit.part):
        if name.startswith(inside):
            yield name, parameter


def _modules(model: VisionLanguageModel, part: Part) -> list[tuple[str, str, nn.Module]]:
    """Give the units of a part as (name, path, module)."""
    module = model.part_module(part)
    if isinstance(module, FusedEncoder):
        return [(f"{part}.{place}", f"{part}.encoders.{place}", each) for place, each in enumerate(module.parts)]
    return [(part, part, module)]
