"""Tensors that lie still in a unit that trains: odd, and at times right."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_encoders.training.proving.causes import BELOW_FLOAT32, not_moved_cause
from vlm_encoders.training.proving.gradients import GradientRecord
from vlm_encoders.training.proving.ledger import Ledger, Row

__all__ = ["tensor_warnings"]


def tensor_warnings(ledger: Ledger, gradients: GradientRecord, steps: int, when: str) -> Iterator[str]:
    """Tell which trained tensors have had no gradient, and which have one and did not move.

    Args:
        ledger: the units.
        gradients: of all steps.
        steps: that were taken.
        when: the time in words, such as "after step 10".
    """
    for row in ledger.rows:
        never = [name for name in row.trained if gradients.greatest[name] <= 0]
        if 0 < len(never) < len(row.trained):
            yield (
                f"{when} {len(never)} of {len(row.trained)} trained tensors of the {row.name} have had no gradient, "
                f"{_named(never)}; that is right for experts and row ends that no sample has used alone"
            )
        still = _still(ledger, gradients, row)
        if still:
            rates = [gradients.rates[name] for name in still if name in gradients.rates]
            cause = not_moved_cause(rates, ledger.dtypes(still), steps, zero=False)
            yield (
                f"{when} {len(still)} of {len(row.trained)} trained tensors of the {row.name} have a gradient and have "
                f"not moved, {_named(still)}: {cause}"
            )


def _still(ledger: Ledger, gradients: GradientRecord, row: Row) -> list[str]:
    unmoved = ledger.unmoved(row) if row.trained else []
    return [
        name for name in unmoved if gradients.greatest[name] > 0 and gradients.rates.get(name, 1.0) >= BELOW_FLOAT32
    ]


def _named(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
