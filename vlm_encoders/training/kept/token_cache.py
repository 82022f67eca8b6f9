"""Training from tokens on the disk: each image is encoded once, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from connectors.errors import VlmError
from vlm_encoders.training.kept.cached_samples import from_cache
from vlm_encoders.training.kept.kept_tokens import TokenCache
from vlm_encoders.training.kept.token_fill import fill_cache

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["TokenCache", "fill_cache", "from_cache", "with_token_cache"]

_D = TypeVar("_D")


def with_token_cache(
    dataset: _D,
    model: VisionLanguageModel,
    processor: VLMProcessor,
    config: TrainConfig,
    accelerator: Accelerator,
    *,
    dtype: torch.dtype | None = None,
    say: Callable[[str], None] | None = None,
) -> _D:
    """Give a dataset whose samples hold the encoder's tokens, after encoding what is not kept yet.

    Call it on every process, before the model is sharded; without `token_cache` in the settings it gives the
    dataset back. The encoder stays on the device on which it stands.

    Args:
        dataset: samples by index with their images, such as a `ConversationDataset`.
        model: with a frozen encoder.
        processor: of the dataset.
        config: names the folder, and says how many processes load images.
        accelerator: device and processes.
        dtype: to keep tokens in; None for that of the encoder's output.
        say: hears on the first process of size and progress; None for a printed line.

    Raises:
        VlmError: the encoder trains, the dataset is a stream, or the disk lacks the room; raised on every process.
    """
    if config.token_cache is None:
        return dataset
    lacking = [name for name in ("processor", "images", "__len__") if not hasattr(dataset, name)]
    if lacking:
        raise VlmError(
            f"token_cache encodes all images before the first step, which needs samples by index with their images, "
            f"and a {type(dataset).__name__} has no {lacking[0]}; leave token_cache out, or give conversations by index"
        )
    autocast = torch.bfloat16 if config.mixed_precision == "bf16" else None
    cache = TokenCache(config.token_cache, model.encoder, processor, dtype=dtype, autocast=autocast)
    fill_cache(
        cache,
        dataset,
        model.encoder,
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=config.num_workers,
        chunk_tokens=config.chunk_tokens,
        say=(say or accelerator.print) if accelerator.is_main_process else None,
    )
    return from_cache(dataset, cache)
