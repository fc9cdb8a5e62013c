"""Layouts: where each number of a stored tensor is in our parameter, and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.checkpoints.layout import LINEAR, parse_layout

SIZES = {"e": 3, "g": 2, "i": 5, "h": 4}

PLACES = {
    # pattern: index into the stored tensor of our element [e, g, i, h]
    "e (g i) h -> e g i h": lambda e, g, i, h: (e, g * 5 + i, h),
    "e (i g) h -> e g i h": lambda e, g, i, h: (e, 2 * i + g, h),
    "e h (g i) -> e g i h": lambda e, g, i, h: (e, h, g * 5 + i),
    "e h (i g) -> e g i h": lambda e, g, i, h: (e, h, 2 * i + g),
}


def ours_of(layout, stored, shape):
    """Our region of this `shape`, filled through the view that reading fills."""
    region = np.empty(shape, stored.dtype)
    view = layout.split_view(region)
    view[...] = stored.reshape(view.shape)
    return region


@pytest.mark.parametrize("pattern", PLACES)
def test_every_number_of_a_fused_tensor_lands_where_the_format_says(pattern, rng):
    layout = parse_layout(pattern)
    ours = rng.standard_normal((3, 2, 5, 4))
    stored = layout.to_stored(ours)
    for index in np.ndindex(ours.shape):
        assert stored[PLACES[pattern](*index)] == ours[index]
    np.testing.assert_array_equal(ours_of(layout, stored, ours.shape), ours)


def test_gpt_oss_gate_rows_are_even_and_up_rows_odd(rng):
    stored = rng.standard_normal((3, 10))
    ours = ours_of(parse_layout("e (i g) -> e g i"), stored, (3, 2, 5))
    np.testing.assert_array_equal(ours[:, 0], stored[:, 0::2])
    np.testing.assert_array_equal(ours[:, 1], stored[:, 1::2])


def test_a_linear_weight_is_our_kernel_transposed(rng):
    weight = rng.standard_normal((7, 3))
    kernel = ours_of(LINEAR, weight, (3, 7))
    np.testing.assert_array_equal(kernel, weight.T)
    assert LINEAR.sliced_axis == 1


@st.composite
def layouts_and_regions(draw):
    """Any permutation of axes, merged any way, except that the first stored axis stays single."""
    rank = draw(st.integers(1, 4))
    axes = [f"a{number}" for number in range(rank)]
    order = draw(st.permutations(axes))
    groups, rest = [[order[0]]], list(order[1:])
    while rest:
        size = draw(st.integers(1, len(rest)))
        groups.append(rest[:size])
        rest = rest[size:]
    left = " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups)
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=rank, max_size=rank)))
    return f"{left} -> {' '.join(axes)}", shape


@given(layouts_and_regions())
def test_storing_and_reading_back_gives_the_same_region(case):
    pattern, shape = case
    layout = parse_layout(pattern)
    region = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    stored = layout.to_stored(region)
    assert stored.shape == layout.stored_shape(shape)
    np.testing.assert_array_equal(ours_of(layout, stored, shape), region)


@given(layouts_and_regions(), st.data())
def test_consecutive_rows_of_a_stored_tensor_are_a_consecutive_slice_of_ours(case, data):
    pattern, shape = case
    layout = parse_layout(pattern)
    axis = layout.sliced_axis
    start = data.draw(st.integers(0, shape[axis]))
    stop = data.draw(st.integers(start, shape[axis]))
    region = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    part = region[(slice(None),) * axis + (slice(start, stop),)]
    np.testing.assert_array_equal(layout.to_stored(part), layout.to_stored(region)[start:stop])


@pytest.mark.parametrize("pattern", ["a b", "a b -> a", "a a -> a", "a a -> a a", "a b -> a b c", "(a b) c -> a b c"])
def test_a_pattern_that_is_no_layout_is_refused(pattern):
    with pytest.raises(ValueError, match="got"):
        parse_layout(pattern)
