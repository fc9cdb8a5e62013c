"""Tables of tiles cover the rows of groups exactly once, and layouts lead there and back, whatever the groups' sizes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.kernels.groups import Groups
from moe_jax.kernels.mosaic_gpu.schedule import (
    ROW_ALIGNMENT,
    Alignment,
    TileTable,
    aligned_groups,
    aligned_num_rows,
)

LAYOUTS = [(1, 40, 8), (1, 0, 64), (3, 2, 128), (5, 130, 64), (12, 12, 128), (12, 300, 8), (7, 1000, 128)]
"""(groups, rows, rows of a tile). Few, because each is compiled."""
each_layout = pytest.mark.parametrize(("num_groups", "num_rows", "tile_rows"), LAYOUTS)


@st.composite
def split(draw, num_groups, num_rows):
    """Rows before the groups, and the sizes of groups with at most `num_rows` rows together."""
    cuts = st.one_of(st.integers(0, num_rows), st.sampled_from([0, num_rows]))
    ends = sorted(draw(st.lists(cuts, min_size=num_groups + 1, max_size=num_groups + 1)))
    return ends[0], [after - before for before, after in itertools.pairwise(ends)]


def starts_of(sizes, before=0):
    return [before + sum(sizes[:group]) for group in range(len(sizes))]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def table_of(groups, num_rows, tile_rows, layout):
    return TileTable.of(groups, num_rows, tile_rows, layout)


def covered_rows(table, num_groups):
    """For each group, the rows that its tiles cover, in their order."""
    rows = [[] for _ in range(num_groups)]
    for tile in range(int(table.ends[-1])):
        group, row, first, last = (int(column[tile]) for column in table[:4])
        assert row % ROW_ALIGNMENT == 0
        rows[group].extend(range(row + first, row + last))
    return rows


def check_table(groups, num_rows, tile_rows, layout):
    table = jax.tree.map(np.asarray, table_of(groups, num_rows, tile_rows, layout))
    count, length = int(table.ends[-1]), len(table.group)
    assert count <= length
    for column in table[:4]:
        assert column.shape == (length,)
        np.testing.assert_array_equal(column[count:], 0)
    first, last = np.asarray(table.first[:count]), np.asarray(table.last[:count])
    assert np.all((first >= 0) & (first < ROW_ALIGNMENT) & (first < last) & (last <= tile_rows))
    expected = [list(range(int(start), int(start + size))) for start, size in zip(*groups, strict=True)]
    assert covered_rows(table, len(expected)) == expected
    return table


@each_layout
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_each_row_of_compact_groups_is_in_exactly_one_tile(num_groups, num_rows, tile_rows, data):
    before, sizes = data.draw(split(num_groups, num_rows))
    groups = Groups(np.array(starts_of(sizes, before), np.int32), np.array(sizes, np.int32))
    check_table(groups, num_rows, tile_rows, "compact")


@each_layout
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_each_row_of_aligned_groups_is_in_exactly_one_tile(num_groups, num_rows, tile_rows, data):
    _, sizes = data.draw(split(num_groups, num_rows))
    groups = jax.tree.map(np.asarray, jax.jit(aligned_groups)(np.array(sizes, np.int32)))
    length = aligned_num_rows(num_rows, num_groups)
    table = check_table(groups, length, tile_rows, "aligned")
    np.testing.assert_array_equal(table.first, 0)
    assert length % ROW_ALIGNMENT == 0
    np.testing.assert_array_equal(groups.starts % ROW_ALIGNMENT, 0)
    ends = groups.starts + -(-groups.sizes // ROW_ALIGNMENT) * ROW_ALIGNMENT
    assert ends[-1] <= length
    assert np.all(ends[:-1] <= groups.starts[1:])


@pytest.mark.parametrize("tile_rows", [8, 128])
def test_as_many_groups_of_one_row_as_there_are_rows_have_a_tile_each(tile_rows):
    groups = Groups(np.arange(40, dtype=np.int32), np.ones(40, np.int32))
    assert check_table(groups, 40, tile_rows, "compact").ends[-1] == 40


@pytest.mark.parametrize("tile_rows", [8, 64])
@pytest.mark.parametrize(("num_groups", "num_rows"), [(5, 5), (300, 40)])
def test_the_aligned_tables_length_is_what_groups_of_one_row_need(num_groups, num_rows, tile_rows):
    groups = jax.jit(aligned_groups)(np.arange(num_groups) < num_rows)
    table = check_table(jax.tree.map(np.int32, groups), aligned_num_rows(num_rows, num_groups), tile_rows, "aligned")
    assert table.ends[-1] == len(table.group) == num_rows


@each_layout
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_rows_moved_into_the_aligned_layout_come_back_and_those_of_no_group_as_zero(
    num_groups, num_rows, tile_rows, data
):
    before, sizes = data.draw(split(num_groups, num_rows))
    groups = Groups(np.array(starts_of(sizes, before), np.int32), np.array(sizes, np.int32))
    rows = np.arange(1, num_rows + 1, dtype=np.float32)[:, None]
    aligned, starts, back = move_there_and_back(groups, rows)
    for start, aligned_start, size in zip(groups.starts, starts, sizes, strict=True):
        np.testing.assert_array_equal(aligned[aligned_start : aligned_start + size], rows[start : start + size])
    rows[:before], rows[before + sum(sizes) :] = 0, 0
    np.testing.assert_array_equal(back, rows)


@jax.jit
def move_there_and_back(groups, rows):
    alignment = Alignment.of(groups, len(rows))
    aligned = jnp.asarray(rows)[alignment.source]
    return aligned, alignment.groups.starts, alignment.to_compact(aligned)
