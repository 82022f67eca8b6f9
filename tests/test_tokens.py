"""Token shapes: what is refused, and that tokens keep their places."""

import pytest
import torch

from connectors import PackedTokens, TokenShapeError, TokenSpec, VisualTokens
from connectors.tokens import require_grid


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ((0, 8), "got 0 tokens of width 8"),
        ((4, 0), "got 4 tokens of width 0"),
        ((4, 8, None, -1), "with -1 prefix tokens"),
        ((4, 8, (2, 3)), "a 2x3 grid holds 6 tokens, not 4"),
        ((6, 8, (-2, -3)), "a -2x-3 grid holds"),
    ],
)
def test_a_spec_that_no_tensor_can_have_is_refused(numbers: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(TokenShapeError, match=sentence):
        TokenSpec(*numbers)


def test_visual_tokens_hold_tensors_to_each_other() -> None:
    tokens = torch.zeros(2, 6, 4)
    with pytest.raises(TokenShapeError, match=r"visual tokens are \(B, N, D\), got shape \(6, 4\)"):
        VisualTokens(tokens[0])
    with pytest.raises(TokenShapeError, match="a 2x2 grid holds 4 tokens, not 6; keep prefix tokens apart"):
        VisualTokens(tokens, (2, 2))
    for prefix in (torch.zeros(2, 4), torch.zeros(1, 1, 4), torch.zeros(2, 1, 3)):
        with pytest.raises(TokenShapeError, match=r"prefix tokens are \(B, P, D\) = \(2, P, 4\), got shape"):
            VisualTokens(tokens, (2, 3), prefix)


def test_visual_tokens_state_their_spec() -> None:
    tokens = torch.zeros(2, 6, 4)
    assert VisualTokens(tokens).spec == TokenSpec(6, 4)
    assert VisualTokens(tokens, (2, 3), torch.zeros(2, 5, 4)).spec == TokenSpec(6, 4, (2, 3), 5)


def test_two_batches_of_tokens_compare_by_identity() -> None:
    one, other = VisualTokens(torch.zeros(1, 2, 3)), VisualTokens(torch.zeros(1, 2, 3))
    assert one == one  # noqa: PLR0124 - identity is what is tested
    assert one != other
    assert len({one, other}) == 2


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_map_and_tokens_are_each_others_inverse(batch: int) -> None:
    tokens = torch.arange(batch * 6 * 4).reshape(batch, 6, 4)
    prefix = torch.ones(batch, 1, 4, dtype=tokens.dtype)
    feature_map = VisualTokens(tokens, (2, 3)).as_map()
    assert feature_map.shape == (batch, 4, 2, 3)
    assert feature_map.stride() == (24, 1, 12, 4)  # of one view too: kernels go by it
    if batch:
        assert torch.equal(feature_map[-1, :, 1, 0], tokens[-1, 3])
    back = VisualTokens.from_map(feature_map, prefix)
    assert back.grid == (2, 3)
    assert back.prefix is prefix
    assert torch.equal(back.tokens, tokens)


def test_queries_have_no_map() -> None:
    with pytest.raises(TokenShapeError, match="query tokens have no grid; put spatial connectors before"):
        VisualTokens(torch.zeros(1, 6, 4)).as_map()
    with pytest.raises(TokenShapeError, match="query tokens have no grid"):
        require_grid(None)
    with pytest.raises(TokenShapeError, match=r"a feature map is \(B, D, R, C\), got shape \(1, 6, 4\)"):
        VisualTokens.from_map(torch.zeros(1, 6, 4))


def test_packed_tokens_split_into_their_images() -> None:
    tokens = torch.arange(10 * 2).reshape(10, 2)
    images = PackedTokens(tokens, [(2, 3), (1, 4)]).split()
    assert [image.grid for image in images] == [(2, 3), (1, 4)]
    assert [image.tokens.shape for image in images] == [(1, 6, 2), (1, 4, 2)]
    assert torch.equal(torch.cat([image.tokens[0] for image in images]), tokens)
    with pytest.raises(TokenShapeError, match=r"packed tokens of these grids are \(6, D\), got shape \(10, 2\)"):
        PackedTokens(tokens, [(2, 3)])


def test_packed_queries_have_lengths_in_place_of_grids() -> None:
    tokens = torch.randn(10, 2)
    packed = PackedTokens(tokens, [None, [2, 3]], [4, 6])  # type: ignore[list-item]
    assert packed.grids == [None, (2, 3)]
    assert packed.specs == [TokenSpec(4, 2), TokenSpec(6, 2, (2, 3))]
    assert [image.grid for image in packed.split()] == [None, (2, 3)]
    with pytest.raises(TokenShapeError, match="query tokens have no grid"):
        packed.require_grids()
    with pytest.raises(TokenShapeError, match="there is no image among the packed tokens; leave empty packs out"):
        PackedTokens(tokens[:0], []).require_grids()
    with pytest.raises(TokenShapeError, match="packed tokens without a grid need lengths="):
        PackedTokens(tokens, [None, (2, 3)])
    for grids, lengths in (([None, (2, 3)], [4, 5]), ([(2, 3)], [6, 4]), ([(0, 0), (2, 5)], [0, 10])):
        with pytest.raises(TokenShapeError, match=r"do not hold .* tokens; give one length for each image"):
            PackedTokens(tokens, grids, lengths)
    bare = VisualTokens(torch.zeros(1, 4, 2))
    with pytest.raises(TokenShapeError, match=r"images with \[0, 1\] prefix tokens cannot be packed"):
        PackedTokens.join([bare, VisualTokens(torch.zeros(1, 4, 2), prefix=torch.zeros(1, 1, 2))])
    with pytest.raises(TokenShapeError, match="packed tokens have one width, got 2, 3"):
        PackedTokens.join([VisualTokens(torch.zeros(1, 4, 2)), VisualTokens(torch.zeros(1, 4, 3))])


def test_an_empty_prefix_packs_as_none() -> None:
    bare, empty = VisualTokens(torch.zeros(1, 4, 2)), VisualTokens(torch.zeros(1, 4, 2), prefix=torch.zeros(1, 0, 2))
    assert PackedTokens.join([bare, empty]).prefix is None


def test_packed_prefix_tokens_stay_with_their_images() -> None:
    images = [
        VisualTokens(torch.randn(1, 6, 2), (2, 3), torch.randn(1, 5, 2)),
        VisualTokens(torch.randn(2, 4, 2), None, torch.randn(2, 5, 2)),
    ]
    packed = PackedTokens.join(images)
    assert packed.specs == [images[0].spec, images[1].spec, images[1].spec]
    prefixes = [part.prefix for part in packed.split()]
    wanted = [*images[0].prefix.split(1), *images[1].prefix.split(1)]  # type: ignore[union-attr]
    assert all(torch.equal(one, other) for one, other in zip(prefixes, wanted, strict=True))  # type: ignore[arg-type]
    for prefix in (torch.zeros(2, 5, 2), torch.zeros(3, 5, 3), torch.zeros(3, 2)):
        with pytest.raises(TokenShapeError, match=r"prefix tokens are \(I, P, D\) = \(3, P, 2\), got shape"):
            packed.with_tokens(packed.tokens, prefix)
    assert packed.with_tokens(packed.tokens).prefix is None
