"""Curves of a training of two stages: loss by step, and held-out accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from connectors.errors import VlmError

__all__ = ["draw_training"]

LOSS, HELD_OUT, ACCURACY = "#9aa4b2", "#1f4e9c", "#1a7f37"
SMOOTHED = 10


def draw_training(
    path: Path,
    losses: Sequence[float],
    judged: Sequence[tuple[int, float, float]],
    stages: Sequence[tuple[str, int]],
    title: str,
) -> None:
    """Draw the losses of a training and how well it did on held-out data.

    Args:
        path: a .png or .svg file.
        losses: the training loss of each step, from 1.
        judged: (step, held-out loss, held-out accuracy from 0 to 1), in the order of the steps.
        stages: the name of each stage and the step that it begins behind, in order.
        title: of the picture.

    Raises:
        VlmError: there is nothing to draw, or matplotlib is not installed.
    """
    if not losses or not judged:
        raise VlmError("there is no step to draw; train at least one and judge it")
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise VlmError("pictures need matplotlib; pip install 'vlm-encoders[report]'") from error

    # The same curves are the same file: no date, no drawn identities.
    with rc_context({"svg.hashsalt": "vlm-encoders"}):
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=12)
        left, right = figure.subplots(1, 2)
        steps = [step for step, _, _ in judged]
        left.plot(range(1, len(losses) + 1), _smooth(losses), color=LOSS, label=f"training, mean of {SMOOTHED} steps")
        left.plot(steps, [loss for _, loss, _ in judged], color=HELD_OUT, marker="o", label="held out")
        left.set(xlabel="step", ylabel="loss", yscale="log")
        left.legend(frameon=False, fontsize=8)
        shares = [100 * accuracy for _, _, accuracy in judged]
        right.plot(steps, shares, color=ACCURACY, marker="o")
        for step, share in zip(steps, shares, strict=True):
            right.annotate(f"{share:.0f}", (step, share), xytext=(0, 5), textcoords="offset points", fontsize=8)
        right.set(xlabel="step", ylabel="held-out answers that match, %", ylim=(-4, 112))
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            for name, begin in stages:
                axes.axvline(begin, color="#d0d5dd", linewidth=1, zorder=0)
                axes.annotate(name, (begin, 1), xycoords=("data", "axes fraction"), xytext=(4, -10),
                              textcoords="offset points", fontsize=8, color="#475467")  # fmt: skip
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _smooth(losses: Sequence[float]) -> list[float]:
    means = []
    for place in range(1, len(losses) + 1):
        window = losses[max(0, place - SMOOTHED) : place]
        means.append(sum(window) / len(window))
    return means
