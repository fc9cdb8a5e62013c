"""The scan plan covers the layers in order, groups only equal ones, and compiles as few of them as possible."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.models.scan_plan import Segment, plan_segments

DECODERS = st.lists(st.sampled_from("abc"), max_size=9)


def compiled_layers(plan):
    return sum(segment.period for segment in plan)


@settings(deadline=None)
@given(DECODERS)
def test_segments_spell_out_the_layers_in_order(layers):
    spelled = []
    for start, period, repeats in plan_segments(layers):
        assert start == len(spelled)
        spelled += layers[start : start + period] * repeats
    assert spelled == layers


@settings(deadline=None)
@given(DECODERS)
def test_positions_of_a_segment_hold_equal_layers_and_together_all_of_them(layers):
    for segment in plan_segments(layers):
        columns = [segment.layers_at(position) for position in range(segment.period)]
        assert all(len({layers[i] for i in column}) == 1 for column in columns)
        covered = sorted(itertools.chain(*columns))
        assert covered == list(range(segment.start, segment.start + segment.period * segment.repeats))


@settings(deadline=None)
@given(DECODERS)
def test_no_plan_compiles_fewer_layers(layers):
    """Compared with every way to cut the layers into repeated groups."""

    def fewest(rest):
        if not rest:
            return 0
        costs = []
        for period in range(1, len(rest) + 1):
            for repeats in range(1, len(rest) // period + 1):
                if rest[: period * repeats] == rest[:period] * repeats:
                    costs.append(period + fewest(rest[period * repeats :]))
        return min(costs)

    assert compiled_layers(plan_segments(layers)) == fewest(layers)


def test_the_plans_of_known_models():
    assert plan_segments("d" * 3 + "s" * 58) == (Segment(0, 1, 3), Segment(3, 1, 58))  # DeepSeek-V3
    assert plan_segments("sf" * 18) == (Segment(0, 2, 18),)  # gpt-oss
    assert plan_segments("m" * 48) == (Segment(0, 1, 48),)  # Qwen3
    assert plan_segments("ddm" * 4 + "m" * 2) == (Segment(0, 3, 4), Segment(12, 1, 2))
    assert plan_segments([]) == ()


def test_a_plan_of_unrelated_layers_is_one_segment():
    assert plan_segments(range(5)) == (Segment(0, 5, 1),)
