"""Why a unit does not train, or something frozen moves: the likely cause, looked for in the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from vlm_encoders.training.proving.watch import Calls, Watch

__all__ = ["BELOW_FLOAT32", "no_gradient_cause", "not_finite_cause", "not_moved_cause", "stirring_modules"]

_RATES = ("drop_prob", "p", "dropout", "attention_dropout", "drop_path_rate", "attention_probs_dropout_prob")
BELOW_FLOAT32 = torch.finfo(torch.float32).eps
"""Learning rate below which a weight of 1 in float32 need not move: AdamW's step is about the rate itself."""
_EPSILON = {torch.bfloat16: "1/256", torch.float16: "1/2048"}


def no_gradient_cause(unit: str, calls: Calls, watch: Watch, *, zero: bool) -> str | None:
    """Say why a unit that trains got no gradient, and what to do; None where the batches so far explain it.

    Args:
        unit: its name.
        calls: of its modules.
        watch: what the batches held.
        zero: gradients came and were exactly 0.
    """
    visual = unit != "llm"
    if visual and watch.batches and not watch.images:
        return None
    if calls.called and not calls.tracked:
        if calls.reentrant:
            return (
                "its modules ran under reentrant gradient checkpointing, which lets no gradient through to weights "
                "behind inputs that need none; use use_reentrant=False"
            )
        return (
            f"its forward ran without gradients, turned off by {calls.untracked_by}; take that away, or freeze the "
            f"{unit} by its policy"
        )
    if visual and not calls.called and not zero:
        return (
            f"its modules did not run although a batch held images; something else gives the image tokens, so call "
            f"the model's own {unit}, or freeze it by its policy"
        )
    if visual and watch.images and not watch.answered:
        return (
            "no supervised token stands behind an image, so the loss does not depend on it; put the images before "
            "the answers, and look at the chat template's labels"
        )
    if calls.connected and not zero:
        return (
            "its output is cut off from the loss; look for a detach, .data, numpy or no_grad behind it, and for image "
            "places that are not filled"
        )
    return (
        "the loss does not depend on it; look for image tokens that are masked or ignored, an output that is "
        "detached or multiplied by 0, or labels that are all masked"
    )


def not_moved_cause(rates: Sequence[float], dtypes: Iterable[torch.dtype], steps: int, *, zero: bool) -> str:
    """Say why weights that train are as they were, and what to do.

    Args:
        rates: greatest learning rate of each so far; empty where none is known.
        dtypes: of the weights.
        steps: steps that were taken.
        zero: they had no gradient other than 0.
    """
    if rates and not max(rates):
        said = "in the first step" if steps == 1 else f"in all {steps} steps"
        return f"its learning rate was 0 {said}; look at learning_rate, the schedule and its policy"
    if zero:
        return "it had no gradient but 0; look for what the loss depends on"
    low = next((dtype for dtype in dtypes if dtype in _EPSILON), None)
    if low is not None:
        rate = f" at learning rate {max(rates):g}" if rates else ""
        return (
            f"it is held in {str(low).removeprefix('torch.')}, in which an update below {_EPSILON[low]} of a weight is "
            f'lost{rate}; hold it in float32, with mixed_precision = "bf16" to compute in bfloat16'
        )
    return "the optimizer's step is skipped, is undone, or is that of other tensors; look at what wraps the optimizer"


def not_finite_cause(watch: Watch, weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Say where values that are not finite come from, and what to do."""
    for unit, calls in watch.calls.items():
        if calls.not_finite:
            return (
                f"the output of the {unit}, in {calls.not_finite}, was not finite already; load it in float32 or "
                "bfloat16, and look at the images of this step"
            )
    for name, weight in weights:
        if not bool(weight.isfinite().all()):
            return f"the weight '{name}' is not finite already; load it again"
    return "lower learning_rate, load the model in float32, and look at the samples of this step"


def stirring_modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """Give (name, what it does) of modules in train mode that act otherwise than in eval mode."""
    for name, each in module.named_modules(prefix=prefix):
        if not each.training:
            continue
        if isinstance(each, nn.modules.batchnorm._NormBase):  # noqa: SLF001
            if each.track_running_stats:
                yield name, "moves its statistics"
        elif not isinstance(each, (nn.ModuleList, nn.ModuleDict)):
            rate = _drop_rate(each)
            if rate:
                yield name, f"drops values at rate {rate:g}"


def _drop_rate(module: nn.Module) -> float:
    for name in _RATES:
        value = vars(module).get(name)
        if isinstance(value, float) and value > 0 and (name != "p" or "rop" in type(module).__name__):
            return value
    return 0.0
