"""Idefics3's and SmolVLM's plans, pixels and prompts against transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import SizeDict
from transformers.models.idefics3.image_processing_idefics3 import Idefics3ImageProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from connectors import build_connector
from connectors.errors import VlmError
from connectors.tokens import TokenSpec, VisualTokens
from vlm_encoders.encoder import Encoder
from vlm_encoders.tiling import Page, TilePlan, build_tiler, cut, tiler_from_config
from vlm_encoders.tiling.idefics import IdeficsTiler
from vlm_encoders.vlm.processor import VLMProcessor

AROUND = "<fake_token_around_image>"


def image_sizes(count: int, largest: int = 20_000) -> Iterator[tuple[int, int]]:
    rng = random.Random(0)
    special = [1, 2, 3, 363, 364, 365, 727, 728, 1455, 1456, 1457, 2048, 4096, 4097, largest]
    yield from ((height, width) for height in special for width in special)
    for _ in range(count):
        most = rng.choice((60, 1000, 4000, largest))
        yield rng.randint(1, most), rng.randint(1, most)


class NoPixels(PilBackend):
    """Resize to a picture that has a shape and no memory, and remember the shape."""

    sizes: list[tuple[int, int]]

    def resize(self, image: Any, size: Any, **options: Any) -> Any:
        self.sizes.append((size.height, size.width))
        return np.broadcast_to(np.uint8(0), (3, size.height, size.width))


class NoTensors(TorchvisionBackend):
    """The same for the torchvision processor."""

    sizes: list[tuple[int, int]]

    def resize(self, image: Any, size: Any, **options: Any) -> Any:
        self.sizes.append((size.height, size.width))
        return torch.zeros(1, dtype=torch.uint8).expand(1, 3, size.height, size.width)


class Idefics3Sizes(Idefics3ImageProcessorPil, NoPixels):
    pass


class SmolVLMSizes(SmolVLMImageProcessorPil, NoPixels):
    pass


class TorchvisionSizes(Idefics3ImageProcessor, NoTensors):
    pass


def steps_of(processor: Any, size: tuple[int, int], side: int, longest: int) -> tuple[list[tuple[int, int]], int, int]:
    """Run the processor's own steps; give each size that it resizes to, and the rows and columns that it cuts."""
    processor.sizes = []
    tensors = isinstance(processor, NoTensors)
    image = (
        torch.zeros(1, dtype=torch.uint8).expand(1, 3, *size) if tensors else np.broadcast_to(np.uint8(0), (3, *size))
    )
    image = processor.resize(image, SizeDict(longest_edge=longest), resample=None)
    image = processor.resize_for_vision_encoder(image, side)
    frames, rows, columns = processor.split_images(image, {"longest_edge": side})
    if tensors:
        (rows,), (columns,), frames = rows, columns, frames[0]
    assert {tuple(frame.shape[-2:]) for frame in frames} == {(side, side)}
    return processor.sizes, rows, columns


def assert_planned(plan: TilePlan, side: int, steps: tuple[list[tuple[int, int]], int, int]) -> None:
    sizes, rows, columns = steps
    first, second = sizes[:2]
    single = (rows, columns) == (0, 0)
    assert plan.grid == ((1, 1) if single else (rows, columns)), plan
    assert plan.main == Page.squashed(plan.main.grid, (side, side), through=(first,))
    assert plan.main.canvas == second
    assert plan.interpolation == "lanczos"
    if single:
        assert (plan.thumbnail, plan.num_views, sizes) == (None, 1, [first, (side, side)])
    else:
        assert sizes == [first, second, (side, side)]
        assert plan.thumbnail == "last"
        assert plan.pages[1] == Page.squashed((1, 1), (side, side), through=(first, second))


@pytest.mark.parametrize(
    ("kind", "side", "longest", "count"),
    [
        (Idefics3Sizes, 364, 1456, 10_000),
        (SmolVLMSizes, 512, 2048, 10_000),
        (Idefics3Sizes, 364, 5000, 3000),
        (Idefics3Sizes, 100, 333, 3000),
        (Idefics3Sizes, 384, 200, 1000),
        (TorchvisionSizes, 32, 128, 1000),
    ],
)
def test_plans_are_those_of_transformers(kind: type, side: int, longest: int, count: int) -> None:
    processor, tiler = kind(), IdeficsTiler(side, longest)
    for size in image_sizes(count):
        plan = tiler.plan(size)
        assert_planned(plan, side, steps_of(processor, size, side, longest))
        assert plan.num_views <= tiler.max_views


