"""Many connectors on the same data, order, steps and seeds: which is worth its tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from connectors.errors import VlmError
from connectors.tokens import TokenSpec, require_grid
from vlm_encoders.training.evaluate import exact_match, mean_loss
from vlm_encoders.training.feeding.data import ConversationDataset
from vlm_encoders.training.trainer import Trainer
from vlm_encoders.vlm.stages import STAGE_1, apply_stage

if TYPE_CHECKING:
    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["Build", "Compared", "HeldOut", "compare_connectors", "pooling_control"]

Build = Callable[[str, int], "tuple[VisionLanguageModel, VLMProcessor]"]
"""(recipe, seed) -> a model with a new connector, and its processor."""

HeldOut = Callable[["VLMProcessor"], ConversationDataset]
"""A model's processor -> the conversations to judge on."""


@dataclass(frozen=True)
class Compared:
    """What Stage 1 made of one connector, over all seeds.

    Attributes:
        recipe: the connector.
        tokens: of one view, as the LLM sees them.
        parameters: of the connector.
        seeds: of initial weights and order.
        losses: on the held-out data after training, one a seed.
        accuracies: part of the held-out answers that match exactly, one a seed.
        seconds: of the training steps, mean over the seeds.
    """

    recipe: str
    tokens: int
    parameters: int
    seeds: tuple[int, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    seconds: float

    @property
    def loss(self) -> float:
        """The mean held-out loss."""
        return statistics.fmean(self.losses)

    @property
    def accuracy(self) -> float:
        """The mean held-out accuracy."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """The largest accuracy less the smallest; differences below it mean nothing."""
        return max(self.accuracies) - min(self.accuracies)


def compare_connectors(
    recipe: str,
    build: Build,
    config: TrainConfig,
    held_out: HeldOut,
    *,
    seeds: Sequence[int] = (0,),
    batch_size: int = 32,
) -> Compared:
    """Train one connector by Stage 1 from each seed and judge it on held-out conversations.

    Called with one recipe after another and the same other arguments, it compares them:
    the same samples come in the same order, for as many steps, at the same learning rate.

    Args:
        recipe: the connector.
        build: makes the model; encoder and LLM must not depend on the recipe.
        config: of the training; its connector, seed and output are set here.
        held_out: gives the conversations to judge on, for the processor of a model.
        seeds: of initial weights and order, one run each.
        batch_size: of the evaluation.

    Raises:
        VlmError: no seed is given, or model or data are wrong.
    """
    if not seeds:
        raise VlmError("there is no seed to train from; give at least one, such as 0")
    losses, accuracies, seconds = [], [], []
    tokens = parameters = 0
    for seed in seeds:
        model, processor = build(recipe, seed)
        rate = config.learning_rate
        apply_stage(model, STAGE_1 if rate is None else STAGE_1.with_lr(rate))
        tokens = model.token_spec.num_tokens
        parameters = sum(parameter.numel() for _, parameter in model.part_parameters("connector"))
        run = replace(
            config, connector=recipe, seed=seed, output=str(Path(config.output) / f"{_folder(recipe)}-{seed}")
        )
        data = ConversationDataset(run.data, run.images, processor)
        seconds.append(Trainer(model, processor, data, run).fit().seconds)
        unseen = held_out(processor)
        losses.append(mean_loss(model, processor, unseen, batch_size=batch_size))
        accuracies.append(exact_match(model, processor, unseen, batch_size=batch_size).accuracy)
    mean = statistics.fmean(seconds)
    return Compared(recipe, tokens, parameters, tuple(seeds), tuple(losses), tuple(accuracies), mean)


def pooling_control(spec: TokenSpec, num_tokens: int) -> str | None:
    """Give the recipe of average pooling and an MLP with as many tokens, the plain control at equal cost.

    Args:
        spec: the encoder's tokens.
        num_tokens: what the compared connector gives.

    Returns:
        The recipe, its grid the closest in shape to the encoder's; None where no grid
        that is not finer than the encoder's has so many tokens.
    """
    rows, columns = require_grid(spec.grid)
    if num_tokens == rows * columns:
        return "mlp"
    fitting = [
        (num_tokens // side, side)
        for side in range(1, columns + 1)
        if num_tokens % side == 0 and num_tokens // side <= rows
    ]
    if not fitting:
        return None
    best = min(
        fitting, key=lambda grid: max(grid[0] * columns, grid[1] * rows) / min(grid[0] * columns, grid[1] * rows)
    )
    return f"avg_pool:grid={best[0]}x{best[1]}+mlp"


def _folder(recipe: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "-_" else "-" for sign in recipe)
