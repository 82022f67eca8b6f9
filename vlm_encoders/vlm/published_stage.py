"""A stage of a released model: what trains, and the settings that its authors state."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_encoders.vlm.policy import StagePolicy

__all__ = ["PublishedStage"]


@dataclass(frozen=True, kw_only=True)
class PublishedStage:
    """A stage of a released model; None is what its source does not state.

    Attributes:
        policy: what trains, at which learning rate.
        what: what the stage is, in a line.
        source: where its authors state it.
        after: name of the stage whose model it goes on from; "" for none.
        encoder: encoder that it was run with, by our name; "" where there is none for it.
        connector: recipe of its connector.
        llm: hub id of its language model.
        tiler: how it cuts large images; "" for one view an image.
        batch: samples of an optimizer step on all processes.
        per_process: of these, on one process at a time.
        epochs: passes over its data.
        steps: optimizer steps, where they are stated in place of epochs.
        warmup_ratio: part of the steps in which the learning rate rises.
        schedule: how the learning rate falls.
        floor_ratio: part of the peak at which it ends.
        weight_decay: decay of the matrices.
        max_grad_norm: norm to which gradients are clipped.
        max_length: longest sample in tokens.
        pack_tokens: tokens of a pack of samples.
        precision: dtype of the forward pass.
        notes: what differs from a run of ours, and what is not stated.
    """

    policy: StagePolicy
    what: str
    source: str
    after: str = ""
    encoder: str = ""
    connector: str = ""
    llm: str = ""
    tiler: str = ""
    batch: int | None = None
    per_process: int | None = None
    epochs: int | None = None
    steps: int | None = None
    warmup_ratio: float | None = None
    schedule: str | None = None
    floor_ratio: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    max_length: int | None = None
    pack_tokens: int | None = None
    precision: str | None = None
    notes: str = ""

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.policy.name

    def toml(self) -> str:
        """Write the settings as a file that `TrainConfig.from_toml` reads, to be filled in by the user's data."""
        lines = [f"# {self.what}", f"# source: {self.source}"]
        lines += [f"# {note}" for note in self.notes.split("; ") if note]
        lines += ['data = "data.json"', f'output = "runs/{self.name}"', f'stage = "{self.name}"']
        lines += self._parts()
        if self.batch is not None:
            step = self.per_process or self.batch
            lines.append(f"batch_size = {step}")
            lines.append(
                f"gradient_accumulation = {self.batch // step}"
                f"  # on one process; {self.batch} samples a step on all together"
            )
        values = {
            "epochs": self.epochs,
            "steps": self.steps,
            "warmup_ratio": self.warmup_ratio,
            "schedule": self.schedule,
            "floor_ratio": self.floor_ratio,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "max_length": self.max_length,
            "pack_tokens": self.pack_tokens,
            "mixed_precision": "bf16" if self.precision == "bfloat16" else None,
        }
        lines += [f"{key} = {_written(value)}" for key, value in values.items() if value is not None]
        return "\n".join(lines) + "\n"

    def _parts(self) -> list[str]:
        if self.after:
            return [f'model = "runs/{self.after}/model"']
        parts = {"encoder": self.encoder, "connector": self.connector, "llm": self.llm, "tiler": self.tiler}
        if not (self.encoder and self.connector and self.llm):
            return ["# name your own encoder, connector and llm, or a model"]
        return [f'{key} = "{value}"' for key, value in parts.items() if value]


def _written(value: float | str) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