def test_whole_images_are_resized_twice_as_in_transformers() -> None:
    tiler, processor = IdeficsTiler(364, split=False), Idefics3Sizes()
    for size in image_sizes(2000):
        processor.sizes = []
        image: Any = np.broadcast_to(np.uint8(0), (3, *size))
        processor.resize(image, SizeDict(longest_edge=1456))
        (page,) = tiler.plan(size).pages
        assert page == Page.squashed((1, 1), (364, 364), through=tuple(processor.sizes))
    assert tiler.max_views == 1


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("size", [(50, 77), (28, 28), (130, 31), (9, 300), (200, 300)])
def test_pixels_are_those_of_the_pil_processor(size: tuple[int, int], *, split: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    plain = {"do_rescale": False, "do_normalize": False, "do_image_splitting": split}
    processor = Idefics3ImageProcessorPil(size={"longest_edge": 100}, max_image_size={"longest_edge": 28}, **plain)
    theirs = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    tiler = IdeficsTiler(28, 100, split=split)
    ours = cut(Image.fromarray(pixels), tiler.plan(size))
    assert len(ours) == len(theirs)
    for view, wanted in zip(ours, theirs, strict=True):
        assert np.array_equal(np.asarray(view).transpose(2, 0, 1), wanted)


def prompt_of(pieces: list[str | int]) -> str:
    return "".join("<image>" * piece if isinstance(piece, int) else piece for piece in pieces)


@pytest.mark.parametrize(("name", "grid"), [("idefics3", (13, 13)), ("smolvlm", (8, 8))])
def test_prompts_are_those_of_transformers(name: str, grid: tuple[int, int]) -> None:
    tiler, tokens = build_tiler(name), grid[0] * grid[1]
    spec, kind = TokenSpec(tokens, 8, grid), Idefics3Sizes if name == "idefics3" else SmolVLMSizes
    sizes: Any = kind()
    idefics: Any = object.__new__(Idefics3Processor)
    idefics.image_token, idefics.fake_image_token, idefics.global_image_tag = "<image>", AROUND, "<global-img>"
    idefics.image_seq_len = tokens
    known: dict[tuple[int, int], str] = {}
    for size in image_sizes(10_000):
        _, rows, columns = steps_of(sizes, size, tiler.tile_size, 4 * tiler.tile_size)
        if (rows, columns) not in known:
            theirs = idefics.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0)
            assert theirs == get_image_prompt_string(rows, columns, tokens, AROUND, "<image>", "<global-img>")
            known[rows, columns] = theirs
        plan = tiler.plan(size)
        assert prompt_of(tiler.layout.pieces(plan, spec)) == known[rows, columns], size
        assert tiler.layout.num_tokens(plan, spec) == known[rows, columns].count("<image>")
    # Four tiles along the longest edge, one to four along the other.
    assert len(known) == 7
    alone = build_tiler(name, split=False)
    theirs = idefics.replace_image_token({"rows": [[0]], "cols": [[0]]}, 0)
    assert prompt_of(alone.layout.pieces(alone.plan((30, 40)), spec)) == theirs


def test_prompts_are_tokenized_as_by_the_processor_of_transformers(clip: Encoder) -> None:
    marks = [AROUND, "<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))]
    words = ["<pad>", "</s>", "<unk>", "w1", "w2", "\n", "\n\n", "<end_of_utterance>", "<image>", *marks]
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", additional_special_tokens=marks
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    images = [Image.new("RGB", size) for size in ((60, 100), (5, 5))]
    shapes = {"size": {"longest_edge": 84}, "max_image_size": {"longest_edge": 28}}
    theirs: Any = Idefics3Processor(Idefics3ImageProcessorPil(**shapes), tokenizer, image_seq_len=4)
    text = "w1 <image> w2 <image>"
    wanted = theirs(images=images, text=text)["input_ids"][0]

    connector = build_connector("pixel_shuffle:factor=2+linear", clip.token_spec, 32)
    processor = VLMProcessor(clip, connector, tokenizer, tiler=IdeficsTiler(28, 84))
    sample = processor.prompt([{"role": "user", "content": text}], images)
    assert sample.input_ids == list(wanted)
    assert tokenizer.unk_token_id not in sample.input_ids


def test_counts_are_those_of_the_tokens() -> None:
    spec = TokenSpec(4, 3, (2, 2))
    for tiler in (IdeficsTiler(28), IdeficsTiler(28, markers=False), IdeficsTiler(28, split=False)):
        for size in image_sizes(100):
            for plan in tiler.ranked(size):
                visual = VisualTokens(torch.randn(plan.num_views, 4, 3), (2, 2))
                (sequence,) = tiler.layout.arrange(visual, [plan])
                assert torch.equal(sequence, visual.tokens.flatten(0, 1))
                runs = [piece for piece in tiler.layout.pieces(plan, spec) if isinstance(piece, int)]
                assert sum(runs) == len(sequence) == tiler.layout.num_tokens(plan, spec)
    assert not IdeficsTiler(28, markers=False).layout.markers


def test_budgets_take_fewer_whole_tiles() -> None:
    tiler = IdeficsTiler(28)
    spec = TokenSpec(4, 3, (2, 2))

    def count(plan: TilePlan) -> int:
        return tiler.layout.num_tokens(plan, spec)

    assert [plan.main.grid for plan in tiler.ranked((50, 100))] == [(2, 4), (2, 3), (1, 2), (1, 1)]
    for size in image_sizes(200):
        costs = list(map(count, tiler.ranked(size)))
        assert costs == sorted(costs, reverse=True)
        for most in (4, 11, 12, 30, 67):
            assert count(tiler.plan_within(size, most, count)) <= most
    with pytest.raises(VlmError, match="at least 4 tokens"):
        tiler.plan_within((50, 100), 3, count)


def test_saved_tilers_come_back_and_nonsense_is_refused() -> None:
    for tiler in (IdeficsTiler(28, 60, max_side=50), IdeficsTiler(split=False, markers=False), build_tiler("smolvlm")):
        assert tiler_from_config(json.loads(json.dumps(tiler.config()))) == tiler
    assert (build_tiler("smolvlm").tile_size, build_tiler("idefics3").tile_size) == (512, 364)
    with pytest.raises(VlmError, match="at least 1 px"):
        IdeficsTiler(0)
    with pytest.raises(VlmError, match="longest_edge=0"):
        IdeficsTiler(28, 0)
    with pytest.raises(VlmError, match="at least 1 px"):
        IdeficsTiler(28).plan((0, 4))
