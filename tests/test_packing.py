"""NaViT's packing: every image once, never beyond the capacity, and nothing between images."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import pytest
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.packing import Packer, drop_tokens, encode_packs, pack
from vlm_encoders.registry import create_encoder

MIXES = 3000


def mix(rng: random.Random, capacity: int) -> list[int]:
    """Give lengths of one of several kinds: any, alike, small, nearly whole packs, halves and thirds."""
    kind = rng.randrange(5)
    most = [capacity, capacity, max(1, capacity // 8), capacity, capacity][kind]
    least = [1, max(1, most - 2), 1, max(1, capacity * 3 // 4), max(1, capacity // 3)][kind]
    return [rng.randint(min(least, most), most) for _ in range(rng.randrange(60))]


def first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack by the definition, pack after pack from the first."""
    packs: list[list[int]] = []
    for image in sorted(range(len(lengths)), key=lambda image: -lengths[image]):
        for images in packs:
            if sum(lengths[other] for other in images) + lengths[image] <= capacity:
                images.append(image)
                break
        else:
            packs.append([image])
    return packs


def test_packs_hold_every_image_once_within_the_capacity() -> None:
    rng = random.Random(0)
    for _ in range(MIXES):
        capacity = rng.choice([1, 2, 7, 64, 1024])
        lengths = mix(rng, capacity)
        packs = pack(lengths, capacity)
        assert Counter(image for images in packs.packs for image in images) == Counter(range(len(lengths)))
        filled = [sum(lengths[image] for image in images) for images in packs.packs]
        assert all(0 < tokens <= capacity for tokens in filled)
        assert packs.fill == (sum(lengths) / (capacity * len(filled)) if lengths else 1)
        # Two packs that are not over half full together would have been one: at most twice what any packing needs.
        assert len(filled) <= max(1, -(-2 * sum(lengths) // capacity)) or not lengths
        assert packs == pack(list(lengths), capacity)
        assert packs.packs == tuple(tuple(sorted(images)) for images in first_fit(lengths, capacity))


def test_few_images_are_packed_nearly_as_well_as_can_be() -> None:
    rng = random.Random(1)
    for _ in range(60):
        lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 6))]
        # Some order of the images is best for filling one pack after another.
        best = min(len(next_fit(order, 12)) for order in permutations(lengths))
        assert best <= len(pack(lengths, 12).packs) <= best * 11 / 9 + 2 / 3


def next_fit(lengths: tuple[int, ...], capacity: int) -> list[int]:
    filled = [0]
    for length in lengths:
        if filled[-1] + length > capacity:
            filled.append(0)
        filled[-1] += length
    return filled


def test_an_image_longer_than_a_pack_is_refused_or_alone() -> None:
    with pytest.raises(VlmError, match="an image of 30 tokens is longer than a pack of 10"):
        pack([4, 30, 5], 10)
    packs = pack([4, 30, 5, 11], 10, allow_longer=True)
    assert packs.packs == ((1,), (3,), (0, 2))
    assert (packs.tokens, packs.room, packs.fill) == (50, 51, 50 / 51)


def test_numbers_that_pack_nothing_are_refused() -> None:
    for lengths, capacity in (([0], 4), ([3], 0), ([], 0)):
        with pytest.raises(VlmError, match="use 1 or more for both"):
            pack(lengths, capacity)
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(VlmError, match="rate of"):
            drop_tokens([4], rate)
        with pytest.raises(VlmError, match="rate of"):
            Packer(4, rate)
    with pytest.raises(VlmError, match="use 1 or more for both"):
        Packer(0)


def test_the_rate_of_dropping_is_exact() -> None:
    rng = random.Random(2)
    for rate in (0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 0.999):
        lengths = [1, 2, 5, 15, 45, *(rng.randint(1, 3000) for _ in range(60))]
        for length, places in zip(lengths, drop_tokens(lengths, rate, 3), strict=True):
            dropped = length * Fraction(str(rate))
            nearest = dropped.numerator // dropped.denominator + (dropped % 1 >= Fraction(1, 2))
            assert len(places) == max(1, length - nearest)
            assert list(places) == sorted(set(places))
            assert 0 <= places[0] <= places[-1] < length


