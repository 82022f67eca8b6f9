"""Stage 1 on the embedded parts: the settings, the model and the data of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_encoders.tiny.dataset import write_dataset
from vlm_encoders.tiny.weights_folder import llm_folder

if TYPE_CHECKING:
    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.training.feeding.data import ConversationDataset
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["RECIPES", "TINY_ENCODER", "TinyRun", "build_tiny", "tiny_run"]

TINY_ENCODER = "tiny-digits"
RECIPES = (
    "mlp",
    "linear",
    "pixel_shuffle:factor=2+mlp",
    "avg_pool:factor=2+mlp",
    "avg_pool:grid=3x3+mlp",
    "perceiver:queries=16,heads=4,head_dim=32,kv_heads=2+linear",
    "qformer:queries=8,dim=128,layers=2,heads=4,ffn=512+linear",
)
"""Connectors to compare on the embedded encoder; each trains on it."""

TRAIN_SAMPLES = 6000
HELD_OUT_SAMPLES = 240
STEPS = 400
BATCH = 32
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class TinyRun:
    """Where a run of the embedded Stage 1 lies, and its settings.

    Attributes:
        config: the settings, as `Trainer` takes them.
        held_out: the conversation file of digits that no training has seen.
    """

    config: TrainConfig
    held_out: Path

    def load(self, processor: VLMProcessor) -> tuple[ConversationDataset, ConversationDataset]:
        """Give the training data and the held-out data."""
        from vlm_encoders.training.feeding.data import ConversationDataset

        folder = self.held_out.parent
        train = ConversationDataset(self.config.data, self.config.images, processor)
        return train, ConversationDataset(self.held_out, folder, processor)


def tiny_run(folder: Path, recipe: str = "mlp", *, steps: int = STEPS, seed: int = 0) -> TinyRun:
    """Write the data of a run and give its settings.

    Args:
        folder: where data and checkpoints go.
        recipe: the connector.
        steps: optimizer steps.
        seed: of the data, the connector's initial weights and the order.

    Raises:
        VlmError: scikit-learn is not installed.
    """
    from vlm_encoders.training.config import TrainConfig

    train = write_dataset(folder / "data" / "train", "train", min(TRAIN_SAMPLES, steps * BATCH), seed=seed + 1)
    held_out = write_dataset(folder / "data" / "held_out", "held_out", HELD_OUT_SAMPLES, seed=seed + 2)
    config = TrainConfig(
        data=str(train),
        image_folder=str(train.parent),
        output=str(folder / "train"),
        encoder=TINY_ENCODER,
        connector=recipe,
        llm=str(llm_folder()),
        steps=steps,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        seed=seed,
        log_every=max(steps // 8, 1),
        cpu=True,
    )
    return TinyRun(config, held_out)


def build_tiny(recipe: str = "mlp", *, seed: int = 0) -> tuple[VisionLanguageModel, VLMProcessor]:
    """Plug the embedded encoder into the embedded LLM, with a new connector.

    Args:
        recipe: the connector.
        seed: of its initial weights.
    """
    from vlm_encoders.vlm.build import build_model

    return build_model(TINY_ENCODER, recipe, llm_folder(), seed=seed)
