"""The kernel for gradients with respect to weights, interpreted with race detection, against float64."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from support.gpu_interpretation import interpreting

from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES, TOKENS
from moe_jax.kernels.device import GPU_DEVICES
from moe_jax.kernels.groups import Groups
from moe_jax.kernels.mosaic_gpu.schedule import aligned_num_rows
from moe_jax.kernels.mosaic_gpu.tiles import WeightsGradientTiles
from moe_jax.kernels.mosaic_gpu.weights_gradient_product import weights_gradient
from moe_jax.kernels.mosaic_gpu.weights_gradient_tiles import default_weights_gradient_tiles, shared_memory_bytes

H200 = GPU_DEVICES["h200"]


def tiles_of(out_columns, in_columns, stages, panel=2):
    return WeightsGradientTiles(out_columns=out_columns, in_columns=in_columns, depth=64, stages=stages, panel=panel)


SMALL_TILES = tiles_of(128, 64, 3)
DEFAULT_TILES = [
    tiles_of(128, 256, 4),
    tiles_of(128, 256, 3),
    tiles_of(256, 128, 4),
    tiles_of(256, 128, 3),
    tiles_of(128, 128, 6),
    tiles_of(128, 128, 5),
]
OTHER_TILES = [tiles_of(256, 64, 2), tiles_of(128, 192, 4), tiles_of(128, 128, 2), tiles_of(128, 64, 8)]

# A hot group of three steps, followed at once, within 8 rows, by an empty and an odd one; then a group of one row.
STARTS, SIZES, NUM_ROWS = (3, 147, 147, 231), (144, 0, 17, 1), 240
ROUNDING = {jnp.bfloat16: 2**-8, jnp.float16: 2**-11, jnp.float32: 0}
"""Largest relative error of rounding to nearest once."""


def draw(rng, starts, sizes, num_rows, width_out, width_in, dtype=jnp.bfloat16):
    """Operands that hold NaN in all rows outside the groups."""
    outside = np.ones(num_rows, bool)
    for start, size in zip(starts, sizes, strict=True):
        outside[start : start + size] = False
    cotangent, rows = rng.normal(size=(num_rows, width_out)), rng.normal(size=(num_rows, width_in))
    cotangent[outside] = rows[outside] = np.nan
    groups = Groups(jnp.array(starts, jnp.int32), jnp.array(sizes, jnp.int32))
    return jnp.array(cotangent, dtype), jnp.array(rows, dtype), groups


def expected_gradient(cotangent, rows, groups):
    cotangent, rows = np.asarray(cotangent, np.float64), np.asarray(rows, np.float64)
    parts = [slice(int(start), int(start + size)) for start, size in zip(*groups, strict=True)]
    return np.stack([cotangent[part].T @ rows[part] for part in parts])


def interpret(cotangent, rows, groups, tiles, output_dtype, multiprocessors=2):
    device = dataclasses.replace(H200, multiprocessors=multiprocessors)
    with interpreting(multiprocessors) as interpretation:
        result = weights_gradient(cotangent, rows, groups, tiles=tiles, output_dtype=output_dtype, device=device)
        result.block_until_ready()
        assert interpretation.num_kernels == 1
    assert result.dtype == output_dtype
    return np.asarray(result, np.float64)


def assert_rounded_once(result, expected, output_dtype):
    """Rounded to nearest once, besides the error of accumulating in float32."""
    error = np.abs(result - expected)
    np.testing.assert_array_less(
        error, 1.01 * ROUNDING[output_dtype] * np.abs(expected) + 1e-5 * np.abs(expected).max()
    )


def check_tiles(rng, tiles, output_dtype, width_out, width_in):
    cotangent, rows, groups = draw(rng, STARTS, SIZES, NUM_ROWS, width_out, width_in)
    result = interpret(cotangent, rows, groups, tiles, output_dtype)
    assert_rounded_once(result, expected_gradient(cotangent, rows, groups), output_dtype)
    np.testing.assert_array_equal(result[1], 0)


@pytest.mark.parametrize(
    ("tiles", "output_dtype"), [(DEFAULT_TILES[0], jnp.bfloat16), (DEFAULT_TILES[1], jnp.float32)], ids=str
)
def test_most_common_tiles_multiply_each_group_apart(tiles, output_dtype, rng):
    check_tiles(rng, tiles, output_dtype, width_out=80, width_in=272)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tiles", "output_dtype"),
    list(zip(DEFAULT_TILES + OTHER_TILES, itertools.cycle([jnp.bfloat16, jnp.float32]), strict=False)),
    ids=str,
)
def test_tiles_of_every_size_multiply_each_group_apart(tiles, output_dtype, rng):
    check_tiles(rng, tiles, output_dtype, width_out=336, width_in=208)


@pytest.mark.parametrize("output_itemsize", [2, 4])
@pytest.mark.parametrize("shape", EXPERT_SHAPES.values(), ids=lambda shape: shape.name)
def test_defaults_for_published_models_fit_and_are_among_the_tiles_interpreted_here(shape, output_itemsize):
    H, I, E = shape.hidden_size, shape.intermediate_size, shape.local_experts  # noqa: E741
    for tokens in TOKENS:
        num_rows = aligned_num_rows(tokens * shape.top_k, E)
        for width_out, width_in in ((2 * I, H), (I, H), (H, I)):
            tiles = default_weights_gradient_tiles(num_rows, E, width_out, width_in, 2, output_itemsize, H200)
            assert shared_memory_bytes(tiles, 2, output_itemsize, H200) <= H200.shared_memory_bytes
            assert dataclasses.replace(tiles, panel=2) in DEFAULT_TILES


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_an_infinite_or_missing_number_stays_in_its_group(rng):
    starts, sizes = (1, 22, 35), (21, 13, 30)
    cotangent, rows, groups = draw(rng, starts, sizes, 70, 64, 64)
    cotangent, rows = cotangent.at[22:35].set(jnp.nan), rows.at[22:35].set(jnp.inf)
    result = interpret(cotangent, rows, groups, SMALL_TILES, jnp.float32)
    expected = expected_gradient(cotangent, rows, groups)
    assert_rounded_once(result[::2], expected[::2], jnp.float32)
    assert np.isnan(result[1]).all()


def test_the_result_is_the_same_bits_every_time_on_any_number_of_multiprocessors(rng):
    operands = draw(rng, (0, 70, 79), (70, 9, 65), 144, 80, 64)
    first, second = (interpret(*operands, SMALL_TILES, jnp.float32, count) for count in (2, 5))
    np.testing.assert_array_equal(first, second)
    assert_rounded_once(first, expected_gradient(*operands), jnp.float32)


@pytest.mark.parametrize(
    ("width_out", "width_in"),
    [(192, 96), *(pytest.param(*widths, marks=pytest.mark.slow) for widths in [(96, 192), (128, 16), (48, 128)])],
)
def test_widths_of_different_swizzles_multiply_each_group_apart(width_out, width_in, rng):
    check_tiles(rng, SMALL_TILES, jnp.bfloat16, width_out, width_in)


@pytest.mark.parametrize(
    ("width_in", "out_columns", "output_dtype"),
    [(64, 128, jnp.bfloat16), (32, 256, jnp.bfloat16), (16, 128, jnp.float32)],
)
def test_columns_beyond_a_gradient_that_is_one_copy_wide_are_not_stored(width_in, out_columns, output_dtype, rng):
    tiles = dataclasses.replace(SMALL_TILES, out_columns=out_columns, in_columns=128)
    check_tiles(rng, tiles, output_dtype, 272, width_in)


def test_any_number_of_rows_and_the_last_of_them_in_a_group(rng):
    operands = draw(rng, (2, 72), (70, 3), 75, 80, 64)
    assert_rounded_once(interpret(*operands, SMALL_TILES, jnp.float32), expected_gradient(*operands), jnp.float32)


def test_groups_of_whole_steps_need_no_masking(rng):
    operands = draw(rng, (0, 64, 192), (64, 128, 64), 256, 64, 64, jnp.float16)
    result = interpret(*operands, SMALL_TILES, jnp.float16)
    assert_rounded_once(result, expected_gradient(*operands), jnp.float16)


def test_groups_without_rows_have_no_gradient(rng):
    operands = draw(rng, (0, 0, 8), (0, 0, 0), 8, 64, 64)
    np.testing.assert_array_equal(interpret(*operands, SMALL_TILES, jnp.bfloat16), 0)


@pytest.mark.parametrize(("num_rows", "num_groups"), [(0, 3), (8, 0)])
def test_nothing_runs_without_rows_or_groups(num_rows, num_groups):
    none = jnp.zeros(num_groups, jnp.int32)
    cotangent, rows = jnp.ones((num_rows, 16), jnp.bfloat16), jnp.ones((num_rows, 16), jnp.bfloat16)
    result = weights_gradient(
        cotangent, rows, Groups(none, none), tiles=SMALL_TILES, output_dtype=jnp.float32, device=H200
    )
    np.testing.assert_array_equal(result, np.zeros((num_groups, 16, 16)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cotangent": jnp.zeros((16, 20), jnp.bfloat16)}, ValueError, "N must be a positive multiple of 16, got 20"),
        ({"rows": jnp.zeros((16, 12), jnp.bfloat16)}, ValueError, "D must be a positive multiple of 16, got 12"),
        ({"rows": jnp.zeros((8, 16), jnp.bfloat16)}, ValueError, "share M"),
        ({"rows": jnp.zeros((16, 16), jnp.float16)}, TypeError, "got bfloat16 and float16"),
        ({"output_dtype": jnp.int32}, TypeError, "bfloat16, float16 or float32, got int32"),
        ({"tiles": tiles_of(64, 128, 3)}, ValueError, "out_columns must be one of \\(128, 256\\)"),
        ({"tiles": tiles_of(256, 256, 3)}, ValueError, "out_columns \\* in_columns must be at most 32768"),
        ({"tiles": tiles_of(128, 256, 5)}, ValueError, "262232 bytes of shared memory, h200 has 232448"),
        ({"tiles": tiles_of(128, 128, 1)}, ValueError, "stages must be at least 2"),
        ({"tiles": tiles_of(128, 128, 3, panel=0)}, ValueError, "panel at least 1"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(change, error, message):
    arguments = {
        "cotangent": jnp.zeros((16, 16), jnp.bfloat16),
        "rows": jnp.zeros((16, 16), jnp.bfloat16),
        "groups": Groups(jnp.array([0]), jnp.array([16])),
        "tiles": SMALL_TILES,
        "output_dtype": jnp.float32,
        "device": H200,
    }
    with pytest.raises(error, match=message):
        weights_gradient(**arguments | change)
