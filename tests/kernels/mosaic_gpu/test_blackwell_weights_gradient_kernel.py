"""The tcgen05 kernel of weight gradients, interpreted with race detection, against float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from support.gpu_interpretation import interpreting
from support.rounding import ROUNDED_ONCE

from moe_jax.kernels.device import GPU_DEVICES
from moe_jax.kernels.groups import Groups
from moe_jax.kernels.mosaic_gpu.blackwell_weights_gradient_tiles import (
    check_blackwell_weights_gradient_tiles,
    default_blackwell_weights_gradient_tiles,
    shared_memory_bytes,
)
from moe_jax.kernels.mosaic_gpu.tiles import WeightsGradientTiles
from moe_jax.kernels.mosaic_gpu.weights_gradient_product import weights_gradient

B200 = GPU_DEVICES["b200"]
TILES = WeightsGradientTiles(out_columns=128, in_columns=64, depth=64, stages=3, panel=1)


def assert_right_gradient(rng, sizes, *, start, num_rows, width_out, width_in, tiles, dtype, output_dtype, blocks=2):
    """Against float64, with NaN in the rows of no group of both operands."""
    sizes = np.array(sizes, np.int32)
    starts = (start + np.cumsum(sizes) - sizes).astype(np.int32)
    cotangent, rows = (np.full((num_rows, width), np.nan) for width in (width_out, width_in))
    members = slice(start, start + sizes.sum())
    for operand in (cotangent, rows):
        operand[members] = rng.normal(size=operand[members].shape)
    cotangent, rows = jnp.array(cotangent, dtype), jnp.array(rows, dtype)
    device = dataclasses.replace(B200, multiprocessors=blocks)
    with interpreting(blocks, "b200"):
        result = weights_gradient(
            cotangent,
            rows,
            Groups(jnp.array(starts), jnp.array(sizes)),
            tiles=tiles,
            output_dtype=output_dtype,
            device=device,
        )
    wide_cotangent, wide_rows = np.asarray(cotangent, np.float64), np.asarray(rows, np.float64)
    owned = [slice(first, first + size) for first, size in zip(starts, sizes, strict=True)]
    expected = np.stack([wide_cotangent[own].T @ wide_rows[own] for own in owned])
    assert result.dtype == output_dtype
    atol = ROUNDED_ONCE[jnp.dtype(output_dtype).name] * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=0, atol=atol)
    np.testing.assert_array_equal(np.asarray(result[sizes == 0], np.float32), 0)


def test_each_group_has_the_gradient_of_its_own_rows_and_an_empty_one_has_zero(rng):
    assert_right_gradient(
        rng,
        (130, 0, 17, 1),
        start=3,
        num_rows=155,
        width_out=136,
        width_in=72,
        tiles=TILES,
        dtype=jnp.bfloat16,
        output_dtype=jnp.float32,
    )


@pytest.mark.slow
@pytest.mark.parametrize("output_dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(("width_out", "width_in"), [(2048, 768), (768, 40), (2880, 2880)])
def test_tiles_chosen_by_default_compute_what_they_should(width_out, width_in, output_dtype, rng):
    tiles = default_blackwell_weights_gradient_tiles(8, width_out, width_in, 2, B200)
    assert_right_gradient(
        rng,
        (0, 333, 5, 70),
        start=0,
        num_rows=408,
        width_out=tiles.out_columns + 8,
        width_in=tiles.in_columns + 24,
        tiles=tiles,
        dtype=jnp.float16 if output_dtype == jnp.float16 else jnp.bfloat16,
        output_dtype=output_dtype,
    )


@pytest.mark.parametrize(
    ("num_groups", "width_out", "width_in"),
    [(128, 1536, 2048), (128, 2048, 768), (8, 28672, 4096), (256, 4096, 7168), (32, 5760, 2880), (1, 8, 8)],
)
def test_default_tiles_fit_the_device(num_groups, width_out, width_in):
    tiles = default_blackwell_weights_gradient_tiles(num_groups, width_out, width_in, 2, B200)
    check_blackwell_weights_gradient_tiles(tiles, 2, B200)
    assert shared_memory_bytes(tiles, 2) <= B200.shared_memory_bytes
    assert tiles.in_columns < width_in + 64


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        (dict(out_columns=64), "out_columns must be 128, got 64"),
        (dict(in_columns=96), "in_columns must be a multiple of 64, got 96"),
        (dict(in_columns=320), "needs 640 columns of tensor memory, there are 512"),
        (dict(depth=32), "depth must be a multiple of 64, got 32"),
        (dict(stages=1), "at least 2 stages"),
        (dict(panel=0), "1 tile per panel"),
        (dict(in_columns=256, stages=5), "bytes of shared memory, b200 has 232448"),
    ],
)
def test_tiles_that_do_not_fit_are_refused_by_the_limit_they_hit(change, limit):
    with pytest.raises(ValueError, match=limit):
        check_blackwell_weights_gradient_tiles(dataclasses.replace(TILES, **change), 2, B200)


def test_tiles_wider_than_a_narrow_gradient_are_refused():
    rows = jnp.ones((8, 64), jnp.bfloat16)
    groups = Groups(jnp.array([0]), jnp.array([8]))
    tiles = dataclasses.replace(TILES, in_columns=128)
    with pytest.raises(ValueError, match="less than 64 wider than the rows, got .*in_columns=128.* for 64 columns"):
        weights_gradient(rows, rows, groups, tiles=tiles, output_dtype=jnp.bfloat16, device=B200)
