"""Image places: expanded to the token count, filled in order, refused when they do not agree."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.errors import VlmError
from vlm_encoders.vlm.placeholders import expand_placeholders, fill_placeholders

IMAGE = 9


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 8), st.tuples(st.integers(1, 7)))))
def test_expanding_keeps_the_text_and_gives_each_image_its_count(pieces: list[int | tuple[int]]) -> None:
    ids = [IMAGE if isinstance(piece, tuple) else piece for piece in pieces]
    counts = [piece[0] for piece in pieces if isinstance(piece, tuple)]
    wanted = [token for piece in pieces for token in ([IMAGE] * piece[0] if isinstance(piece, tuple) else [piece])]
    assert expand_placeholders(ids, IMAGE, counts) == wanted


@pytest.mark.parametrize(
    ("ids", "counts", "sentence"),
    [
        ([1, IMAGE, 2], [], "the text holds 1 image placeholder, 0 images came"),
        ([1, 2], [4], "the text holds 0 image placeholders, 1 image came"),
        ([IMAGE, IMAGE], [4, 4, 4], "the text holds 2 image placeholders, 3 images came"),
    ],
)
def test_a_placeholder_without_an_image_and_the_reverse_are_refused(
    ids: list[int], counts: list[int], sentence: str
) -> None:
    with pytest.raises(VlmError, match=sentence):
        expand_placeholders(ids, IMAGE, counts)


def test_images_fill_their_places_in_order_over_the_batch() -> None:
    text = torch.zeros(2, 4, 3)
    places = torch.tensor([[False, True, False, True], [True, False, True, False]])
    images = torch.arange(12.0).reshape(4, 3).double()
    filled = fill_placeholders(text, images, places)
    assert filled.dtype == text.dtype
    assert torch.equal(filled[places], images.float())
    assert torch.equal(filled[~places], text[~places])
    assert torch.equal(text, torch.zeros(2, 4, 3))


def test_gradients_reach_every_image_embedding_once() -> None:
    images = torch.randn(3, 2, requires_grad=True)
    places = torch.tensor([[True, True, False], [False, True, False]])
    weights = torch.arange(12.0).reshape(2, 3, 2)
    (fill_placeholders(torch.randn(2, 3, 2), images, places) * weights).sum().backward()
    assert images.grad is not None
    assert torch.equal(images.grad, weights[places])


@pytest.mark.parametrize("given", [None, 0, 2, 4])
def test_a_wrong_number_of_embeddings_is_refused(given: int | None) -> None:
    places = torch.tensor([[True, True, True, False]])
    images = None if given is None else torch.zeros(given, 2)
    sentence = f"the text holds 3 image placeholders, the images gave {given or 0} tokens"
    with pytest.raises(VlmError, match=re.escape(sentence)):
        fill_placeholders(torch.zeros(1, 4, 2), images, places)
