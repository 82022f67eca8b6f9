"""From messages and images to what the model takes: ids, labels, views, plans.

It holds no weights, so it can be sent to the workers of a data loader.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from connectors.base import Connector
from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.preprocess import ImageLike
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling import Tiler, WholeImage, tiler_from_config
from vlm_encoders.tiling.counts import Budgets, TokenCounts, budgets_of
from vlm_encoders.tiling.pixels import TilePixels
from vlm_encoders.tiling.plan import Size
from vlm_encoders.vlm.atomic import atomic_folder
from vlm_encoders.vlm.batch import Sample, pack_samples, pad_samples
from vlm_encoders.vlm.chat import IGNORED, Message, render, tokenize_with_labels
from vlm_encoders.vlm.image_prompts import ImagePrompts, MarkCounter, PlannedImage, check_markers
from vlm_encoders.vlm.measure import SampleLength, measure_ids
from vlm_encoders.vlm.placeholders import expand_placeholders

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["Sample", "VLMProcessor"]


class VLMProcessor:
    """Makes samples and batches for a model of this encoder and connector.

    Args:
        encoder: the encoder, for its preprocessing and token shape, or its spec alone; weights are not kept.
        connector: the connector, for its token shape.
        tokenizer: a fast Hugging Face tokenizer; `<image>` is added to it as a special token
            where it has none (the LLM's embeddings need not grow).
        tiler: how an image is cut into views; None for one view an image.
        max_length: longest sample that the LLM's context takes, in tokens; None for no limit.
        max_image_tokens: the most tokens that an image may cost, markers included, where a sample does
            not say otherwise; None for no limit.

    Attributes:
        layout: how the tiler's views become one sequence, for the model of this processor.

    Raises:
        VlmError: the tiler cuts tiles of another size than the encoder takes, or writes markers that
            the tokenizer does not know.
    """

    image_token = "<image>"  # noqa: S105

    def __init__(
        self,
        encoder: Encoder | EncoderSpec,
        connector: Connector,
        tokenizer: Any,
        *,
        tiler: Tiler | None = None,
        max_length: int | None = None,
        max_image_tokens: int | None = None,
    ) -> None:
        if tiler is not None and not isinstance(tiler, Tiler):
            raise VlmError(
                f"a tiler is one of build_tiler, got {type(tiler).__name__}; write build_tiler('llava-next')"
            )
        spec = encoder if isinstance(encoder, EncoderSpec) else encoder.spec
        self.tokenizer = tokenizer
        self.tiler = tiler or WholeImage(spec.image_size[0])
        self.max_length = max_length
        (self.max_image_tokens,) = budgets_of(max_image_tokens, 1)
        self.tiler.check(spec)
        self.layout = self.tiler.layout_for(connector.out_spec(self.tiler.layout.connector_spec(spec.token_spec())))
        self.token_spec = connector.out_spec(self.layout.connector_spec(spec.token_spec()))
        if self.image_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([self.image_token], special_tokens=True)
        check_markers(self.tiler, self.layout.markers, tokenizer, self.image_token)
        marks = MarkCounter(tokenizer, self.image_token)
        counts = TokenCounts(spec, connector, self.tiler, self.layout, marks)
        self._prompts = ImagePrompts(TilePixels(spec), counts, self.image_token)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(self.image_token)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer, tiler and context length into a model's checkpoint folder.

        Raises:
            VlmError: the folder cannot be written.
        """
        target = Path(folder)
        with atomic_folder(target / "processor") as inside:
            self.tokenizer.save_pretrained(inside)
            settings = {
                "tiler": self.tiler.config(),
                "max_length": self.max_length,
                "max_image_tokens": self.max_image_tokens,
            }
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
            tiler = tiler_from_config(settings["tiler"])
            limits = {"max_length": settings["max_length"], "max_image_tokens": settings.get("max_image_tokens")}
            tokenizer = AutoTokenizer.from_pretrained(inside)
        except FileNotFoundError as error:
            raise VlmError(f"'{folder}' holds no processor; save one with processor.save_pretrained") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise VlmError(f"'{folder}' holds no processor that can be read ({error}); save it again") from error
        return cls(model.encoder, model.connector, tokenizer, tiler=tiler, **limits)

    def num_image_tokens(self, image_size: tuple[int, int], *, max_tokens: int | None = None) -> int:
        """Count the image tokens that an image of (height, width) px costs the LLM, markers apart.

        Args:
            image_size: (height, width), px.
            max_tokens: the most that the image may cost, markers included; None for `max_image_tokens`.

        Raises:
            VlmError: no plan stays within `max_tokens`.
        """
        most = self.max_image_tokens if max_tokens is None else max_tokens
        counts = self._prompts.counts
        return counts.total(counts.plan(image_size, most))

    def sample(
        self, messages: Sequence[Message], images: Sequence[ImageLike] = (), *, max_tokens: Budgets = None
    ) -> Sample:
        """Make a training sample: answers are supervised, all else is not.

        Args:
            messages: turns of "system", "user" and "assistant", `<image>` where an image stands.
            images: the images, in the order of their placeholders.
            max_tokens: the most tokens that an image may cost, markers included, or one number for each
                image; None for `max_image_tokens`.

        Raises:
            VlmError: placeholders and images do not agree, an image cannot be read, no plan stays
                within `max_tokens`, or the sample is longer than `max_length`.
        """
        planned = self._plan(images, max_tokens)
        ids, labels = tokenize_with_labels(self.tokenizer, self._write(messages, planned))
        return self._finish(ids, labels, planned)

    def measure(
        self, messages: Sequence[Message], image_sizes: Sequence[Size] = (), *, max_tokens: Budgets = None
    ) -> SampleLength:
        """Count the tokens that `sample` would give, by the sizes of the images alone; no length is too long.

        Args:
            messages: as in `sample`.
            image_sizes: (height, width) of each image as it is shown, px.
            max_tokens: as in `sample`.

        Raises:
            VlmError: placeholders and images do not agree, or no plan stays within `max_tokens`.
        """
        pieces = self._prompts.plan_sizes(image_sizes, self._budgets(len(image_sizes), max_tokens))
        ids, labels = tokenize_with_labels(self.tokenizer, self._prompts.write(messages, pieces))
        return measure_ids(ids, labels, self.image_token_id, self._prompts.runs(pieces))

    def prompt(
        self, messages: Sequence[Message], images: Sequence[ImageLike] = (), *, max_tokens: Budgets = None
    ) -> Sample:
        """Make a sample that ends where the assistant's next answer begins.

        Args:
            messages: as in `sample`.
            images: as in `sample`.
            max_tokens: as in `sample`.

        Raises:
            VlmError: as `sample`.
        """
        planned = self._plan(images, max_tokens)
        text = render(self.tokenizer, self._write(messages, planned), generation_prompt=True)
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._finish(ids, [IGNORED] * len(ids), planned)

    def collate(
        self, samples: Sequence[Sample], *, padding_side: Literal["left", "right"] = "right", packed: bool = False
    ) -> dict[str, Any]:
        """Make one batch of samples: padded on the right for training, on the left for generation, or packed.

        Args:
            samples: at least one.
            padding_side: where padding stands.
            packed: whether samples stand one after another in one row, each attending to itself alone,
                which is the same loss without padding.

        Returns:
            The keyword arguments of the model's `forward`: input_ids, attention_mask and labels
            (B, T), pixel_values (V, 3, S, S), or a list of (3, H, W), or None, and the plans of all
            images; packed, B is 1, and the lengths of the samples stand beside.

        Raises:
            VlmError: there is no sample.
        """
        if packed:
            return pack_samples(samples, native=self.tiler.native)
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        return pad_samples(samples, pad or 0, native=self.tiler.native, padding_side=padding_side)

    def _plan(self, images: Sequence[ImageLike], max_tokens: Budgets) -> list[PlannedImage]:
        return self._prompts.plan(images, self._budgets(len(images), max_tokens))

    def _budgets(self, images: int, max_tokens: Budgets) -> list[int | None]:
        own = self.max_image_tokens
        return [own if most is None else most for most in budgets_of(max_tokens, images)]

    def _write(self, messages: Sequence[Message], planned: Sequence[PlannedImage]) -> Sequence[Message]:
        return self._prompts.write(messages, [image.pieces for image in planned])

    def _finish(self, ids: list[int], labels: list[int], planned: Sequence[PlannedImage]) -> Sample:
        runs = self._prompts.runs([image.pieces for image in planned])
        expanded = expand_placeholders(ids, self.image_token_id, runs)
        text_labels = iter([label for token, label in zip(ids, labels, strict=True) if token != self.image_token_id])
        expanded_labels = [IGNORED if token == self.image_token_id else next(text_labels) for token in expanded]
        if self.max_length is not None and len(expanded) > self.max_length:
            raise VlmError(
                f"the sample is {len(expanded)} tokens long ({sum(runs)} of {len(planned)} images), the context takes "
                f"{self.max_length}; shorten the text, use a connector with fewer tokens, allow each image fewer by "
                "max_image_tokens, or raise max_length"
            )
        return Sample(expanded, expanded_labels, self._prompts.views(planned), [image.plan for image in planned])
