"""The Hopper kernel for many rows per group, interpreted with race detection, against float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from support.gpu_interpretation import interpreting
from support.rows_problems import SILU, SWIGLUOAI, RowsProblem

from moe_jax.kernels import ACTIVATIONS, Activation
from moe_jax.kernels.device import GPU_DEVICES
from moe_jax.kernels.mosaic_gpu.row_tiles import check_row_tiles
from moe_jax.kernels.mosaic_gpu.rows_product import multiply_rows
from moe_jax.kernels.mosaic_gpu.tiles import RowTiles

BLOCKS = 2
H200 = GPU_DEVICES["h200"]
HOT_EMPTY_AND_ODD = (150, 0, 17, 3)
"""Rows of groups: with tiles of 64 or 128 rows, each of the blocks has several tiles."""


def tiles_of(rows=64, columns=128, depth=64, stages=3, panel=2):
    return RowTiles(rows=rows, columns=columns, depth=depth, stages=stages, panel=panel)


def multiply(problem, tiles, *, output_dtype="bfloat16", keep_projected=False):
    with interpreting(BLOCKS) as interpretation:
        result, projected = multiply_rows(
            **problem.operands,
            table=problem.table(tiles.rows),
            tiles=tiles,
            keep_projected=keep_projected,
            zero_groups=problem.is_compact,
            exact_rows=problem.is_compact,
            output_dtype=output_dtype,
            device=dataclasses.replace(H200, multiprocessors=BLOCKS),
        )
        assert str(result.dtype) == output_dtype
        assert (projected is not None) == keep_projected
        result.block_until_ready()
        assert interpretation.num_kernels == 1
    return (result, projected) if keep_projected else result


def check(rng, tiles, problem, *, sizes=HOT_EMPTY_AND_ODD, keep_projected=False, output_dtype="bfloat16"):
    problem = RowsProblem.draw(rng, sizes, **problem)
    result = multiply(problem, tiles, keep_projected=keep_projected, output_dtype=output_dtype)
    problem.assert_right(*(result if keep_projected else (result,)))


EVERYTHING = dict(activation=SILU, bias=True, row_scale=True)


@pytest.mark.parametrize(
    "keep_projected", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["result alone", "projections too"]
)
def test_an_odd_number_of_stores_per_tile_does_not_overwrite_what_is_being_stored(keep_projected, rng):
    check(rng, tiles_of(), EVERYTHING, keep_projected=keep_projected)


def test_rows_of_no_group_become_zero_unread_in_the_compact_layout(rng):
    check(rng, tiles_of(rows=128), dict(compact=True, bias=True, width_out=192))


def test_rows_of_no_group_become_zero_though_a_bias_is_infinite(rng):
    problem = RowsProblem.draw(rng, (0, 9, 70), compact=True, bias=True, width_out=192)
    problem.operands["bias"] = problem.operands["bias"].at[0].set(jnp.inf)
    problem.assert_right(multiply(problem, tiles_of(rows=128)))


@pytest.mark.parametrize(
    "contract", ["in", pytest.param("out", marks=pytest.mark.slow)], ids=["by the last axis", "by the middle axis"]
)
def test_the_compact_layout_has_any_number_of_rows(contract, rng):
    check(rng, tiles_of(), dict(compact=True, contract=contract, width_out=128), sizes=(70, 0, 5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("contract", "tiles", "output_dtype"),
    [
        ("in", tiles_of(64, 256), "float32"),
        ("in", tiles_of(128, 256, panel=1), "bfloat16"),
        ("out", tiles_of(64, 256), "bfloat16"),
        ("out", tiles_of(128, 256, panel=1), "float32"),
        ("in", tiles_of(128, 192), "bfloat16"),
        ("out", tiles_of(128, 192), "bfloat16"),
    ],
    ids=str,
)
def test_compact_groups_multiply_by_either_axis_of_the_weights(contract, tiles, output_dtype, rng):
    check(rng, tiles, dict(compact=True, contract=contract, width_out=320), output_dtype=output_dtype)


@pytest.mark.slow
@pytest.mark.parametrize("contract", ["in", "out"])
@pytest.mark.parametrize("tiles", [tiles_of(64, 128), tiles_of(128, 64), tiles_of(128, 128, depth=128)], ids=str)
def test_aligned_groups_multiply_by_either_axis_of_the_weights(contract, tiles, rng):
    check(rng, tiles, dict(contract=contract, row_scale=True, width_in=400))


@pytest.mark.slow
@pytest.mark.parametrize("output_dtype", ["float16", "float32"])
def test_float16_operands(output_dtype, rng):
    check(rng, tiles_of(128, 128), dict(activation=SWIGLUOAI, bias=True, dtype="float16"), output_dtype=output_dtype)


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [tiles_of(128, 128), tiles_of(128, 64), tiles_of(64, 128)], ids=str)
def test_gate_and_up_meet_in_the_activation_and_are_kept_as_they_enter_it(tiles, rng):
    check(rng, tiles, dict(activation=SWIGLUOAI, bias=True, row_scale=True, width_out=272), keep_projected=True)


@pytest.mark.parametrize(
    ("rows", "width_out", "output_dtype"), [(64, 64, "bfloat16"), (128, 32, "bfloat16"), (64, 16, "float32")]
)
def test_columns_beyond_a_result_that_is_one_copy_wide_are_not_stored(rows, width_out, output_dtype, rng):
    tiles = tiles_of(rows=rows)
    check(
        rng,
        tiles,
        EVERYTHING | dict(width_out=width_out),
        sizes=(9, 0, 70),
        keep_projected=True,
        output_dtype=output_dtype,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_applied_to_projections_with_bias(name, rng):
    activation = Activation(name, limit=2.0) if name == "swigluoai_uninterleave" else Activation(name)
    check(rng, tiles_of(), dict(activation=activation, bias=True, width_out=64), sizes=(9, 70))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width_in", "width_out"), [(16, 16), (48, 80), (96, 32), (224, 144), (192, 96), (48, 128), (128, 16)]
)
@pytest.mark.parametrize("contract", ["in", "out"])
def test_widths_that_allow_no_wide_swizzle_and_widths_below_a_tile(contract, width_in, width_out, rng):
    check(rng, tiles_of(), dict(contract=contract, width_in=width_in, width_out=width_out), sizes=(3, 0, 65))


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "panel"), [(6, 1), (2, 3), (6, 16)])
def test_any_number_of_stages_and_of_tiles_side_by_side(stages, panel, rng):
    check(rng, tiles_of(64, 128, stages=stages, panel=panel), dict(width_out=272), sizes=(140, 0, 65, 1))


@pytest.mark.slow
def test_rows_of_no_tile_are_not_written(rng):
    problem = RowsProblem.draw(rng, (5, 9))
    result = multiply(problem, tiles_of(), output_dtype="float32")
    problem.assert_right(result)
    # Memory that nothing wrote reads as NaN. Whole multiples of 8 rows are stored, and both tiles reach across these.
    assert np.isnan(result[24:]).all()


@pytest.mark.slow
def test_no_rows_in_any_group_write_nothing(rng):
    assert np.isnan(multiply(RowsProblem.draw(rng, (0, 0)), tiles_of(), output_dtype="float32")).all()


@pytest.mark.parametrize(
    ("change", "projections", "message"),
    [
        (dict(rows=32), 1, "rows of a tile must be 64 or 128, got 32"),
        (dict(columns=64), 1, "columns per warpgroup must be a multiple of 64.*got 32"),
        (dict(columns=129), 1, "columns per warpgroup must be a multiple of 64.*got 64.5"),
        (dict(columns=0), 1, "columns per warpgroup must be a multiple of 64.*got 0"),
        (dict(depth=0), 1, "depth must be a multiple of 64, got 0"),
        (dict(rows=128, columns=256), 2, "at most 128 for 2 projections, got 256"),
        (dict(rows=128, columns=512), 1, "at most 256 for 1 projections, got 512"),
        (dict(depth=32), 1, "depth must be a multiple of 64, got 32"),
        (dict(stages=1), 1, "at least 2 stages and 1 tile per panel"),
        (dict(panel=0), 1, "at least 2 stages and 1 tile per panel"),
        (dict(stages=9), 1, r"needs \d+ bytes of shared memory, h200 has 232448"),
    ],
)
def test_tiles_that_the_kernel_cannot_use_are_refused(change, projections, message, rng):
    tiles = dataclasses.replace(tiles_of(), **change)
    with pytest.raises(ValueError, match=message):
        check_row_tiles(tiles, projections, 2, H200)
    problem = RowsProblem.draw(rng, (3,), activation=SILU if projections == 2 else None)
    with pytest.raises(ValueError, match=message):
        multiply(problem, tiles)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(width_in=200), "widths must be multiples of 16 elements of 2 bytes, got 200"),
        (dict(width_out=136), "widths must be multiples of 16 elements of 2 bytes, got 136"),
        (dict(width_out=144, compact=True), "single rows .* multiples of 128 bytes, got 144 columns"),
    ],
)
def test_widths_that_copies_cannot_address_are_refused(sizes, message, rng):
    with pytest.raises(ValueError, match=message):
        multiply(RowsProblem.draw(rng, (3,), **sizes), tiles_of())
