"""What a model says of itself: flags, modes and the optimizer's groups, held to its stage."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from connectors.errors import VlmError
from vlm_encoders.training.proving.ledger import Ledger, Row

__all__ = ["ProofError", "check_flags", "check_modules", "check_optimizer", "held_ids"]


class ProofError(VlmError):
    """Something trains that should not, or does not train that should; the likely cause is named."""


def check_flags(ledger: Ledger, when: str) -> None:
    """Hold what requires a gradient, and the modes of what is frozen, to the stage.

    Raises:
        ProofError: something was frozen or unfrozen since the stage was applied, or acts as in training.
    """
    parameters = ledger.parameters()
    for row in ledger.rows:
        _check_gradients(row, parameters, when)
        stirring = ledger.stirring(row)
        if stirring is not None:
            raise ProofError(
                f"{when} '{stirring[0]}' of the {row.name} is frozen and in train mode, in which it {stirring[1]}; set "
                "modes by model.train(), which leaves what is frozen in eval, and look for code that does not"
            )


def check_modules(ledger: Ledger) -> None:
    """Refuse a flag that was set where nothing reads it.

    Raises:
        ProofError: a module has `requires_grad` as an attribute of its own.
    """
    for row in ledger.rows:
        for name, module in row.module.named_modules(prefix=row.path):
            if "requires_grad" in vars(module):
                raise ProofError(
                    f"requires_grad was set on the module '{name}' of the {row.name}, which changes nothing; let the "
                    "stage's policy train it, or call its requires_grad_(...) before the stage is applied"
                )


def check_optimizer(ledger: Ledger, optimizer: Optimizer) -> None:
    """Hold an optimizer's groups to what trains.

    Raises:
        ProofError: what trains is in no group, or what is frozen is in one.
    """
    held, parameters = held_ids(optimizer), ledger.parameters()
    for row in ledger.rows:
        missing = [name for name in row.trained if id(parameters[name]) not in held]
        if missing:
            raise ProofError(
                f"the optimizer lacks {len(missing)} of the {len(row.trained)} tensors of the {row.name} that train, "
                f"'{missing[0]}' first; build it after apply_stage, of all that trains"
            )
        extra = [name for name in row.still if name in parameters and id(parameters[name]) in held]
        if extra:
            raise ProofError(
                f"the optimizer holds '{extra[0]}' of the {row.name}, which is frozen and which weight decay would "
                "move; build it after apply_stage, of what trains alone"
            )


def held_ids(optimizer: Optimizer | None) -> set[int]:
    """Give the ids of the parameters that an optimizer holds."""
    groups = [] if optimizer is None else optimizer.param_groups
    return {id(parameter) for group in groups for parameter in group["params"]}


def _check_gradients(row: Row, parameters: dict[str, nn.Parameter], when: str) -> None:
    freed = [name for name in row.still if name in parameters and parameters[name].requires_grad]
    if freed:
        raise ProofError(
            f"{when} '{freed[0]}' of the {row.name} requires a gradient, but the stage froze it; look for code that "
            "switches requires_grad on after apply_stage, such as a hook, or train it by its policy"
        )
    lost = row.lacking + [name for name in row.trained if not parameters[name].requires_grad]
    if lost:
        raise ProofError(
            f"{when} '{lost[0]}' of the {row.name} requires no gradient, but the stage trains it; look for code that "
            "freezes it after apply_stage"
        )
