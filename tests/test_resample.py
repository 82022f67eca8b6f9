"""Grids brought to another size, against plain loops and torch's own words."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from connectors.errors import TokenShapeError, VlmError
from connectors.tokens import VisualTokens
from vlm_encoders.resample import RESAMPLINGS, join_channels, resample


def tokens(rows: int, columns: int, dim: int = 3, prefix: int = 0, seed: int = 0) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    front = torch.randn(2, prefix, dim, generator=generator) if prefix else None
    return VisualTokens(torch.randn(2, rows * columns, dim, generator=generator), (rows, columns), front)


def test_area_averages_whole_blocks() -> None:
    visual = tokens(4, 6)
    small = resample(visual, (2, 2))
    for row in range(2):
        for column in range(2):
            block = visual.as_map()[:, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
            # The order of six additions differs.
            assert torch.allclose(small.as_map()[:, :, row, column], block.mean(dim=(2, 3)), atol=1e-6)


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), goal=st.tuples(st.integers(1, 8), st.integers(1, 8)))
@settings(max_examples=40, deadline=None)
def test_the_default_is_area_down_and_bilinear_up(rows: int, columns: int, goal: tuple[int, int]) -> None:
    visual = tokens(rows, columns)
    mode = "area" if goal[0] <= rows and goal[1] <= columns else "bilinear"
    expected = interpolate(visual.as_map(), size=goal, mode=mode)
    result = resample(visual, goal)
    assert result.grid == goal
    assert torch.equal(result.as_map(), expected)


@given(method=st.sampled_from(RESAMPLINGS), goal=st.tuples(st.integers(1, 9), st.integers(1, 9)))
@settings(max_examples=30, deadline=None)
def test_a_flat_map_stays_flat(method: str, goal: tuple[int, int]) -> None:
    flat = VisualTokens(torch.full((1, 20, 2), 0.75), (4, 5))
    assert torch.allclose(resample(flat, goal, method).tokens, torch.tensor(0.75))


def test_the_own_grid_changes_nothing() -> None:
    visual = tokens(3, 5, prefix=2)
    assert resample(visual, (3, 5), "bilinear") is visual


def test_the_prefix_stays_and_the_dtype_too() -> None:
    visual = tokens(4, 4, prefix=2)
    half = VisualTokens(visual.tokens.bfloat16(), visual.grid, visual.prefix.bfloat16())  # type: ignore[union-attr]
    small = resample(half, (2, 2))
    assert small.tokens.dtype == torch.bfloat16
    assert small.prefix is half.prefix
    # Averaged in float32 and rounded once.
    assert torch.equal(small.as_map(), interpolate(half.as_map().float(), size=(2, 2), mode="area").bfloat16())


def test_float64_is_not_rounded_on_the_way() -> None:
    wide = VisualTokens(tokens(4, 4).tokens.double() + 1e-12, (4, 4))
    assert torch.equal(resample(wide, (2, 2)).as_map(), interpolate(wide.as_map(), size=(2, 2), mode="area"))


def test_channels_are_joined_at_the_first_grid() -> None:
    first, second = tokens(2, 3, dim=4, prefix=1), tokens(4, 6, dim=5, prefix=1, seed=1)
    joint = join_channels([first, second])
    assert (joint.grid, joint.spec.dim) == ((2, 3), 9)
    assert torch.equal(joint.tokens[..., :4], first.tokens)
    assert torch.equal(joint.tokens[..., 4:], resample(second, (2, 3)).tokens)
    assert first.prefix is not None
    assert second.prefix is not None
    assert joint.prefix is not None
    assert torch.equal(joint.prefix, torch.cat([first.prefix, second.prefix], dim=2))


def test_what_cannot_be_joined_is_refused() -> None:
    with pytest.raises(VlmError, match="no resampling 'cubic'; use area, bilinear, nearest"):
        resample(tokens(2, 2), (2, 2), "cubic")
    with pytest.raises(TokenShapeError, match="no grid"):
        resample(VisualTokens(torch.zeros(1, 4, 2)), (2, 2))
    with pytest.raises(TokenShapeError, match=r"parts with \[0, 1\] prefix tokens"):
        join_channels([tokens(2, 2), tokens(2, 2, prefix=1)])
    with pytest.raises(TokenShapeError, match="no tokens to join"):
        join_channels([])
