"""What a model's parts really are: the report to read before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from connectors.errors import VlmError
from connectors.recipe import recipe_of
from vlm_encoders.vlm.stages import PARTS, Part

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["PartReport", "describe_parts"]


@dataclass(frozen=True)
class PartReport:
    """One row of `describe`: a part as it really is.

    Attributes:
        part: "encoder", "connector" or "llm".
        module: class, and the name or recipe where there is one.
        parameters: parameters of the part.
        trainable: those that train.
        dtype: dtypes held, joined by `/`.
        lr: peak learning rate of the stage; None when frozen or without a stage.
        mode: "frozen", "train" or "lora" by the stage, "eval" or "train" without one.
        tokens: shape of the visual tokens that leave the part for one view, or "".
    """

    part: Part
    module: str
    parameters: int
    trainable: int
    dtype: str
    lr: float | None
    mode: str
    tokens: str


def describe_parts(model: VisionLanguageModel) -> list[PartReport]:
    """Report each part of a model as it stands, not as it was configured."""
    return [_report(model, part) for part in PARTS]


def _report(model: VisionLanguageModel, part: Part) -> PartReport:
    parameters = [parameter for _, parameter in model.part_parameters(part)]
    policy = None if model.stage is None else model.stage.part(part)
    spec = {"encoder": model.encoder.token_spec, "connector": model.token_spec, "llm": None}[part]
    return PartReport(
        part=part,
        module=_module_name(model, part),
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        dtype="/".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})),
        lr=policy.lr if policy and policy.mode != "frozen" else None,
        mode=policy.mode if policy else ("train" if model.part_module(part).training else "eval"),
        tokens="" if spec is None else f"{spec.num_tokens} x {spec.dim}",
    )


def _module_name(model: VisionLanguageModel, part: Part) -> str:
    if part == "encoder":
        return f"{type(model.encoder).__name__} ({model.encoder.spec.name})"
    if part == "llm":
        return type(model.llm).__name__
    try:
        return recipe_of(model.connector, model.token_spec.dim)
    except VlmError:
        return type(model.connector).__name__
