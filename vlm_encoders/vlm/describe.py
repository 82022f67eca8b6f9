"""What a model's parts really are: the report to read before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from connectors.errors import VlmError
from connectors.recipe import recipe_of
from vlm_encoders.encoder import Encoder
from vlm_encoders.vlm.blocks import trained_blocks
from vlm_encoders.vlm.stages import Part
from vlm_encoders.vlm.units import Unit, unit_parameters, units

if TYPE_CHECKING:
    from torch import nn

    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["ModelReport", "PartReport", "describe_parts"]


@dataclass(frozen=True)
class PartReport:
    """One row of `describe`: a part, or one encoder of several, as it really is.

    Attributes:
        part: "encoder", "connector" or "llm".
        module: class, and the name or recipe where there is one.
        parameters: parameters of the part; of weights in 4 bits, those that they stand for.
        trainable: those that train.
        dtype: dtypes held, joined by `/`.
        lr: peak learning rate of the stage; None when frozen or without a stage.
        mode: by the stage what trains, such as "frozen", "train", "last 12 blocks", "norms" or "lora r=128";
            "eval" or "train" without one.
        tokens: shape of the visual tokens that leave the part for one view, or "".
        unit: the part, or "encoder.0" and so on where several are fused.
    """

    part: Part
    module: str
    parameters: int
    trainable: int
    dtype: str
    lr: float | None
    mode: str
    tokens: str
    unit: str


class ModelReport(tuple[PartReport, ...]):
    """The rows of `describe`, one a part or fused encoder; printed, a table.

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
    """Report each part of a model, and each encoder of several, as it stands, not as it was configured."""
    return ModelReport(_report(model, unit) for unit in units(model))


def _cells(row: PartReport) -> tuple[str, ...]:
    rate = "-" if row.lr is None else f"{row.lr:g}"
    numbers = f"{row.parameters:,}", f"{row.trainable:,}"
    return (row.unit, row.module, *numbers, row.dtype, rate, row.mode, row.tokens or "-")


def _report(model: VisionLanguageModel, unit: Unit) -> PartReport:
    parameters = [parameter for _, parameter in unit_parameters(model, unit)]
    policy = unit.policy
    return PartReport(
        part=unit.part,
        module=_module_name(model, unit),
        parameters=sum(map(_numel, parameters)),
        trainable=sum(_numel(parameter) for parameter in parameters if parameter.requires_grad),
        dtype="/".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})),
        lr=policy.lr if model.stage and policy.trains else None,
        mode=_mode(unit) if model.stage else ("train" if unit.module.training else "eval"),
        tokens=_tokens(model, unit),
        unit=unit.name,
    )


def _numel(parameter: nn.Parameter) -> int:
    # Weights in 4 bits lie packed, two and more in a byte; their state knows the shape.
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def _mode(unit: Unit) -> str:
    blocks = trained_blocks(unit)
    return unit.policy.words(None if blocks is None else len(blocks))


def _tokens(model: VisionLanguageModel, unit: Unit) -> str:
    if unit.part == "llm":
        return ""
    spec = unit.module.token_spec if isinstance(unit.module, Encoder) else model.token_spec
    return f"{spec.num_tokens} x {spec.dim}"


def _module_name(model: VisionLanguageModel, unit: Unit) -> str:
    if isinstance(unit.module, Encoder):
        return f"{type(unit.module).__name__} ({unit.module.spec.name})"
    if unit.part == "llm":
        return type(model.llm).__name__
    try:
        return recipe_of(model.connector, model.token_spec.dim)
    except VlmError:
        return type(model.connector).__name__
