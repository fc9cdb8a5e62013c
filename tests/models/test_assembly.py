"""Arrays assembled block by block hold what was read, on every device that should have it."""

import jax
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.assembly import assemble, split_into_blocks


@pytest.mark.parametrize("block_bytes", [1, 24, 100, 10**6])
def test_blocks_tile_the_array_and_respect_the_limit(block_bytes):
    bounds = ((1, 4), (0, 5), (2, 4), (0, 3))
    covered = np.zeros((4, 5, 4, 3), int)
    for block in split_into_blocks(bounds, 4, block_bytes):
        covered[tuple(slice(*part) for part in block)] += 1
        nbytes = 4 * np.prod([stop - start for start, stop in block])
        assert nbytes <= max(block_bytes, 4 * 2 * 3)  # one row of one layer is the smallest unit
    expected = np.zeros_like(covered)
    expected[1:4, :, 2:4] = 1
    np.testing.assert_array_equal(covered, expected)


def test_an_array_without_rows_or_features_is_one_empty_block():
    assert list(split_into_blocks(((0, 3), (0, 0)), 4, 100)) == [((0, 3), (0, 0))]


@pytest.mark.parametrize("block_bytes", [48, 10**6])
@pytest.mark.parametrize("spec", [(), (None, "x"), (None, "x", "y"), (None, ("x", "y"))], ids=str)
def test_every_shard_is_read_once_however_many_devices_hold_it(spec, block_bytes, rng):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    values = rng.normal(size=(3, 8, 4)).astype(np.float32)
    read_counts = np.zeros(values.shape, int)

    def read(index):
        read_counts[index] += 1
        assert values[index].nbytes <= block_bytes
        return values[index]

    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    array = assemble(values.shape, sharding, values.dtype, read, stacked=True, block_bytes=block_bytes)
    np.testing.assert_array_equal(array, values)
    np.testing.assert_array_equal(read_counts, np.ones_like(read_counts))
    assert array.sharding == sharding
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, values[shard.index])


@pytest.mark.parametrize("block_bytes", [48, 10**6])
def test_an_array_is_laid_out_as_asked_for(block_bytes, rng):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    values = rng.normal(size=(3, 8, 4)).astype(np.float32)
    home = Format(Layout((0, 2, 1)), NamedSharding(mesh, PartitionSpec(None, "x")))
    array = assemble(values.shape, home, values.dtype, values.__getitem__, stacked=True, block_bytes=block_bytes)
    np.testing.assert_array_equal(array, values)
    assert array.format.layout.major_to_minor == (0, 2, 1)
    assert array.sharding == home.sharding
