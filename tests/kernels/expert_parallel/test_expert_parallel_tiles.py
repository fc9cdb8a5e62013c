"""Tile sizes of the expert-parallel kernel."""

import itertools

import pytest

from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES
from moe_jax.kernels.device import TPU_DEVICES
from moe_jax.kernels.expert_parallel.tiles import default_tiles, vmem_bytes

SHAPES = {
    name: dict(projections=2, hidden=shape.hidden_size, intermediate=shape.intermediate_size)
    for name, shape in EXPERT_SHAPES.items()
    if shape.hidden_size % 128 == shape.intermediate_size % 128 == 0
}


@pytest.mark.parametrize("device", TPU_DEVICES.values(), ids=TPU_DEVICES)
def test_defaults_fit_vector_memory_and_divide_the_shape(device):
    for shape, itemsize, most_rows in itertools.product(SHAPES.values(), [2, 4], [16, 48, 128, 65536]):
        tiles = default_tiles(device, **shape, itemsize=itemsize, most_rows=most_rows)
        sizes = {name: shape[name] for name in ("projections", "hidden")}
        assert vmem_bytes(tiles, **sizes, itemsize=itemsize) <= 0.9 * device.vmem_bytes
        assert shape["intermediate"] % tiles.intermediate == 0 == tiles.intermediate % 128
        assert shape["hidden"] % tiles.strip == 0 == tiles.strip % 128
        assert tiles.rows % tiles.chunk == 0 == tiles.chunk % tiles.step == tiles.step % 16
        assert tiles.rows < 2 * max(most_rows, 16)


@pytest.mark.parametrize("device", TPU_DEVICES.values(), ids=TPU_DEVICES)
def test_many_rows_are_computed_per_reading_of_deepseek_weights(device):
    tiles = default_tiles(device, **SHAPES["deepseek-v3"], itemsize=2, most_rows=65536)
    assert tiles.rows >= min(device.flops_per_second / device.hbm_bytes_per_second, 512)


def test_rows_that_do_not_fit_are_refused_with_their_size():
    with pytest.raises(ValueError, match=r"H=1048576 is too large for the vector memory of 7x, 67108864 bytes"):
        default_tiles(TPU_DEVICES["7x"], projections=2, hidden=2**20, intermediate=128, itemsize=2, most_rows=16)
