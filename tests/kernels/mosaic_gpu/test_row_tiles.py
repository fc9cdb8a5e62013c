"""Default tile sizes of the kernel for many rows per group: legal on any shape, and no block has much more to do than another."""

import itertools

import pytest

from moe_jax.kernels.device import GPU_DEVICES
from moe_jax.kernels.mosaic_gpu.row_tiles import check_row_tiles, default_row_tiles

H200 = GPU_DEVICES["h200"]


def chosen(num_rows, num_groups, width_out, projections=1):
    tiles = default_row_tiles(num_rows, num_groups, width_out, projections, 2, H200)
    return tiles.rows, tiles.columns


def test_the_default_is_legal_whatever_the_shape():
    for num_rows, num_groups, width, projections in itertools.product(
        (0, 1, 100, 10**6), (1, 8, 256), (16, 64, 80, 768, 14336), (1, 2)
    ):
        tiles = default_row_tiles(num_rows, num_groups, width, projections, 2, H200)
        check_row_tiles(tiles, projections, 2, H200)


@pytest.mark.parametrize(("projections", "columns"), [(1, 256), (2, 128)])
def test_many_tiles_are_as_large_as_the_registers_hold(projections, columns):
    assert chosen(65536, 128, 2048, projections) == (128, columns)


@pytest.mark.parametrize(
    ("num_rows", "num_groups", "width_out", "projections", "expected"),
    [
        (256, 4, 2048, 2, (128, 64)),  # 64 tiles of 128 columns would leave half of the multiprocessors idle
        (512, 8, 2048, 1, (128, 128)),  # the same with 256
        (256, 4, 2048, 1, (128, 64)),  # and with 128 too
        (512, 8, 2048, 2, (128, 128)),  # 128 tiles of 128 columns: smaller ones would not be done earlier
        (512, 8, 7168, 1, (128, 256)),  # 224 tiles of 256: two waves, as with 448 of half the size
    ],
)
def test_columns_are_halved_where_the_busiest_block_is_done_earlier(
    num_rows, num_groups, width_out, projections, expected
):
    assert chosen(num_rows, num_groups, width_out, projections) == expected


def test_columns_are_halved_where_a_tile_would_be_mostly_empty():
    assert chosen(65536, 128, 128) == (128, 128)
    assert chosen(65536, 128, 64) == (128, 64)
    assert chosen(65536, 128, 192) == (128, 256)


def test_few_rows_per_group_have_tiles_of_half_the_rows():
    assert chosen(64 * 128 - 1, 128, 2048)[0] == 64
    assert chosen(64 * 128, 128, 2048)[0] == 128
