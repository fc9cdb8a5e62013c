"""How parameters are divided into parts: all of them once, in parts of bounded size that end where devices' shares end."""

import collections
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.checkpoints.parts import PART_NAME, plan_parts

OTHERS = (
    "embedder.embedding", "layers.0.attention.q_proj.kernel", "layers.0.attention.sinks", "layers.1.attention_norm.scale",
    "final_norm.scale",
)  # fmt: skip
OF_EXPERTS = tuple(
    f"layers.{i}.feed_forward.routed_experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "bias")
)


@st.composite
def divisions(draw):
    """Length and bytes per step of each parameter, bytes of a part, and how much of a length one device holds."""
    sizes, shares = {}, {}
    num_experts = draw(st.integers(1, 12))
    of_a_device = draw(st.sampled_from([n for n in range(1, num_experts + 1) if num_experts % n == 0]))
    for path in draw(st.permutations(OTHERS + OF_EXPERTS)):
        if path in OF_EXPERTS:
            sizes[path] = num_experts, draw(st.integers(1, 30))
            shares[path] = of_a_device
        else:
            length = draw(st.integers(1, 24))
            sizes[path] = length, draw(st.integers(1, 30))
            if draw(st.booleans()):
                shares[path] = draw(st.sampled_from([n for n in range(1, length + 1) if length % n == 0]))
    return sizes, draw(st.integers(1, 200)), shares


def nbytes(part, sizes):
    return sum((piece.stop - piece.start) * sizes[piece.path][1] for piece in part.slices)


@given(divisions())
def test_parts_hold_every_parameter_once_and_in_order_and_none_of_them_twice(division):
    sizes, part_bytes, shares = division
    parts = plan_parts(sizes, part_bytes, shares)
    held = collections.defaultdict(list)
    for part in parts:
        assert PART_NAME.fullmatch(part.name)
        assert len({piece.path for piece in part.slices}) == len(part.slices)
        for piece in part.slices:
            held[piece.path] += range(piece.start, piece.stop)
    assert len({part.name for part in parts}) == len(parts)
    assert held == {path: list(range(length)) for path, (length, _) in sizes.items()}


@given(divisions())
def test_a_part_is_no_larger_than_asked_unless_it_is_one_step_of_one_parameter(division):
    sizes, part_bytes, shares = division
    for part in plan_parts(sizes, part_bytes, shares):
        lengths = [piece.stop - piece.start for piece in part.slices]
        assert nbytes(part, sizes) <= part_bytes or lengths == [1]


@given(divisions())
def test_a_slice_lies_within_one_share_or_is_made_of_whole_ones(division):
    sizes, part_bytes, shares = division
    for piece in (piece for part in plan_parts(sizes, part_bytes, shares) for piece in part.slices):
        share = shares.get(piece.path, sizes[piece.path][0])
        is_within_one = piece.start // share == (piece.stop - 1) // share
        are_whole = piece.start % share == piece.stop % share == 0
        assert is_within_one or (are_whole and piece.path not in OF_EXPERTS)


@given(divisions())
def test_no_part_has_room_for_what_the_next_one_begins_with(division):
    sizes, part_bytes, shares = division
    parts = [part for part in plan_parts(sizes, part_bytes, shares) if ".experts." not in part.name]
    for part, following in itertools.pairwise(parts):
        if part.name.rpartition(".")[0] == following.name.rpartition(".")[0]:
            first, step = following.slices[0], sizes[following.slices[0].path][1]
            assert nbytes(part, sizes) + (first.stop - first.start) * step > part_bytes


@given(divisions())
def test_groups_of_experts_are_as_few_and_as_small_as_these_few_can_be(division):
    sizes, part_bytes, shares = division
    for layer in (0, 1):
        first, second = (path for path in OF_EXPERTS if path.startswith(f"layers.{layer}."))
        share, expert_bytes = shares[first], sizes[first][1] + sizes[second][1]
        slices = [piece for part in plan_parts(sizes, part_bytes, shares) for piece in part.slices]
        groups = [piece.stop - piece.start for piece in slices if piece.path == first and piece.start < share]
        fewest = -(-share // max(1, part_bytes // expert_bytes))
        assert len(groups) <= fewest
        assert max(groups) == -(-share // fewest)


def test_parts_of_no_bytes_are_refused():
    with pytest.raises(ValueError, match="must be positive, got 0"):
        plan_parts({"embedder.embedding": (2, 4)}, 0)
