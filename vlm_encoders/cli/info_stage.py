"""The card of a stage, as `vlm-encoders info` prints it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from vlm_encoders.cli.console import print_card

if TYPE_CHECKING:
    from vlm_encoders.vlm.policy import PartPolicy, StagePolicy
    from vlm_encoders.vlm.published_stage import PublishedStage

__all__ = ["part_words", "print_stage", "rates"]

_UNSTATED = "not stated"


def print_stage(stage: PublishedStage, *, toml: bool = False) -> None:
    """Print what a stage trains, what its authors state, and both as settings of a run; or the settings alone."""
    if toml:
        typer.echo(stage.toml(), nl=False)
        return
    policy = stage.policy
    warmup = None if stage.warmup_ratio is None else f"{stage.warmup_ratio:g} of the steps"
    length = None if stage.epochs is None and stage.steps is None else _length(stage)
    print_card(
        {
            "name": stage.name,
            "does": stage.what,
            "encoder": _part(policy.policies("encoder")),
            "connector": _part(policy.policies("connector")),
            "llm": _part(policy.policies("llm")),
            "source": stage.source,
            **({"goes on from": stage.after} if stage.after else {}),
            "batch": _UNSTATED if stage.batch is None else f"{stage.batch} samples a step, on all processes together",
            "length": length or _UNSTATED,
            "schedule": stage.schedule or _UNSTATED,
            "warm-up": warmup or _UNSTATED,
            "weight decay": _UNSTATED if stage.weight_decay is None else f"{stage.weight_decay:g}",
            "clipping": _UNSTATED if stage.max_grad_norm is None else f"{stage.max_grad_norm:g}",
            "longest": _UNSTATED if stage.max_length is None else f"{stage.max_length} tokens",
            "precision": stage.precision or _UNSTATED,
            **({"notes": stage.notes} if stage.notes else {}),
        }
    )
    typer.echo("\n# As a file for `vlm-encoders train`; what is not stated keeps this package's own default.")
    typer.echo(stage.toml(), nl=False)


def part_words(policy: StagePolicy) -> tuple[str, str, str]:
    """Say in three cells what a stage trains of encoder, connector and LLM."""
    encoder = ", ".join(dict.fromkeys(each.words() for each in policy.policies("encoder")))
    return encoder, policy.connector.words(), policy.llm.words()


def rates(policy: StagePolicy) -> str:
    """Say the peak learning rates of encoder, connector and LLM in a cell, `-` where frozen."""
    parts = (policy.policies("encoder"), (policy.connector,), (policy.llm,))
    return " / ".join(",".join(dict.fromkeys(_rate(each) for each in policies)) for policies in parts)


def _part(policies: tuple[PartPolicy, ...]) -> str:
    return "; ".join(each.words() + (f", learning rate {_rate(each)}" if each.trains else "") for each in policies)


def _rate(policy: PartPolicy) -> str:
    return f"{policy.lr:g}" if policy.trains else "-"


def _length(stage: PublishedStage) -> str:
    if stage.steps is not None:
        return f"{stage.steps} steps"
    return f"{stage.epochs} epoch{'s' * (stage.epochs != 1)}"
