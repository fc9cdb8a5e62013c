"""Gradients of weights on TPUs: the kernel, interpreted, against float64; and the choice of its tiles."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from support.rounding import ROUNDED_ONCE
from support.tpu_interpretation import interpreting_tpu

from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES
from moe_jax.kernels.device import TPU_DEVICES
from moe_jax.kernels.groups import Groups
from moe_jax.kernels.mosaic_tpu.weights_gradient_kernel import weights_gradient
from moe_jax.kernels.mosaic_tpu.weights_gradient_tiles import (
    MOST_TILE_ELEMENTS,
    WeightsGradientTiles,
    default_weights_gradient_tiles,
    weights_gradient_vmem_bytes,
)

TILES = WeightsGradientTiles(out_columns=128, in_columns=256, rows=256, depth=128)
SIZES = (3, 0, 130, 11, 0, 270, 1, 0)
"""A group inside 16 rows, groups without rows between others and last, one of each depth, one of several visits."""


def draw(rng, sizes, start, num_rows, width_out, width_in, dtype):
    """Operands, with NaN in the rows of no group, and the groups, from row `start` on."""
    operands = [rng.standard_normal((num_rows, width)) for width in (width_out, width_in)]
    for operand in operands:
        operand[:start] = np.nan
        operand[start + sum(sizes) :] = np.nan
    ends = np.cumsum(sizes, dtype=np.int32) + start
    groups = Groups(jnp.array(ends - np.array(sizes), jnp.int32), jnp.array(sizes, jnp.int32))
    return [jnp.array(operand, dtype) for operand in operands], groups


def expected_gradient(cotangent, rows, sizes, start):
    """In float64, by definition."""
    cotangent, rows = (np.asarray(operand.astype(jnp.float32), np.float64) for operand in (cotangent, rows))
    bounds = itertools.pairwise([start, *(start + np.cumsum(sizes))])
    return np.stack([cotangent[first:last].T @ rows[first:last] for first, last in bounds])


def assert_matches(gradient, expected):
    np.testing.assert_allclose(
        gradient.astype(jnp.float32), expected, rtol=ROUNDED_ONCE[gradient.dtype.name], atol=1e-4
    )


@pytest.mark.parametrize(
    ("dma", "dtype", "start"),
    [
        ("on_wait", jnp.float32, 21),
        ("eager", jnp.bfloat16, 0),
        pytest.param("eager", jnp.float32, 21, marks=pytest.mark.slow),
        pytest.param("on_wait", jnp.bfloat16, 0, marks=pytest.mark.slow),
    ],
)
def test_each_group_gives_the_product_of_its_rows_alone(dma, dtype, start, rng):
    (cotangent, rows), groups = draw(rng, SIZES, start, 448, 128, 256, dtype)
    with interpreting_tpu(dma=dma):
        gradient = weights_gradient(cotangent, rows, groups, tiles=TILES, output_dtype=dtype, device=TPU_DEVICES["v6e"])
    assert gradient.dtype == dtype
    assert_matches(gradient, expected_gradient(cotangent, rows, SIZES, start))


SHAPES = [(41, 200, 300), (160, 40, 24), pytest.param(7, 128, 520, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("num_rows", "width_out", "width_in"), SHAPES)
def test_any_number_of_rows_and_columns(num_rows, width_out, width_in, rng):
    sizes = (num_rows // 2, 0, num_rows - num_rows // 2 - 2)
    (cotangent, rows), groups = draw(rng, sizes, 1, num_rows, width_out, width_in, jnp.bfloat16)
    with interpreting_tpu():
        gradient = weights_gradient(
            cotangent, rows, groups, tiles=TILES, output_dtype=jnp.float32, device=TPU_DEVICES["v5e"]
        )
    assert_matches(gradient, expected_gradient(cotangent, rows, sizes, 1))


def test_columns_beyond_the_widths_given_are_padding(rng):
    (cotangent, rows), groups = draw(rng, (5, 20), 0, 32, 384, 384, jnp.float32)
    with interpreting_tpu():
        gradient = weights_gradient(
            cotangent.at[:, 72:].set(jnp.nan),
            rows.at[:, 300:].set(jnp.nan),
            groups,
            tiles=TILES,
            widths=(72, 300),
            output_dtype=jnp.float32,
            device=TPU_DEVICES["v6e"],
        )
    assert_matches(gradient, expected_gradient(cotangent[:, :72], rows[:, :300], (5, 20), 0))


@pytest.mark.parametrize("sizes", [(0, 0, 0), pytest.param((0, 48), marks=pytest.mark.slow), ()], ids=str)
def test_groups_without_rows_have_a_gradient_of_zero(sizes, rng):
    (cotangent, rows), groups = draw(rng, sizes, 0, 48, 128, 128, jnp.bfloat16)
    tiles = dataclasses.replace(TILES, in_columns=128)
    with interpreting_tpu():
        gradient = weights_gradient(
            cotangent, rows, groups, tiles=tiles, output_dtype=jnp.bfloat16, device=TPU_DEVICES["7x"]
        )
    assert gradient.shape == (len(sizes), 128, 128)
    if sizes:
        assert_matches(gradient, expected_gradient(cotangent, rows, sizes, 0))


def test_the_gradient_of_no_rows_is_zero():
    empty, groups = jnp.zeros((0, 128)), Groups(jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32))
    gradient = weights_gradient(empty, empty, groups, tiles=TILES, output_dtype=jnp.float32, device=TPU_DEVICES["v6e"])
    np.testing.assert_array_equal(gradient, np.zeros((2, 128, 128)))


def test_a_copy_that_is_not_awaited_is_reported_as_a_race(rng, monkeypatch):
    (cotangent, rows), groups = draw(rng, (20, 20), 0, 48, 128, 256, jnp.float32)
    new_copy = pltpu.make_async_copy

    class Unawaited:
        def __init__(self, *arguments):
            self._copy = new_copy(*arguments)

        def start(self):
            self._copy.start()

        def wait(self):
            pass

    monkeypatch.setattr(pltpu, "make_async_copy", Unawaited)
    with interpreting_tpu(dma="eager", checked=False) as interpretation:
        weights_gradient(cotangent, rows, groups, tiles=TILES, output_dtype=jnp.float32, device=TPU_DEVICES["v6e"])
    assert interpretation.num_racing == 1
    assert interpretation.semaphores_left


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_columns": 64}, "out_columns must be a multiple of 128, got 64"),
        ({"depth": 100}, "depth must be a multiple of 128, got 100"),
        ({"rows": 320}, "must be a multiple of depth=128, got 320"),
        ({"out_columns": 8192, "in_columns": 8192}, "v6e has .* to give"),
    ],
)
def test_tiles_that_the_kernel_does_not_have_are_refused(changes, message):
    rows, groups = jnp.zeros((16, 128)), Groups(jnp.zeros(1, jnp.int32), jnp.full(1, 16, jnp.int32))
    tiles = dataclasses.replace(TILES, **changes)
    with pytest.raises(ValueError, match=message):
        weights_gradient(rows, rows, groups, tiles=tiles, output_dtype=jnp.float32, device=TPU_DEVICES["v6e"])


@pytest.mark.parametrize(
    ("cotangent", "rows", "output_dtype", "error", "message"),
    [
        (jnp.float16, jnp.float16, jnp.float32, TypeError, "got float16 and float16"),
        (jnp.bfloat16, jnp.float32, jnp.float32, TypeError, "got bfloat16 and float32"),
        (jnp.float32, jnp.float32, jnp.float16, TypeError, "output_dtype .* got float16"),
    ],
)
def test_dtypes_that_the_kernel_does_not_take_are_refused(cotangent, rows, output_dtype, error, message):
    groups = Groups(jnp.zeros(1, jnp.int32), jnp.full(1, 16, jnp.int32))
    operands = jnp.zeros((16, 128), cotangent), jnp.zeros((16, 128), rows)
    with pytest.raises(error, match=message):
        weights_gradient(*operands, groups, tiles=TILES, output_dtype=output_dtype, device=TPU_DEVICES["v6e"])


@pytest.mark.parametrize("device", TPU_DEVICES.values(), ids=TPU_DEVICES)
@pytest.mark.parametrize("shape", EXPERT_SHAPES.values(), ids=EXPERT_SHAPES)
@pytest.mark.parametrize(("itemsize", "output_itemsize"), [(2, 2), (2, 4), (4, 4)])
def test_default_tiles_fit_and_waste_little_of_published_shapes(device, shape, itemsize, output_itemsize):
    for width_out, width_in in (
        (2 * shape.intermediate_size, shape.hidden_size),
        (shape.hidden_size, shape.intermediate_size),
    ):
        tiles = default_weights_gradient_tiles(8192, width_out, width_in, itemsize, output_itemsize, device)
        assert weights_gradient_vmem_bytes(tiles, itemsize, output_itemsize) < device.vmem_bytes
        assert tiles.out_columns * tiles.in_columns <= MOST_TILE_ELEMENTS
        out_tiles, in_tiles = -(-width_out // tiles.out_columns), -(-width_in // tiles.in_columns)
        busiest_core = -(-out_tiles // device.cores) * tiles.out_columns * in_tiles * tiles.in_columns
        assert busiest_core * device.cores <= 1.2 * width_out * width_in
