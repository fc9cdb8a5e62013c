"""The tcgen05 kernel on rows of groups, interpreted with race detection, against float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import experts as oracle
from support.gpu_interpretation import interpreting
from support.rounding import ROUNDED_ONCE

from moe_jax.kernels.activations import Activation
from moe_jax.kernels.device import GPU_DEVICES
from moe_jax.kernels.groups import Groups
from moe_jax.kernels.mosaic_gpu.blackwell_row_tiles import (
    check_blackwell_row_tiles,
    default_blackwell_row_tiles,
    shared_memory_bytes,
)
from moe_jax.kernels.mosaic_gpu.rows_product import multiply_rows
from moe_jax.kernels.mosaic_gpu.schedule import TileTable, aligned_groups, aligned_num_rows
from moe_jax.kernels.mosaic_gpu.tiles import RowTiles

B200 = GPU_DEVICES["b200"]
TILES = RowTiles(rows=128, columns=64, depth=64, stages=3, panel=2)
HOT_EMPTY_AND_SMALL = (130, 0, 17, 1)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Random operands, and the float64 result that the rows of each group must have."""

    operands: dict
    groups: Groups
    projected: np.ndarray
    """[M, P, N], NaN in rows of no group."""
    result: np.ndarray
    """[M, N], NaN in rows of no group."""

    def rows_of(self, group):
        return slice(int(self.groups.starts[group]), int(self.groups.starts[group] + self.groups.sizes[group]))


def draw(
    rng,
    groups,
    num_rows,
    *,
    width_in=200,
    width_out=72,
    projections=1,
    contract="in",
    activation=None,
    bias=False,
    row_scale=False,
    dtype=jnp.bfloat16,
):
    """A problem whose rows hold NaN wherever they belong to no group."""
    num_groups = groups.sizes.shape[0]
    member = np.concatenate([np.arange(s, s + n) for s, n in zip(groups.starts, groups.sizes, strict=True)]).astype(int)
    group_of_row = np.repeat(np.arange(num_groups), groups.sizes)
    rows = np.full((num_rows, width_in), np.nan)
    rows[member] = rng.normal(size=(len(member), width_in))
    rows = jnp.array(rows, dtype)
    weights = jnp.array(rng.normal(size=(num_groups, projections, width_out, width_in)) / width_in**0.5, dtype)
    biases = jnp.array(rng.normal(size=(num_groups, projections, width_out)), dtype)
    scale = rng.uniform(0.5, 1.5, num_rows).astype(np.float32)

    projected = np.full((num_rows, projections, width_out), np.nan)
    projected[member] = np.einsum(
        "md,mpnd->mpn", np.asarray(rows, np.float64)[member], np.asarray(weights, np.float64)[group_of_row]
    )
    if bias:
        projected[member] += np.asarray(biases, np.float64)[group_of_row]
    result = projected[:, 0]
    if activation is not None:
        parameters = {name: getattr(activation, name) for name in ("limit", "alpha", "beta")}
        result = oracle.activate(activation.name, *np.moveaxis(projected, 1, 0), **parameters)
    if row_scale:
        result = result * scale[:, None]

    if contract == "in":
        weights = weights.reshape(-1, width_out, width_in)
    else:
        weights = weights[:, 0].swapaxes(1, 2)
    operands = dict(rows=rows, weights=weights, projections=projections, contract=contract, activation=activation)
    operands["bias"] = biases.reshape(-1, width_out) if bias else None
    operands["row_scale"] = jnp.array(scale) if row_scale else None
    return Problem(operands, groups, projected, result)


def multiply(problem, table=None, *, tiles=TILES, blocks=2, **options):
    """The kernel's result on a device of two multiprocessors, so that each block computes several tiles."""
    rows = problem.operands["rows"]
    table = TileTable.of(problem.groups, rows.shape[0], tiles.rows, "compact") if table is None else table
    options = dict(zero_groups=False, exact_rows=True, output_dtype=jnp.float32) | options
    device = dataclasses.replace(B200, multiprocessors=blocks)
    with interpreting(blocks, "b200"):
        result, projected = multiply_rows(**problem.operands, table=table, tiles=tiles, device=device, **options)
    return result if projected is None else (result, projected)


def compact(sizes, start=0):
    sizes = jnp.array(sizes, jnp.int32)
    return Groups(start + jnp.cumsum(sizes) - sizes, sizes)


def assert_close(result, expected, dtype=jnp.float32):
    scale = np.nanmax(np.abs(expected), initial=1)
    np.testing.assert_allclose(
        np.asarray(result, np.float64), expected, rtol=0, atol=ROUNDED_ONCE[jnp.dtype(dtype).name] * scale
    )


def test_exactly_the_rows_of_groups_are_written_from_their_own_group_with_bias_activation_and_scale(rng):
    groups = compact(HOT_EMPTY_AND_SMALL, start=3)
    problem = draw(rng, groups, num_rows=168, projections=2, activation=Activation("silu"), bias=True, row_scale=True)
    result, projected = multiply(problem, keep_projected=True)
    # What was not written reads as NaN, which the expected values have there as well.
    assert_close(result, problem.result)
    assert_close(projected, problem.projected)


