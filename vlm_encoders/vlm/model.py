"""An encoder, a connector and any Hugging Face causal LM as one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from connectors.base import Connector
from connectors.errors import TokenShapeError
from connectors.init import Draw
from connectors.tokens import PackedTokens, TokenSpec, VisualTokens
from vlm_encoders.encoder import Encoder
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.tiling.plan import TilePlan
from vlm_encoders.tiling.whole import whole_image
from vlm_encoders.vlm.describe import ModelReport, describe_parts
from vlm_encoders.vlm.embed import check_chunk, connect, embed_packed, embed_views, first_weight
from vlm_encoders.vlm.language import VLMOutput, predict, require_left_padding
from vlm_encoders.vlm.placeholders import fill_placeholders
from vlm_encoders.vlm.stages import Part, StagePolicy, TrainedPart, hold_frozen

__all__ = ["VLMOutput", "VisionLanguageModel"]


class VisionLanguageModel(nn.Module):
    """A LLaVA-style model of three parts, each usable by itself.

    Args:
        encoder: an `Encoder`, from `create_encoder` or your own.
        connector: a `Connector` from the encoder's width to the LLM's.
        llm: a Hugging Face causal LM.
        image_token_id: the id that stands at image places, as in `VLMProcessor.image_token_id`;
            it may lie outside the LLM's vocabulary.
        layout: how tiles become one sequence; None for one view an image.
        chunk_tokens: the most tokens, prefix included, that the encoder sees at once, but one view at
            least; None for all. It bounds memory where neither encoder nor connector trains: what
            trains keeps what its gradient needs of all chunks. It is not saved with the model.

    Attributes:
        stage: the stage that `apply_stage` applied last, or None.
        trained: what a stage has trained, so that it is no longer what its source holds.
        trained_names: the parameters of encoder and LLM that a stage has trained, adapters apart.
        master_of: by name, the dtype in which a parameter was built that trains in float32; see `hold_masters`.
        token_spec: the tokens of one view as they leave the connector.

    Raises:
        TokenShapeError: the connector cannot take the encoder's tokens, or does not
            end at the LLM's width, or cannot be laid out.
    """

    def __init__(
        self,
        encoder: Encoder,
        connector: Connector,
        llm: nn.Module,
        *,
        image_token_id: int,
        layout: TileLayout | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.connector = connector
        self.llm = llm
        self.image_token_id = image_token_id
        self.layout = layout or TileLayout(unpad=False, newline=False)
        check_chunk(chunk_tokens)
        self.chunk_tokens = chunk_tokens
        self.stage: StagePolicy | None = None
        self.trained: set[TrainedPart] = set()
        self.trained_names: set[str] = set()
        self.master_of: dict[str, torch.dtype] = {}
        self.token_spec = self._checked_spec()
        if self.layout.newline:
            self._require_newline()

    @property
    def newline(self) -> nn.Parameter | None:
        """The connector's learned vector (H,) at row ends, where the layout has them."""
        return self.connector.newline if self.layout.newline else None

    @property
    def device(self) -> torch.device:
        """The device of the LLM."""
        return self._embedding.weight.device

    @property
    def _embedding(self) -> nn.Embedding:
        embedding: nn.Embedding = self.llm.get_input_embeddings()  # type: ignore[operator]
        return embedding

    def embed_images(
        self, pixel_values: Tensor | Sequence[Tensor], plans: Sequence[TilePlan] | None = None
    ) -> list[Tensor]:
        """Turn the views of a batch into image embeddings, each view encoded once.

        Args:
            pixel_values: (V, 3, S, S), the views of all images in order; or, for an encoder that packs
                views of many sizes, a list of (3, H, W).
            plans: how each image was cut; None when each view is an image.

        Returns:
            One (n, H) tensor an image.

        Raises:
            TokenShapeError: the plans do not add up to V views.
        """
        if plans is None:
            own = [self.encoder.spec.image_size] * len(pixel_values)
            seen = (
                own if isinstance(pixel_values, Tensor) else [(view.shape[1], view.shape[2]) for view in pixel_values]
            )
            plans = [whole_image(size, size) for size in seen]
        if len(pixel_values) == 0:
            return []
        parts, chunk = (self.encoder, self.connector), self.chunk_tokens
        if isinstance(pixel_values, Tensor):
            visual = embed_views(*parts, self.layout, pixel_values, plans, chunk_tokens=chunk)
            return self.layout.arrange(visual, plans, self.newline)
        return self.layout.arrange(embed_packed(*parts, pixel_values, chunk_tokens=chunk), plans, self.newline)

    def embed_tokens(
        self, visual: VisualTokens | PackedTokens, plans: Sequence[TilePlan] | None = None
    ) -> list[Tensor]:
        """Turn views that are encoded already into image embeddings.

        Args:
            visual: the views' tokens as the encoder gives them.
            plans: how each image was cut; None when each view is an image.

        Returns:
            One (n, H) tensor an image.

        Raises:
            TokenShapeError: the plans do not add up to the views.
        """
        if plans is None:
            own = self.encoder.spec.image_size
            count = len(visual.grids) if isinstance(visual, PackedTokens) else len(visual.tokens)
            plans = [whole_image(own, own)] * count
        return self.layout.arrange(connect(self.connector, self.layout, visual, plans), plans, self.newline)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        plans: Sequence[TilePlan] | None = None,
        *,
        visual: VisualTokens | PackedTokens | None = None,
        lengths: Sequence[int] | None = None,
        anchor: Callable[[], Tensor] | None = None,
    ) -> VLMOutput:
        """Predict the next token at each place, or the loss on the labels.

        With labels, logits are computed where a supervised token is predicted and
        nowhere else: the same loss at a fraction of the time and memory.

        Args:
            input_ids: (B, T), image places expanded.
            attention_mask: (B, T), 1 at real tokens; None for no padding.
            labels: (B, T), ids at supervised places and -100 elsewhere.
            pixel_values: (V, 3, S, S), a list of (3, H, W), or None for text alone.
            plans: how each image was cut; None when each view is an image.
            visual: the views' tokens as the encoder gives them, in place of `pixel_values`.
            lengths: tokens of the samples that stand one after another in a row (1, T), each attending to
                itself alone; None where each row is a sample.
            anchor: gives a zero () that joins the embeddings, so that the backward pass reaches what it is made of
                although the batch does not; None for nothing.

        Raises:
            VlmError: the image places and the images do not agree, or nothing is supervised.
        """
        embeds = self._embed(input_ids, pixel_values, plans, visual, anchor)
        return predict(self.llm, embeds, attention_mask, labels, lengths)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        plans: Sequence[TilePlan] | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue the text; each image is encoded once, whatever the beams.

        Args:
            input_ids: (B, T), padded on the left.
            attention_mask: (B, T), 1 at real tokens; None for no padding.
            pixel_values: (V, 3, S, S), a list of (3, H, W), or None for text alone.
            plans: how each image was cut; None when each view is an image.
            **options: those of transformers' `generate`: max_new_tokens, do_sample, num_beams, ...

        Returns:
            (B, new tokens): the new ids alone.

        Raises:
            VlmError: the image places and the images do not agree, or padding stands on the right.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        require_left_padding(attention_mask)
        embeds = self._embed(input_ids, pixel_values, plans)
        ids: Tensor = self.llm.generate(inputs_embeds=embeds, attention_mask=attention_mask, **options)  # type: ignore[operator]
        return ids

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002
        """Set the mode of what the stage trains; what it froze stays in eval."""
        super().train(mode)
        if mode and self.stage is not None:
            hold_frozen(self, self.stage)
        return self

    def part_module(self, part: Part) -> nn.Module:
        """Give the module of a part."""
        modules: dict[Part, nn.Module] = {"encoder": self.encoder, "connector": self.connector, "llm": self.llm}
        return modules[part]

    def part_parameters(self, part: Part) -> Iterator[tuple[str, nn.Parameter]]:
        """Give the named parameters of a part; the newline vector is the connector's, its last."""
        named = self.part_module(part).named_parameters(prefix=part)
        yield from sorted(named, key=lambda pair: pair[0] == "connector.newline")

    def describe(self) -> ModelReport:
        """Say what each part is, what of it trains, and what leaves it for one view."""
        return describe_parts(self)

    def save_pretrained(self, folder: str | Path, *, partial: bool = False) -> None:
        """Save the model; see `vlm_encoders.vlm.checkpoint.save_model`."""
        from vlm_encoders.vlm.checkpoint import save_model

        save_model(self, Path(folder), partial=partial)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> VisionLanguageModel:
        """Load a saved model; see `vlm_encoders.vlm.checkpoint.load_model`."""
        from vlm_encoders.vlm.checkpoint import load_model

        return load_model(Path(folder), **options)

    def _require_newline(self) -> None:
        """Hold the connector's newline vector to the LLM's width; draw one where it has none."""
        width, newline = self.token_spec.dim, self.connector.newline
        if newline is None:
            first = first_weight(self.connector)
            self.connector.newline = nn.Parameter(torch.empty(width) if first is None else first.new_empty(width))
            # The released models draw it so: arXiv 2310.03744's code, image_newline.
            Draw().normal(self.connector.newline, width**-0.5)
        elif newline.shape != (width,):
            raise TokenShapeError(f"the connector's newline has shape {tuple(newline.shape)}, the LLM takes ({width},)")

    def _checked_spec(self) -> TokenSpec:
        spec = self.connector.out_spec(self.layout.connector_spec(self.encoder.token_spec))
        width = self._embedding.embedding_dim
        if spec.dim != width:
            raise TokenShapeError(f"the connector ends at width {spec.dim}, the LLM takes {width}; end it with mlp")
        self.layout.check(spec)
        return spec

    def _embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | Sequence[Tensor] | None,
        plans: Sequence[TilePlan] | None,
        visual: VisualTokens | PackedTokens | None = None,
        anchor: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        places = input_ids == self.image_token_id
        # The image token may lie outside the vocabulary, so its row is never looked up.
        text: Tensor = self._embedding(input_ids.masked_fill(places, 0))
        if anchor is not None:
            text = text + anchor()
        if visual is not None:
            images: Tensor | None = torch.cat(self.embed_tokens(visual, plans))
        else:
            images = None if pixel_values is None else torch.cat(self.embed_images(pixel_values, plans))
        return fill_placeholders(text, images, places)
