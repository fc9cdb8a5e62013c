"""Where the rows of groups lie."""

import jax
import numpy as np
import pytest

from moe_jax.kernels.groups import Groups, sums_until


@pytest.mark.parametrize("num_groups", [1, 7, 512, 513])
def test_sums_of_few_groups_and_of_many_are_cumulative_sums(num_groups, rng):
    sizes = rng.integers(0, 1000, num_groups, dtype=np.int32)
    sums = jax.jit(sums_until)(sizes)
    assert sums.dtype == np.int32
    np.testing.assert_array_equal(sums, np.cumsum(sizes))


def test_groups_begin_where_those_before_them_end_also_if_only_some_are_asked_for(rng):
    sizes = rng.integers(0, 9, 12, dtype=np.int32)
    ends = np.cumsum(sizes)
    for first, last in [(0, 12), (3, 8), (11, 12)]:
        groups = Groups.of(sizes, first, last - first)
        np.testing.assert_array_equal(groups.starts, (ends - sizes)[first:last])
        np.testing.assert_array_equal(groups.sizes, sizes[first:last])
