"""The tables of visits and of steps, against a walk over the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels.groups import Groups
from moe_jax.kernels.mosaic_tpu.schedule import VisitTable
from moe_jax.kernels.mosaic_tpu.steps import StepTable

SIZES = [(), (5,), (16, 16), (3, 0, 5, 0, 130, 1), (0, 0, 64, 0), (40,), (1,) * 12, (15, 1, 16, 17, 31, 33)]
NUM_GROUPS, NUM_ROWS = 12, 192

visits = jax.jit(VisitTable.of, static_argnums=(1, 2), static_argnames=("zero_outside", "visit_empty"))
steps_of = jax.jit(StepTable.of, static_argnums=1)


def visits_of(sizes, start, tile_rows, **options):
    """The entries of the table for these groups, and for groups without rows after them."""
    sizes = jnp.array(sizes + (0,) * (NUM_GROUPS - len(sizes)), jnp.int32)
    groups = Groups(start + jnp.cumsum(sizes) - sizes, sizes)
    *columns, count, _ = (np.asarray(column) for column in visits(groups, NUM_ROWS, tile_rows, **options))
    entries = zip(*columns, strict=True)
    return [dict(zip(VisitTable._fields[:-2], entry, strict=True)) for entry in entries][: count[0]]


@pytest.mark.parametrize("tile_rows", [16, 48])
@pytest.mark.parametrize("start", [0, 7, 32])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_visits_cover_each_row_of_each_group_once_and_write_each_row_once(sizes, start, tile_rows):
    owner = np.full(NUM_ROWS, -1)
    owner[start : start + sum(sizes)] = np.repeat(np.arange(len(sizes)), sizes)
    for zero_outside in (False, True):
        covered, written = np.full(NUM_ROWS, -1), np.zeros(NUM_ROWS, int)
        for visit in visits_of(sizes, start, tile_rows, zero_outside=zero_outside):
            row, first, last = visit["row"], visit["first"], visit["last"]
            assert row % 16 == visit["stored"] % 16 == 0
            assert 0 <= visit["stored"] <= tile_rows
            assert 0 <= first < 16
            assert last <= tile_rows
            if last:
                assert first < last
                assert visit["source"] == row
                assert (covered[row + first : row + last] == -1).all()
                covered[row + first : row + last] = visit["group"]
                assert visit["stored"] in (last // 16 * 16, -(-last // 16) * 16)
            written[row : row + visit["stored"]] += 1
        np.testing.assert_array_equal(covered, owner)
        in_any = owner.reshape(-1, 16).max(axis=1) >= 0
        expected = np.ones(NUM_ROWS) if zero_outside else np.repeat(in_any, 16)
        np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_groups_without_rows_are_visited_once_if_asked_for(sizes):
    entries = visits_of(sizes, 3, 48, visit_empty=True)
    for group in range(NUM_GROUPS):
        own = [visit for visit in entries if visit["group"] == group]
        size = sizes[group] if group < len(sizes) else 0
        assert sum(visit["last"] - visit["first"] for visit in own) == size
        assert size or len(own) == 1
    assert [visit["group"] for visit in entries] == sorted(visit["group"] for visit in entries)


@pytest.mark.parametrize("option", ["zero_outside", "visit_empty"])
def test_the_table_is_long_enough_for_any_sizes(option, rng):
    for _ in range(20):
        sizes = rng.integers(0, 3 + rng.integers(40), NUM_GROUPS) * (rng.random(NUM_GROUPS) < 0.7)
        sizes = np.where(np.cumsum(sizes) > NUM_ROWS, 0, sizes)
        groups = Groups(jnp.array(np.cumsum(sizes) - sizes, jnp.int32), jnp.array(sizes, jnp.int32))
        table = visits(groups, NUM_ROWS, 48, **{option: True})
        assert table.count[0] <= len(table.row)


@pytest.mark.parametrize("zero_outside", [False, True])
@pytest.mark.parametrize("column_tiles", [2, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_steps_are_the_visits_to_a_group_for_one_tile_of_columns_after_the_other(sizes, column_tiles, zero_outside):
    sizes = np.array(sizes + (0,) * (NUM_GROUPS - len(sizes)), np.int32)
    groups = Groups(jnp.array(7 + np.cumsum(sizes) - sizes, jnp.int32), jnp.array(sizes))
    table = visits(groups, NUM_ROWS, 48, zero_outside=zero_outside)
    steps = steps_of(table, column_tiles)
    group = np.asarray(table.group)[: table.count[0]]
    expected = [
        (visit, column)
        for each in np.unique(group)
        for column in range(column_tiles)
        for visit in np.flatnonzero(group == each)
    ]
    assert steps.count[0] == len(expected) <= len(steps.visit)
    found = [np.asarray(values) for values in steps[:3]]
    assert list(zip(*(values[: len(expected)] for values in found[:2]), strict=True)) == expected
    assert not any(values[len(expected) :].any() for values in found)
    held = [None, None]
    for step, (visit, _) in enumerate(expected):
        if steps.brings_rows(step):
            assert visit != held[1 - found[2][step]]
            held[found[2][step]] = visit
        assert held[found[2][step]] == visit


@pytest.mark.parametrize(("num_rows", "tile_rows"), [(40, 16), (48, 24)])
def test_numbers_that_copies_cannot_address_are_refused(num_rows, tile_rows):
    with pytest.raises(ValueError, match="must be a multiple of 16, got (40|24)"):
        VisitTable.of(Groups(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)), num_rows, tile_rows)
