"""What a model's parts really are: the report to read before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from connectors.errors import VlmError
from connectors.recipe import recipe_of
from vlm_encoders.vlm.stages import PARTS, Part

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["ModelReport", "PartReport", "describe_parts"]


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


class ModelReport(tuple[PartReport, ...]):
    """The rows of `describe`, one a part; printed, a table.

    Tokens are those of one view: tiled, an image costs what its size makes of it.
    """

    def __str__(self) -> str:
        """Write the rows as aligned columns."""
        head = ("part", "class", "parameters", "trainable", "dtype", "lr", "mode", "tokens per view")
        lines = [head, *(_cells(row) for row in self)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        numbers = {2, 3}
        return "\n".join(
            "  ".join(
                cell.rjust(width) if place in numbers else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def describe_parts(model: VisionLanguageModel) -> ModelReport:
    """Report each part of a model as it stands, not as it was configured."""
    return ModelReport(_report(model, part) for part in PARTS)


def _cells(row: PartReport) -> tuple[str, ...]:
    rate = "-" if row.lr is None else f"{row.lr:g}"
    numbers = f"{row.parameters:,}", f"{row.trainable:,}"
    return (row.part, row.module, *numbers, row.dtype, rate, row.mode, row.tokens or "-")


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
