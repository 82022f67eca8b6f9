"""NaViT's packing: images of many sizes share packs of tokens, so that none is spent on padding.

Source: arXiv 2307.06304, of which continuous sampling of sizes and drop rates is left to the caller.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, TypeAlias

from connectors.errors import VlmError

if TYPE_CHECKING:
    from torch import Tensor

    from connectors.tokens import PackedTokens
    from vlm_encoders.encoder import Encoder

__all__ = ["Kept", "Packer", "Packs", "drop_tokens", "encode_packs", "pack"]

Kept: TypeAlias = tuple[tuple[int, ...], ...]
"""For each image the places of the tokens that stay, growing."""


@dataclass(frozen=True)
class Packs:
    """Which images share a pack.

    Attributes:
        packs: indices of the images of each pack, growing; every image is in one.
        tokens: of all images together.
        room: tokens that the packs could hold: the capacity of each, or the length of an image that is longer.
        kept: the places of each image's tokens that stay; None for all of them.
    """

    packs: tuple[tuple[int, ...], ...]
    tokens: int
    room: int
    kept: Kept | None = None

    @property
    def fill(self) -> float:
        """The part of the room that is filled, 1 for no pack at all."""
        return self.tokens / self.room if self.room else 1.0


def pack(lengths: Sequence[int], capacity: int, *, allow_longer: bool = False) -> Packs:
    """Fill packs greedily: the longest image first, each into the first pack that has room for it.

    Of images of one length the first comes first, so that the same lengths give the same packs.

    Args:
        lengths: tokens of each image.
        capacity: most tokens of a pack.
        allow_longer: give an image that is longer than that a pack of its own.

    Raises:
        VlmError: an image has no token, or is longer than a pack and may not be.
    """
    if min((capacity, *lengths)) < 1:
        raise VlmError(
            f"packs of {capacity} tokens are to hold images of {min(lengths, default=capacity)} tokens or more; "
            "use 1 or more for both"
        )
    longest = max(lengths, default=0)
    if longest > capacity and not allow_longer:
        raise VlmError(
            f"an image of {longest} tokens is longer than a pack of {capacity}; raise the capacity, bring images down "
            "by max_tokens, or pass allow_longer=True, which gives it a pack of its own"
        )
    order = sorted(range(len(lengths)), key=lambda image: -lengths[image])
    packs = [[image] for image in order if lengths[image] > capacity]
    rooms = _Rooms(len(order) - len(packs), capacity)
    first = len(packs)
    for image in order[first:]:
        place = first + rooms.take(lengths[image])
        if place == len(packs):
            packs.append([])
        packs[place].append(image)
    filled = [sum(lengths[image] for image in images) for images in packs]
    room = sum(max(capacity, tokens) for tokens in filled)
    return Packs(tuple(tuple(sorted(images)) for images in packs), sum(filled), room)


def drop_tokens(lengths: Sequence[int], rate: float, seed: int | str | random.Random = 0) -> Kept:
    """Draw the tokens that stay when a part of each image's is dropped in training.

    Args:
        lengths: tokens of each image.
        rate: the part that is dropped, from 0 to below 1; of each image the nearest whole number, halves
            up, but never all.
        seed: of the draw, or a generator that the draw moves on.

    Returns:
        For each image the places that stay, growing.

    Raises:
        VlmError: the rate is none.
    """
    _check_rate(rate)
    generator = seed if isinstance(seed, random.Random) else random.Random(seed)
    # As it is written, 0.3 and not the float below it: that decides a half.
    exact = Fraction(str(rate))
    kept = []
    for length in lengths:
        dropped = int(exact * length + Fraction(1, 2))
        kept.append(tuple(sorted(generator.sample(range(length), max(1, length - dropped)))))
    return tuple(kept)


class Packer:
    """Packs one mix of images after another, drops tokens if asked to, and counts how full its packs are.

    Args:
        capacity: most tokens of a pack.
        drop_rate: the part of each image's tokens that is dropped; for training alone.
        seed: of what is dropped.
        allow_longer: give an image that is longer than a pack one of its own.

    Attributes:
        calls: mixes packed so far; what is dropped follows from the seed and this number alone, so that a
            run which sets it goes on as if it had never stopped.
        tokens: packed so far.
        room: of all packs so far.

    Raises:
        VlmError: the capacity or the rate is none.
    """

    def __init__(self, capacity: int, drop_rate: float = 0.0, seed: int = 0, *, allow_longer: bool = False) -> None:
        _check_rate(drop_rate)
        pack((), capacity)
        self.capacity = capacity
        self.drop_rate = drop_rate
        self.seed = seed
        self.allow_longer = allow_longer
        self.calls = self.tokens = self.room = 0

    @property
    def fill(self) -> float:
        """The part of all packs so far that is filled."""
        return self.tokens / self.room if self.room else 1.0

    def __call__(self, lengths: Sequence[int]) -> Packs:
        """Pack images of so many tokens each, by those that stay.

        Raises:
            VlmError: an image has no token, or is longer than a pack and may not be.
        """
        kept = drop_tokens(lengths, self.drop_rate, f"{self.seed}:{self.calls}") if self.drop_rate else None
        stay = lengths if kept is None else [len(places) for places in kept]
        packs = replace(pack(stay, self.capacity, allow_longer=self.allow_longer), kept=kept)
        self.calls += 1
        self.tokens += packs.tokens
        self.room += packs.room
        return packs


def encode_packs(encoder: Encoder, views: Sequence[Tensor], packer: Packer) -> PackedTokens:
    """Encode views of any sizes pack by pack.

    Args:
        encoder: one that packs.
        views: pixels (3, H, W) of each.
        packer: its capacity counts patch tokens; prefix tokens come on top. Where it drops tokens, so does the
            result, and those images have no grid.

    Returns:
        The tokens in the order of the views, whatever pack they were in.

    Raises:
        VlmError: the encoder takes one size, there is no view, or one is longer than a pack.
    """
    import torch

    from connectors.tokens import PackedTokens, VisualTokens

    if not views:
        raise VlmError(f"{encoder.spec.name}: there are no views to pack; give one or more")
    encoder.check_views(views)
    packs = packer([encoder.spec.token_spec((view.shape[-2], view.shape[-1])).num_tokens for view in views])
    found: dict[int, VisualTokens] = {}
    for images in packs.packs:
        kept = None if packs.kept is None else [torch.tensor(packs.kept[image]) for image in images]
        encoded = encoder.forward_packed([views[image] for image in images], kept)
        found |= dict(zip(images, encoded.split(), strict=True))
    return PackedTokens.join([found[image] for image in range(len(views))])


class _Rooms:
    """How much room each of a row of packs has: a tree of the largest, in which the first fit is few steps away."""

    def __init__(self, count: int, capacity: int) -> None:
        self._leaves = 1 << max(0, count - 1).bit_length()
        self._most = [capacity] * (2 * self._leaves)

    def take(self, length: int) -> int:
        """Take room in the first pack that has so much, and say which it is."""
        node = 1
        while node < self._leaves:
            node = 2 * node + (self._most[2 * node] < length)
        place = node - self._leaves
        self._most[node] -= length
        while node > 1:
            node //= 2
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])
        return place


def _check_rate(rate: float) -> None:
    if not 0 <= rate < 1:
        raise VlmError(f"tokens cannot be dropped at a rate of {rate}; use 0 to below 1")