def test_every_place_is_dropped_as_often_as_any_other() -> None:
    counts: Counter[int] = Counter()
    for places in drop_tokens([20] * 4000, 0.5, 4):
        counts.update(places)
    # Half of 4000, five deviations of sqrt(4000) / 2 around it.
    assert all(abs(counts[place] - 2000) < 160 for place in range(20))


def test_a_generator_is_moved_on_and_a_seed_is_not() -> None:
    generator = random.Random(5)
    assert drop_tokens([50], 0.5, generator) != drop_tokens([50], 0.5, generator)
    assert drop_tokens([50], 0.5, 5) == drop_tokens([50], 0.5, random.Random(5))


def test_the_packer_counts_its_fill_over_calls_and_goes_on_where_it_stopped() -> None:
    rng = random.Random(6)
    packer, tokens, room = Packer(100, drop_rate=0.5, seed=7), 0, 0
    assert packer.fill == 1
    mixes = [[rng.randint(1, 100) for _ in range(20)] for _ in range(5)]
    found = []
    for lengths in mixes:
        packs = packer(lengths)
        assert packs.kept is not None
        assert packs.tokens == sum(len(places) for places in packs.kept)
        tokens, room = tokens + packs.tokens, room + 100 * len(packs.packs)
        found.append(packs)
    assert packer.fill == tokens / room
    assert packer(mixes[0]).kept != found[0].kept
    again = Packer(100, drop_rate=0.5, seed=7)
    again.calls = 3
    assert again(mixes[3]) == found[3]
    assert Packer(100, drop_rate=0.5, seed=8)(mixes[0]).kept != found[0].kept
    assert Packer(100)(mixes[0]).kept is None


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    config = DINOv3ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        num_register_tokens=2,
    )
    DINOv3ViTModel(config).save_pretrained(folder)
    return create_encoder(f"hf:{folder}").eval()


def views_of(sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 7 * rows, 7 * columns, generator=generator) for rows, columns in sizes]


def test_packs_encode_each_image_as_if_alone_and_in_order(encoder: Encoder) -> None:
    sizes = [(4, 4), (1, 9), (6, 2), (1, 1), (4, 4), (3, 5), (7, 7)]
    views, packer = views_of(sizes), Packer(50)
    with torch.no_grad():
        packed = encode_packs(encoder, views, packer)
        alone = [encode_packs(encoder, [view], Packer(50)) for view in views]
    assert packed.grids == sizes
    assert packed.lengths == [rows * columns for rows, columns in sizes]
    assert 0.5 < packer.fill <= 1
    for image, one in zip(packed.split(), alone, strict=True):
        assert torch.equal(image.tokens[0], one.tokens)
        assert image.prefix is not None
        assert one.prefix is not None
        assert torch.equal(image.prefix, one.prefix)


def test_dropped_tokens_are_those_that_the_encoder_drops(encoder: Encoder) -> None:
    sizes = [(4, 4), (1, 9), (6, 2), (7, 7)]
    views = views_of(sizes)
    with torch.no_grad():
        packed = encode_packs(encoder, views, Packer(30, drop_rate=0.4, seed=1))
        kept = Packer(30, drop_rate=0.4, seed=1)([rows * columns for rows, columns in sizes]).kept
        assert kept is not None
        wanted = encoder.forward_packed(views, [torch.tensor(places) for places in kept])
    assert packed.lengths == [10, 5, 7, 29]
    assert packed.grids == [None] * 4
    torch.testing.assert_close(packed.tokens, wanted.tokens, rtol=0, atol=1e-6)


def test_no_view_is_refused(encoder: Encoder) -> None:
    with pytest.raises(VlmError, match="no views to pack"):
        encode_packs(encoder, [], Packer(4))


def test_packing_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys, vlm_encoders.packing as p; p.pack([3, 2], 4); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "False"


def test_encoders_and_views_that_cannot_be_packed_are_told_first(clip: Encoder) -> None:
    with pytest.raises(VlmError, match="encodes views of one size"):
        encode_packs(clip, [torch.zeros(3, 28, 28)], Packer(100))
    packing = create_encoder("dinov3-vit-s-16", pretrained=False, feature_layer=-12)
    for wrong, came in ((torch.zeros(32, 32), r"float32 of shape \(32, 32\)"), ("photo", "str")):
        with pytest.raises(VlmError, match=rf"a view's pixels are normalised floats \(3, H, W\), got .*{came}"):
            encode_packs(packing, [wrong], Packer(100))  # type: ignore[list-item]
