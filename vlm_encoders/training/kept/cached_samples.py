"""Samples whose images are read from a token cache: no picture is decoded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from connectors.errors import VlmError
from vlm_encoders.preprocess import ImageLike
from vlm_encoders.tiling.counts import Budgets, budgets_of
from vlm_encoders.training.kept.kept_tokens import TokenCache, image_key
from vlm_encoders.vlm.image_prompts import ImagePrompts, PlannedImage
from vlm_encoders.vlm.processor import VLMProcessor

if TYPE_CHECKING:
    from vlm_encoders.vlm.batch import Sample
    from vlm_encoders.vlm.chat import Message

__all__ = ["from_cache"]

_D = TypeVar("_D")
_CHANGED = (
    "it changed after the cache was filled, or the folder is not one that all processes see; start the run again, "
    "which encodes what is new"
)


def from_cache(dataset: _D, cache: TokenCache) -> _D:
    """Give the same dataset, whose samples have `visual`, read from a cache, in place of pixels.

    Args:
        dataset: has a `processor`, whose `sample` it makes its samples by; it is left as it is.
        cache: filled with its images.
    """
    cached = copy.copy(dataset)
    cached.processor = _CachedProcessor(dataset.processor, cache)  # type: ignore[attr-defined]
    return cached


class _CachedProcessor(VLMProcessor):
    """A processor that reads tokens where the other one makes pixels."""

    def __init__(self, processor: VLMProcessor, cache: TokenCache) -> None:
        vars(self).update(vars(processor))
        self._plain = processor
        self._prompts = _CachedPrompts(processor._prompts, cache)  # noqa: SLF001

    def sample(
        self, messages: Sequence[Message], images: Sequence[ImageLike] = (), *, max_tokens: Budgets = None
    ) -> Sample:
        """Make a training sample; see `VLMProcessor.sample`."""
        made = super().sample(messages, images, max_tokens=max_tokens)
        visual: Any = made.pixel_values
        return replace(made, pixel_values=None, visual=visual)

    def prompt(
        self, messages: Sequence[Message], images: Sequence[ImageLike] = (), *, max_tokens: Budgets = None
    ) -> Sample:
        """Make a prompt of pixels: what is generated from need not be in the cache."""
        return self._plain.prompt(messages, images, max_tokens=max_tokens)


class _CachedPrompts(ImagePrompts):
    """Plans images by the sizes that the cache knows, and gives its tokens as their views."""

    def __init__(self, prompts: ImagePrompts, cache: TokenCache) -> None:
        super().__init__(prompts.pixels, prompts.counts, prompts.image_token)
        self._cache = cache

    def plan(self, images: Sequence[ImageLike], max_tokens: Budgets) -> list[PlannedImage]:
        """Find images in the cache and plan them; an image's entry stands in place of its levels."""
        planned = []
        for image, most in zip(images, budgets_of(max_tokens, len(images)), strict=True):
            entry = self._cache.store.find(image_key(image))
            if entry is None:
                # An image that cannot be read is told as ever.
                self.pixels.load(image)
                raise VlmError(f"{_shown(image)} is not in the token cache '{self._cache.folder}'; {_CHANGED}")
            plan = self.counts.plan(entry.size, most)
            if self._cache.bytes_of(plan) != entry.length:
                raise VlmError(
                    f"{_shown(image)} has {entry.length} bytes in the token cache, its plan {plan.num_views} views of "
                    f"{self._cache.bytes_of(plan)} bytes; delete '{self._cache.folder}'"
                )
            levels: Any = entry
            planned.append(PlannedImage(levels, plan, self.counts.pieces(plan)))
        return planned

    def views(self, planned: Sequence[PlannedImage]) -> Any:
        """Give the tokens of all views."""
        found: list[Any] = [(image.levels, image.plan) for image in planned]
        return self._cache.visual(found)


def _shown(image: ImageLike) -> str:
    return f"image '{image}'" if isinstance(image, (str, Path)) else "an embedded image"
