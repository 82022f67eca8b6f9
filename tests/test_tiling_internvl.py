"""InternVL's prompt and counts against transformers' InternVLProcessor, over 10,000 sizes."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor

from connectors.tokens import TokenSpec
from vlm_encoders.tiling import InternVLTiler, TileLayout, build_tiler, tiler_from_config

FOLDED = TokenSpec(256, 64, (16, 16))


def image_sizes(count: int) -> list[tuple[int, int]]:
    """Give sizes from 1x1 to 20,000 px: half of them photos, half of any aspect ratio."""
    rng = random.Random(4)
    ends = [(1, 1), (1, 20_000), (20_000, 1), (20_000, 20_000), (448, 448), (896, 1344), (633, 633), (634, 634)]
    photos = [(rng.randint(1, 4000), rng.randint(1, 4000)) for _ in range(count // 2)]
    others = [(int(20_000 ** rng.random()), int(20_000 ** rng.random())) for _ in range(count - count // 2)]
    return [*ends, *photos, *others]


def theirs(tokens: int, fewest: int, most: int) -> Any:
    """Make a processor of another marker text than ours is, so that the text is seen to come from it."""
    processor: Any = object.__new__(InternVLProcessor)
    processor.image_processor = GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=fewest, max_patches=most
    )
    processor.image_seq_length = tokens
    processor.start_image_token, processor.image_token, processor.end_image_token = "<img>", "<IMG_CONTEXT>", "</img>"
    processor._merge_kwargs = lambda **_: {"images_kwargs": {}}
    return processor


def written(pieces: list[str | int]) -> str:
    return "".join(piece if isinstance(piece, str) else "<IMG_CONTEXT>" * piece for piece in pieces)


@pytest.mark.parametrize(("fewest", "most"), [(1, 12), (1, 6), (2, 9), (1, 1)])
def test_prompt_and_counts_are_those_of_the_transformers_processor(fewest: int, most: int) -> None:
    tiler = InternVLTiler(min_tiles=fewest, max_tiles=most)
    layout, small = tiler.layout, TokenSpec(2, 8)
    counting, writing = theirs(256, fewest, most), theirs(2, fewest, most)
    sizes = image_sizes(10_000)
    counts = counting._get_num_multimodal_tokens(sizes)
    for size, tokens, views in zip(sizes, counts.num_image_tokens, counts.num_image_patches, strict=True):
        plan = tiler.plan(size)
        assert plan.num_views == views, size
        # transformers counts the two marks as well; with us they are text.
        assert layout.num_tokens(plan, FOLDED) == tokens - 2, size
        assert layout.pieces(plan, FOLDED) == ["<img>", tokens - 2, "</img>"]
        assert written(layout.pieces(plan, small)) == writing.replace_image_token({"num_patches": [views]}, 0)


def test_markers_can_be_left_out() -> None:
    tiler, bare = build_tiler("internvl"), build_tiler("internvl:markers=false")
    plan = tiler.plan((480, 640))
    assert bare.plan((480, 640)) == plan
    assert bare.layout == TileLayout(unpad=False, newline=False)
    assert bare.layout.pieces(plan, FOLDED) == [plan.num_views * 256]
    assert bare.layout.num_tokens(plan, FOLDED) == tiler.layout.num_tokens(plan, FOLDED)


def test_queries_stand_between_the_same_marks() -> None:
    tiler, queries = build_tiler("internvl"), TokenSpec(64, 8)
    plan = tiler.plan((480, 640))
    assert tiler.layout_for(queries).pieces(plan, queries) == ["<img>", 64 * plan.num_views, "</img>"]


def test_a_tiler_saved_before_there_were_markers_has_none() -> None:
    old = {"name": "internvl", "tile_size": 448, "min_tiles": 1, "max_tiles": 12, "thumbnail": True}
    assert tiler_from_config(old) == InternVLTiler(markers=False)
    assert tiler_from_config(InternVLTiler().config()) == InternVLTiler()


def test_the_thumbnail_is_last_and_of_several_tiles_alone() -> None:
    tiler = InternVLTiler(448)
    one, several = tiler.plan((448, 448)), tiler.plan((448, 896))
    assert (one.num_views, one.thumbnail) == (1, None)
    assert (several.num_views, several.thumbnail, several.thumbnail_place) == (3, "last", 1)
    assert SimpleNamespace(**several.pages[1].content._asdict()) == SimpleNamespace(
        top=0, left=0, height=448, width=448
    )
