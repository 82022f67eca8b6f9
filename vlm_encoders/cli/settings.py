"""What `train` and `compare` do alike with a run's settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from connectors.errors import VlmError

if TYPE_CHECKING:
    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["build_parts", "check_files"]


def check_files(settings: TrainConfig) -> None:
    """Refuse data that no run can use, before anything large is loaded.

    Raises:
        VlmError: the image folder is none, or a conversation file has problems.
    """
    from vlm_encoders.training.check import check_data

    if not Path(settings.image_folder).is_dir():
        raise VlmError(
            f"the image folder '{settings.image_folder}' is no folder; give the one that image paths start from"
        )
    for data in filter(None, (settings.data, settings.eval_data)):
        check_data(data, settings.image_folder).raise_on_problems()


def build_parts(settings: TrainConfig) -> tuple[VisionLanguageModel, VLMProcessor]:
    """Build the model and the processor that the settings name.

    Raises:
        VlmError: a part is not named, or cannot be built.
    """
    import torch

    from vlm_encoders.tiny import llm_folder
    from vlm_encoders.vlm.build import build_model
    from vlm_encoders.vlm.checkpoint import load_model
    from vlm_encoders.vlm.processor import VLMProcessor

    # LoRA draws from the global generator, and a run of the same seed must have the same weights.
    torch.manual_seed(settings.seed)
    if settings.model is not None:
        model = load_model(Path(settings.model))
        processor = VLMProcessor.from_pretrained(settings.model, model)
        if settings.max_length is not None:
            processor.max_length = settings.max_length
        if settings.max_image_tokens is not None:
            processor.max_image_tokens = settings.max_image_tokens
        model.chunk_tokens = settings.chunk_tokens
        return model, processor
    if settings.encoder is None or settings.connector is None or settings.llm is None:
        raise VlmError("training needs --encoder, --connector and --llm, or --model with a saved model")
    return build_model(
        settings.encoder,
        settings.connector,
        llm_folder() if settings.llm == "tiny" else settings.llm,
        tiler=settings.tiler,
        dtype=getattr(torch, settings.dtype),
        max_length=settings.max_length,
        max_image_tokens=settings.max_image_tokens,
        chunk_tokens=settings.chunk_tokens,
        seed=settings.seed,
    )