def test_gradient_of_rows_contracts_the_outputs_and_rows_of_a_zero_group_become_zero(rng):
    sizes = jnp.array(HOT_EMPTY_AND_SMALL, jnp.int32)
    groups, num_rows = aligned_groups(sizes), aligned_num_rows(sum(HOT_EMPTY_AND_SMALL), len(HOT_EMPTY_AND_SMALL))
    problem = draw(rng, groups, num_rows, contract="out")
    poisoned = problem.operands["rows"].at[problem.rows_of(2)].set(jnp.nan)
    problem = dataclasses.replace(problem, operands=problem.operands | {"rows": poisoned})
    table = TileTable.of(groups, num_rows, TILES.rows, "aligned")
    table = table._replace(group=jnp.where(table.group == 2, -1, table.group))
    result = multiply(problem, table, zero_groups=True, exact_rows=False, output_dtype=jnp.bfloat16)
    for group in (0, 1, 3):
        own = problem.rows_of(group)
        assert_close(result[own], problem.result[own], jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(result[problem.rows_of(2)], np.float32), 0)


def test_fewer_rows_than_a_tile_and_widths_below_a_tile_are_multiplied(rng):
    problem = draw(rng, compact((5, 0, 2)), num_rows=8, width_in=8, width_out=16)
    assert_close(multiply(problem, blocks=1)[:7], problem.result[:7])


def test_columns_beyond_a_result_that_is_one_copy_wide_are_not_stored(rng):
    problem = draw(rng, compact((5, 0, 130)), num_rows=136, width_in=72, width_out=64)
    tiles = dataclasses.replace(TILES, columns=128)
    result = multiply(problem, tiles=tiles, output_dtype=jnp.bfloat16)
    assert_close(result[:135], problem.result[:135], jnp.bfloat16)


def test_several_projections_whose_outputs_are_contracted_are_refused(rng):
    problem = draw(rng, compact((5, 3)), num_rows=8, projections=2, activation=Activation("silu"))
    problem = dataclasses.replace(problem, operands=problem.operands | {"contract": "out"})
    with pytest.raises(ValueError, match="one matrix per group, got projections=2"):
        multiply(problem)


@pytest.mark.slow
def test_no_rows_in_any_group_write_nothing(rng):
    problem = draw(rng, compact((0, 0)), num_rows=8)
    assert np.isnan(multiply(problem)).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("activation", "bias"),
    [
        (Activation("swigluoai"), True),
        (Activation("swigluoai_uninterleave", limit=1.0), False),
        (Activation("swiglustep"), False),
        (Activation("silu", limit=1.0), False),
        (Activation("gelu"), False),
        (Activation("gelu_tanh"), False),
        (Activation("relu2"), False),
        (Activation("silu_no_mul"), True),
        (Activation("relu2_no_mul"), False),
    ],
    ids=str,
)
def test_every_activation_is_applied_in_float32(activation, bias, dtype, rng):
    projections = 2 if activation.is_gated else 1
    groups = compact((3, 0, 150))
    problem = draw(rng, groups, 153, projections=projections, activation=activation, bias=bias, dtype=dtype)
    assert_close(multiply(problem, output_dtype=dtype), problem.result, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("projections", [1, 2])
@pytest.mark.parametrize("contract", ["in", "out"])
@pytest.mark.parametrize("width_out", [72, 768, 4096])
def test_tiles_chosen_by_default_compute_what_they_should(width_out, contract, projections, rng):
    if contract == "out" and projections == 2:
        pytest.skip("the gradient of rows has one matrix per group")
    chosen = default_blackwell_row_tiles(32768, 8, 2048, width_out, projections, 2, B200)
    problem = draw(
        rng,
        compact((9, 0, 270)),
        num_rows=280,
        width_in=chosen.depth * (chosen.stages + 1) + 8,
        width_out=chosen.columns + 40,
        projections=projections,
        contract=contract,
        activation=Activation("silu") if projections == 2 else None,
    )
    result = multiply(problem, tiles=chosen)
    assert_close(result, problem.result)
    np.testing.assert_array_equal(multiply(problem, tiles=chosen), result)


@pytest.mark.parametrize("num_rows", [1, 64, 4096, 262_144])
@pytest.mark.parametrize(
    ("num_groups", "width_in", "width_out", "projections"),
    [
        (128, 2048, 768, 2),
        (128, 768, 2048, 1),
        (8, 4096, 14336, 2),
        (256, 7168, 2048, 2),
        (32, 2880, 2880, 1),
        (1, 8, 8, 2),
    ],
)
def test_default_tiles_fit_the_device(num_rows, num_groups, width_in, width_out, projections):
    tiles = default_blackwell_row_tiles(num_rows, num_groups, width_in, width_out, projections, 2, B200)
    check_blackwell_row_tiles(tiles, projections, 2, B200)
    assert shared_memory_bytes(tiles, projections, 2) <= B200.shared_memory_bytes
    assert tiles.columns < width_out + 64


@pytest.mark.parametrize(
    ("change", "projections", "limit"),
    [
        (dict(rows=64), 1, "rows of a tile must be 128, got 64"),
        (dict(columns=96), 1, "columns of a tile must be a multiple of 64, got 96"),
        (dict(columns=192), 2, "needs 768 columns of tensor memory, there are 512"),
        (dict(depth=32), 1, "depth must be a multiple of 64, got 32"),
        (dict(stages=1), 1, "at least 2 stages"),
        (dict(panel=0), 1, "1 tile per panel"),
        (dict(columns=128, stages=5), 2, "bytes of shared memory, b200 has 232448"),
    ],
)
def test_tiles_that_do_not_fit_are_refused_by_the_limit_they_hit(change, projections, limit):
    with pytest.raises(ValueError, match=limit):
        check_blackwell_row_tiles(dataclasses.replace(TILES, **change), projections, 2, B200)
