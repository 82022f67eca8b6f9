"""The Q-Former that reads the user's instruction too, so that its queries look for what is asked.

Source: InstructBLIP, https://arxiv.org/abs/2305.06500, section 2.3; `InstructBlipQFormerModel`
of transformers.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from connectors.base import Option, register_connector, require_positive
from connectors.errors import TokenShapeError, VlmError
from connectors.init import Draw, embedding, linear
from connectors.kinds import Resampler
from connectors.qformer import BERT_EPS, QFormerLayer, require_dropout
from connectors.tokens import TokenSpec

__all__ = ["InstructQFormer", "InstructQFormerLayer"]

# BERT's [CLS] and [SEP], the next to it, are what its tokenizer makes of no text.
_CLS = 101


class InstructQFormerLayer(QFormerLayer):
    """One layer: queries and text attend to each other, the queries read the image, each has its feed-forward part.

    Args:
        dim: width of queries and text.
        heads: attention heads.
        ffn: hidden width of both feed-forward parts.
        context_dim: width of the image tokens; None for a layer that does not read them.
        dropout: probability in training, after each part and on attention weights.

    Shape: (B, Q + T, dim), context (B, N, context_dim) -> (B, Q + T, dim), Q the queries, T the text.
    """

    def __init__(self, dim: int, heads: int, ffn: int, context_dim: int | None, dropout: float) -> None:
        super().__init__(dim, heads, ffn, context_dim, dropout)
        self.text_ffn = nn.Sequential(linear(dim, ffn), nn.GELU(), linear(ffn, dim))
        self.text_ffn_norm = nn.LayerNorm(dim, eps=BERT_EPS)

    def forward(
        self,
        queries: Tensor,
        context: Tensor,
        real: Tensor | None = None,
        count: int | None = None,
        heard: Tensor | None = None,
    ) -> Tensor:
        """Map (B, Q + T, dim) to (B, Q + T, dim).

        Args:
            queries: with the text behind them.
            context: (B, N, context_dim) tokens of the image.
            real: (B, N), False where a token of the image only fills up.
            count: Q; None where there is no text.
            heard: (B, Q + T), False where a query or a word is not to be read; None reads all.
        """
        together = self.exchange(queries, heard)
        asked = self.read(together[:, :count], context, real)
        # The last layer's text is dropped, but leaves its weights a gradient, of zero.
        return torch.cat([asked, self.map_text(together[:, asked.shape[1] :])], dim=1)

    def map_text(self, text: Tensor) -> Tensor:
        """Map each token of the text alone: (B, T, dim) to (B, T, dim)."""
        out: Tensor = self.text_ffn_norm(text + self.dropout(self.text_ffn(text)))
        return out


@register_connector("instruct_qformer")
class InstructQFormer(Resampler):
    """Read the image with learned queries that read the instruction as well.

    Beside the tokens it takes `instruction`, (B, T) ids of BERT's tokenizer, and
    `instruction_mask`, (B, T), False where an id only fills up. Without them it reads the
    empty instruction, [CLS] [SEP]; so do packed images.

    Args:
        in_dim: D, width of the image tokens.
        queries: number of tokens that go out.
        dim: width of the queries.
        layers: number of layers.
        heads: attention heads; they divide `dim`.
        cross_every: layers 0, cross_every, 2*cross_every, ... read the image.
        ffn: hidden width of the feed-forward parts.
        dropout: 0 and not the published 0.1, as in `qformer`.
        vocab: number of ids; InstructBLIP's tokenizer is BERT's with one more.
        positions: longest instruction, ids.

    Shape: (B, N, in_dim) -> (B, queries, dim) without grid; prefix dropped.

    Raises:
        VlmError: an option is not positive, the heads do not divide the width, or the
            dropout is no probability.
    """

    extra_inputs = ("instruction", "instruction_mask")
    source = "InstructBLIP, https://arxiv.org/abs/2305.06500"
    used_by = "InstructBLIP"
    choose = "where the question is known when the image is read, and InstructBLIP's weights are loaded"

    def __init__(
        self,
        in_dim: int,
        queries: int = 32,
        dim: int = 768,
        layers: int = 12,
        heads: int = 12,
        cross_every: int = 2,
        ffn: int = 3072,
        dropout: float = 0.0,
        vocab: int = 30523,
        positions: int = 512,
    ) -> None:
        super().__init__()
        sizes = {"queries": queries, "dim": dim, "layers": layers, "heads": heads, "cross_every": cross_every}
        sizes |= {"ffn": ffn, "vocab": vocab, "positions": positions}
        require_positive("instruct_qformer", in_dim=in_dim, **sizes)
        require_dropout("instruct_qformer", dropout)
        self.in_dim, self.num_queries, self.out_dim = in_dim, queries, dim
        self._options: dict[str, Option] = {**sizes, "dropout": dropout}
        self.queries = nn.Parameter(torch.empty(queries, dim))
        self.token_embedding = embedding(vocab, dim)
        self.position_embedding = embedding(positions, dim)
        self.norm = nn.LayerNorm(dim, eps=BERT_EPS)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            InstructQFormerLayer(dim, heads, ffn, None if index % cross_every else in_dim, dropout)
            for index in range(layers)
        )
        self.reset_parameters()

    def init_weights(self, draw: Draw) -> None:
        """Start as BERT; the queries at N(0, 0.02), as LAVIS does."""
        draw.modules(self, std=0.02)
        draw.normal(self.queries, 0.02)

    def read(
        self,
        tokens: Tensor,
        real: Tensor | None = None,
        *,
        instruction: Tensor | None = None,
        instruction_mask: Tensor | None = None,
        **extra: Any,
    ) -> Tensor:
        """Map (B, N, in_dim) to (B, queries, dim).

        Args:
            tokens: of the images.
            real: (B, N), False where a token only fills up; None where all are real.
            instruction: (B, T) ids; None for the empty instruction.
            instruction_mask: (B, T), False where an id only fills up; None where all are real.
            **extra: nothing.

        Raises:
            TokenShapeError: the ids or their mask have another shape or dtype, or are too long.
            VlmError: an id is beyond the vocabulary, or there is a mask without ids.
        """
        batch, count = tokens.shape[0], self.num_queries
        together = torch.cat([self.queries.expand(batch, -1, -1), self._words(batch, instruction)], dim=1)
        heard = self._heard(instruction, instruction_mask)
        together = self.dropout(self.norm(together))
        for layer in self.layers:
            together = layer(together, tokens, real, count, heard)
        out: Tensor = together[:, :count]
        return out

    def _words(self, batch: int, instruction: Tensor | None) -> Tensor:
        """Embed the instruction: (batch, T, dim)."""
        vocab, positions = self.token_embedding.num_embeddings, self.position_embedding.num_embeddings
        if instruction is None:
            if vocab < _CLS + 2 or positions < 2:
                raise VlmError(
                    f"the empty instruction is the ids {_CLS} and {_CLS + 1}, and this 'instruct_qformer' has "
                    f"vocab={vocab} and positions={positions}; pass instruction="
                )
            return self._embed(torch.arange(_CLS, _CLS + 2, device=self.queries.device).expand(batch, -1))
        if (
            instruction.ndim != 2
            or instruction.shape[0] != batch
            or instruction.dtype not in {torch.int64, torch.int32}
        ):
            raise TokenShapeError(
                f"an instruction is ({batch}, T) ids in int64, got shape {tuple(instruction.shape)} in "
                f"{instruction.dtype}; give one row of ids for each view"
            )
        length = instruction.shape[1]
        if length > positions:
            raise TokenShapeError(f"the instruction has {length} ids, and there are {positions} positions; cut it")
        # A graph cannot look at values.
        if not (torch.compiler.is_compiling() or instruction.is_meta):
            low, high = instruction.aminmax() if instruction.numel() else (0, 0)
            if low < 0 or high >= vocab:
                wrong = int(low if low < 0 else high)
                raise VlmError(
                    f"the instruction has the id {wrong}, and ids go from 0 to {vocab - 1}; "
                    "use the tokenizer of the weights"
                )
        return self._embed(instruction)

    def _embed(self, instruction: Tensor) -> Tensor:
        places = torch.arange(instruction.shape[1], device=instruction.device)
        out: Tensor = self.token_embedding(instruction) + self.position_embedding(places)
        return out

    def _heard(self, instruction: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Say which of queries and text are read: (B, Q + T), or None for all."""
        if mask is None:
            return None
        if instruction is None:
            raise VlmError("there is an instruction_mask and no instruction; pass both, or neither")
        if mask.shape != instruction.shape or mask.is_floating_point():
            raise TokenShapeError(
                f"an instruction_mask is {tuple(instruction.shape)} in bool, as the ids, got shape "
                f"{tuple(mask.shape)} in {mask.dtype}"
            )
        queries = torch.ones(mask.shape[0], self.num_queries, dtype=torch.bool, device=mask.device)
        return torch.cat([queries, mask.bool()], dim=1)

    @classmethod
    def build(
        cls,
        in_spec: TokenSpec,
        out_dim: int,
        *,
        queries: int = 32,
        dim: int = 768,
        layers: int = 12,
        heads: int = 12,
        cross_every: int = 2,
        ffn: int = 3072,
        dropout: float = 0.0,
        vocab: int = 30523,
        positions: int = 512,
    ) -> Self:
        """Make the Q-Former for the encoder's width."""
        return cls(in_spec.dim, queries, dim, layers, heads, cross_every, ffn, dropout, vocab, positions)

    def options(self) -> dict[str, Option]:
        """Give all options but the encoder's width."""
        return dict(self._options)
