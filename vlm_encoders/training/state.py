"""Where a run stands, and whether another one may go on from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from connectors.errors import VlmError
from vlm_encoders.training.config import TrainConfig
from vlm_encoders.vlm.stages import Part

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["RunState", "restore_weights"]

# What may differ when a run goes on: it changes where things go and what is seen, not what is computed.
_FREE = {"output", "image_folder", "data", "eval_data", "model", "token_cache"} | {
    "num_workers", "save_every", "keep_checkpoints", "keep_best", "log_every", "eval_every", "progress", "tracker",
    "max_bad_samples", "gradient_checkpointing", "frozen_parts", "cpu",
}  # fmt: skip
# What may differ as long as the samples of a step, or the learning rates so far, are the same.
_GLOBAL_BATCH = {"batch_size", "gradient_accumulation"}
_SCHEDULE = {"steps", "epochs", "schedule", "warmup_ratio", "decay_ratio", "floor_ratio"}


@dataclass(frozen=True)
class RunState:
    """Where a run stands after a step.

    Attributes:
        step: steps that are done; with the seed, also the position in the data.
        losses: the loss of each step.
        factors: the part of the peak learning rate that each step took.
        tokens: LLM tokens seen.
        best: the lowest evaluation loss, None before the first.
        world: number of processes.
        samples: length of the dataset, None for a stream.
        config: the settings of the run.
        weights: what can move: trained parameters and buffers.
        optimizer: state of the optimizer, by parameter name.
        feed: positions in the data, one a process.
        random: random states, one a process.
        frozen: hash of the frozen tensors of each part.
    """

    step: int
    losses: list[float]
    factors: list[float]
    tokens: int
    best: float | None
    world: int
    samples: int | None
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    feed: list[dict[str, Any]]
    random: list[dict[str, Any]]
    frozen: dict[Part, str]

    def check_settings(self, config: TrainConfig, world: int, samples: int | None) -> None:
        """Refuse to go on with a run that is not this one.

        The number of processes may differ as long as a step takes the same samples, and the
        length of the run as long as the learning rates so far would have been the same.

        Raises:
            VlmError: settings, samples of a step or of the dataset differ.
        """
        for name, now in config.to_dict().items():
            if name not in _FREE | _GLOBAL_BATCH | _SCHEDULE and self.config.get(name, now) != now:
                raise VlmError(
                    f"the checkpoint was made with {name}={self.config.get(name)!r}, now it is {now!r}, so the run "
                    "would not go on as it began; set it back, or start a new run from the checkpoint's model"
                )
        before = self.config["batch_size"] * self.config["gradient_accumulation"] * self.world
        after = config.batch_size * config.gradient_accumulation * world
        if before != after:
            raise VlmError(
                f"the checkpoint was made with {before} samples a step on {self.world} processes, now there are "
                f"{after} on {world}; set batch_size or gradient_accumulation so that their product is {before}"
            )
        if self.samples != samples:
            raise VlmError(
                f"the checkpoint was made with {self.samples} samples, the dataset has {samples} now; give the same "
                "data, or start a new run from the checkpoint's model"
            )

    def check_schedule(self, factor: Callable[[int], float]) -> None:
        """Refuse to go on where the learning rates so far would have been others.

        Args:
            factor: that of the run on the peak rate, by step from 0.

        Raises:
            VlmError: they would.
        """
        for step, taken in enumerate(self.factors):
            if factor(step) != taken:
                changed = ", ".join(sorted(_SCHEDULE))
                raise VlmError(
                    f"the checkpoint took step {step + 1} at {taken:.4g} of the peak learning rate, these settings "
                    f"say {factor(step):.4g}; set {changed} back, or start a new run from the checkpoint's model"
                )

    def feed_of(self, rank: int, world: int) -> dict[str, Any]:
        """Give where a process stood in the data; on another number of processes, what holds for all.

        Raises:
            VlmError: the data is a stream, which was dealt out to as many processes as there were.
        """
        if world == len(self.feed):
            return self.feed[rank]
        if any(each.get("place") is not None for each in self.feed):
            raise VlmError(
                f"a stream goes on with as many processes as it was dealt out to, {self.world}, now there are {world}; "
                "launch as many"
            )
        skipped = sorted({index for each in self.feed for index in each.get("skipped", ())})
        return {"skipped": skipped if rank == 0 else [], "place": None}

    def check_frozen(self, frozen: dict[Part, str]) -> None:
        """Refuse to go on with frozen weights that are not those of the run.

        Raises:
            VlmError: the hash of a part's frozen tensors differs.
        """
        for part, digest in self.frozen.items():
            if frozen[part] != digest:
                raise VlmError(f"the frozen weights of the {part} are not those of the checkpoint; load the same ones")


def restore_weights(model: VisionLanguageModel, weights: dict[str, torch.Tensor]) -> None:
    """Put saved weights back.

    Raises:
        VlmError: the model has other trained parameters, or other shapes.
    """
    frozen = _frozen_names(model)
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    wrong = sorted(own.keys() ^ weights.keys()) or [name for name in own if own[name].shape != weights[name].shape]
    if wrong:
        raise VlmError(
            f"the checkpoint does not fit the model: {', '.join(wrong[:3])} ({len(wrong)} in all) are missing, "
            "unexpected or of another shape; build the same model and stage"
        )
    model.load_state_dict(weights, strict=False)


def _frozen_names(model: VisionLanguageModel) -> set[str]:
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}
