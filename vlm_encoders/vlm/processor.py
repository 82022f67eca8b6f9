"""From messages and images to what the model takes: ids, labels, views, plans.

It holds no weights, so it can be sent to the workers of a data loader.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from connectors.base import Connector
from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.preprocess import ImageLike, load_image
from vlm_encoders.tiling.anyres import Tiler, WholeImage, tiler_from_config
from vlm_encoders.tiling.plan import TilePlan
from vlm_encoders.view_pixels import ViewPixels
from vlm_encoders.vlm.atomic import atomic_folder
from vlm_encoders.vlm.chat import IGNORED, Message, render, tokenize_with_labels
from vlm_encoders.vlm.placeholders import expand_placeholders

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["Sample", "VLMProcessor"]


@dataclass(frozen=True)
class Sample:
    """One conversation, ready for the model.

    Attributes:
        input_ids: T ids, image places expanded.
        labels: T labels: ids on answers, -100 elsewhere.
        pixel_values: (V, 3, S, S), the views of its images in order; None for text alone.
        plans: how each image was cut.
    """

    input_ids: list[int]
    labels: list[int]
    pixel_values: Tensor | None
    plans: list[TilePlan]


class VLMProcessor:
    """Makes samples and batches for a model of this encoder and connector.

    Args:
        encoder: the encoder, for its preprocessing and token shape; its weights are not kept.
        connector: the connector, for its token shape.
        tokenizer: a fast Hugging Face tokenizer; `<image>` is added to it as a special token
            where it has none (the LLM's embeddings need not grow).
        tiler: how an image is cut into views; None for one view an image.
        max_length: longest sample that the LLM's context takes, in tokens; None for no limit.

    Attributes:
        layout: how the tiler's views become one sequence, for the model of this processor.

    Raises:
        VlmError: the tiler cuts tiles of another size than the encoder takes.
    """

    image_token = "<image>"  # noqa: S105

    def __init__(
        self,
        encoder: Encoder,
        connector: Connector,
        tokenizer: Any,
        *,
        tiler: Tiler | None = None,
        max_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.tiler = tiler or WholeImage(encoder.spec.image_size[0])
        self.max_length = max_length
        self.token_spec = connector.out_spec(encoder.token_spec)
        self.layout = self.tiler.layout_for(self.token_spec)
        self.tiler.check(encoder.spec)
        self._preprocess = ViewPixels(encoder.spec)
        # A tile has the size of a view already: to crop it would lose its border.
        self._preprocess_tiles = ViewPixels(encoder.spec.altered(resize="squash", crop_pct=1.0))
        if self.image_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([self.image_token], special_tokens=True)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(self.image_token)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer, tiler and context length into a model's checkpoint folder.

        Raises:
            VlmError: the folder cannot be written.
        """
        target = Path(folder)
        with atomic_folder(target / "processor") as inside:
            self.tokenizer.save_pretrained(inside)
            settings = {"tiler": self.tiler.config(), "max_length": self.max_length}
            (inside / "processor.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: VisionLanguageModel) -> VLMProcessor:
        """Read what `save_pretrained` wrote, for the model of the same checkpoint.

        Raises:
            VlmError: the folder holds no processor.
        """
        from transformers import AutoTokenizer

        inside = Path(folder) / "processor"
        try:
            settings = json.loads((inside / "processor.json").read_text(encoding="utf-8"))
            tiler, max_length = tiler_from_config(settings["tiler"]), settings["max_length"]
            tokenizer = AutoTokenizer.from_pretrained(inside)
        except FileNotFoundError as error:
            raise VlmError(f"'{folder}' holds no processor; save one with processor.save_pretrained") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise VlmError(f"'{folder}' holds no processor that can be read ({error}); save it again") from error
        return cls(model.encoder, model.connector, tokenizer, tiler=tiler, max_length=max_length)

    def num_image_tokens(self, image_size: tuple[int, int]) -> int:
        """Count the tokens that an image of (height, width) px costs the LLM."""
        return self.layout.num_tokens(self.tiler.plan(image_size), self.token_spec)

    def sample(self, messages: Sequence[Message], images: Sequence[ImageLike] = ()) -> Sample:
        """Make a training sample: answers are supervised, all else is not.

        Args:
            messages: turns of "system", "user" and "assistant", `<image>` where an image stands.
            images: the images, in the order of their placeholders.

        Raises:
            VlmError: placeholders and images do not agree, an image cannot be read, or the
                sample is longer than `max_length`.
        """
        ids, labels = tokenize_with_labels(self.tokenizer, messages)
        return self._finish(ids, labels, images)

    def prompt(self, messages: Sequence[Message], images: Sequence[ImageLike] = ()) -> Sample:
        """Make a sample that ends where the assistant's next answer begins.

        Raises:
            VlmError: as `sample`.
        """
        text = render(self.tokenizer, messages, generation_prompt=True)
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._finish(ids, [IGNORED] * len(ids), images)

    def collate(self, samples: Sequence[Sample], *, padding_side: Literal["left", "right"] = "right") -> dict[str, Any]:
        """Pad samples to one batch: right for training, left for generation.

        Returns:
            The keyword arguments of the model's `forward`: input_ids, attention_mask and labels
            (B, T), pixel_values (V, 3, S, S) or None, and the plans of all images.
        """
        import torch

        if not samples:
            raise VlmError("there is no sample to batch; give one or more")
        length = max(len(sample.input_ids) for sample in samples)
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad

        def padded(values: list[int], fill: int) -> list[int]:
            filling = [fill] * (length - len(values))
            return values + filling if padding_side == "right" else filling + values

        views = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
        return {
            "input_ids": torch.tensor([padded(sample.input_ids, pad or 0) for sample in samples]),
            "attention_mask": torch.tensor([padded([1] * len(sample.input_ids), 0) for sample in samples]),
            "labels": torch.tensor([padded(sample.labels, IGNORED) for sample in samples]),
            "pixel_values": torch.cat(views) if views else None,
            "plans": [plan for sample in samples for plan in sample.plans],
        }

    def _finish(self, ids: list[int], labels: list[int], images: Sequence[ImageLike]) -> Sample:
        pictures = [load_image(image) for image in images]
        plans = [self.tiler.plan((picture.height, picture.width)) for picture in pictures]
        counts = [self.layout.num_tokens(plan, self.token_spec) for plan in plans]
        expanded = expand_placeholders(ids, self.image_token_id, counts)
        text_labels = iter([label for token, label in zip(ids, labels, strict=True) if token != self.image_token_id])
        expanded_labels = [IGNORED if token == self.image_token_id else next(text_labels) for token in expanded]
        if self.max_length is not None and len(expanded) > self.max_length:
            raise VlmError(
                f"the sample is {len(expanded)} tokens long ({sum(counts)} of {len(counts)} images), the context takes "
                f"{self.max_length}; shorten the text, use a connector with fewer tokens, or raise max_length"
            )
        return Sample(expanded, expanded_labels, self._pixels(pictures, plans) if pictures else None, plans)

    def _pixels(self, pictures: Sequence[Image], plans: Sequence[TilePlan]) -> Tensor:
        import torch

        parts = []
        for picture, plan in zip(pictures, plans, strict=True):
            preprocess = self._preprocess if plan.grid is None else self._preprocess_tiles
            parts.append(preprocess(self.tiler.cut(picture, plan)))
        return torch.cat(parts)
