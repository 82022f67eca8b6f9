"""What `train` and `compare` do alike with a run's settings."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectors.errors import VlmError
from connectors.registry import nearest

if TYPE_CHECKING:
    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["build_parts", "check_files", "read_settings"]


def read_settings(pairs: list[str]) -> dict[str, Any]:
    """Read settings that are given as `name=value`, values as in TOML; a text may stand without quotes, and `none`.

    Raises:
        VlmError: one has no `=`, or names no setting.
    """
    from vlm_encoders.training.config import TrainConfig

    known = [field.name for field in fields(TrainConfig)]
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = (each.strip() for each in pair.partition("="))
        if not equals:
            raise VlmError(f"--set takes name=value, got '{pair}'; write --set batch_size=16")
        name = name.replace("-", "_")
        if name not in known:
            raise VlmError(f"--set {pair}: no setting '{name}'; {nearest(name, known)}")
        if text.lower() == "none":
            # TOML has no word for it.
            values[name] = None
            continue
        try:
            values[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[name] = text
    return values


def check_files(settings: TrainConfig) -> None:
    """Refuse data that no run can use, before anything large is loaded.

    Raises:
        VlmError: the image folder is none, or a conversation file has problems.
    """
    from vlm_encoders.training.feeding.check import check_data
    from vlm_encoders.training.feeding.sources.spec import DataName

    for data in filter(None, (settings.data, settings.eval_data)):
        if DataName.parse(data).kind == "file" and not Path(data).is_file():
            raise VlmError(f"{data}: cannot be read (No such file); give a JSON or JSONL file")
    if not settings.images.is_dir():
        raise VlmError(f"the image folder '{settings.images}' is no folder; give the one that image paths start from")
    for data in filter(None, (settings.data, settings.eval_data)):
        name = DataName.parse(data)
        # Where bad samples are left out they are met, and counted, in the run.
        if name.kind == "file" and settings.on_bad_sample == "error":
            folder = name.folder if settings.image_folder is None else settings.images
            check_data(data, folder).raise_on_problems()


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
        if settings.dtype == "bfloat16":
            _cast(model)
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
        quantize=settings.quantize,
    )


def _cast(model: VisionLanguageModel) -> None:
    """Hold encoder and LLM in bfloat16, adapters apart; buffers, such as rotary frequencies, stay as they are."""
    import torch

    from vlm_encoders.vlm.blocks import is_adapter

    for part in (model.encoder, model.llm):
        for name, parameter in part.named_parameters():
            if parameter.is_floating_point() and not is_adapter(name):
                parameter.data = parameter.data.to(torch.bfloat16)
