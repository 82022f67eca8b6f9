"""Networks of equal blocks that take views of many sizes as one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from connectors.errors import VlmError
from connectors.tokens import PackedTokens
from vlm_encoders.encoders.pack_attention import PackAttention
from vlm_encoders.encoders.pack_views import Places, ViewTokens, by_size, pack_views
from vlm_encoders.encoders.towers.base import Tower
from vlm_encoders.spec import EncoderSpec

__all__ = ["PackingTower"]


class PackingTower(Tower):
    """A ViT whose patches and places are made view by view, and whose blocks run over all views together.

    Stochastic depth, where a config asks for it in training, leaves a block out for a whole pack.
    """

    packs = True

    def packs_here(self, spec: EncoderSpec) -> bool:
        """With torch's own attention alone, which is what is kept within each image."""
        return spec.packs and dict(spec.options).get("attn_implementation", "sdpa") == "sdpa"

    def embed(self, network: Any, pixels: Tensor, spec: EncoderSpec) -> ViewTokens:
        """Make what goes into the first block of views of one size (B, 3, H, W), as the library does."""
        raise NotImplementedError

    def through(self, network: Any, hidden: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        """Run the blocks, and the norm where `norm_inside`, over sequences (B, M, D)."""
        raise NotImplementedError

    def packed(
        self, network: Any, views: Sequence[Tensor], spec: EncoderSpec, kept: dict[int, Any], places: Places
    ) -> PackedTokens:
        """Map views (3, H, W) of many sizes to packed tokens: each attends to itself, all else runs over all.

        Raises:
            VlmError: attention is not torch's own, or is computed again in the backward pass.
        """
        _check_attention(network, spec)
        groups = [(indices, self.embed(network, pixels, spec)) for indices, pixels in by_size(views)]
        pack = pack_views(groups, places, spec.num_prefix)
        with PackAttention(pack.lengths, spec.name) as attention:
            hidden = self.through(network, pack.hidden, pack.rotary)
        attention.check(len(self.blocks(network)))
        outputs = self.collect(network, hidden, spec, kept)
        found = [outputs[layer] for layer in spec.layers]
        return pack.unpack(found[0] if len(found) == 1 else torch.cat(found, dim=-1))


def _check_attention(network: Any, spec: EncoderSpec) -> None:
    chosen = network.config._attn_implementation  # noqa: SLF001
    if chosen != "sdpa":
        raise VlmError(
            f"{spec.name}: packs rely on torch's own attention, this network has attn_implementation='{chosen}'; "
            "build it with 'sdpa'"
        )
    if network.training and any(getattr(module, "gradient_checkpointing", False) for module in network.modules()):
        raise VlmError(
            f"{spec.name}: gradient checkpointing would compute blocks again without the bounds of images; "
            "switch it off for packs, or encode views of one size"
        )
