"""The kernel on rows of groups, interpreted with race detection in both DMA modes, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from support.tpu_interpretation import DMA_MODES, interpreting_tpu
from support.tpu_rows_problems import TILES, assert_close, draw, multiply

from moe_jax.kernels.activations import ACTIVATIONS, Activation
from moe_jax.kernels.device import TPU_DEVICES
from moe_jax.kernels.mosaic_tpu import limits, rows_kernel
from moe_jax.kernels.mosaic_tpu.choice import RowsProblem, choose_row_tiles, row_too_long
from moe_jax.kernels.mosaic_tpu.limits import check_row_tiles, vmem_limit_bytes
from moe_jax.kernels.mosaic_tpu.schedule import VisitTable
from moe_jax.kernels.mosaic_tpu.tiles import RowTiles

HOT_EMPTY_AND_SMALL = (130, 0, 17, 1, 300)


@pytest.mark.parametrize("dma", DMA_MODES)
def test_each_row_meets_its_own_group_with_bias_activation_and_scale_and_other_rows_become_zero(dma, rng):
    problem = draw(
        rng, HOT_EMPTY_AND_SMALL, projections=2, activation=Activation("silu"), bias=True, row_scale=True, num_rows=768
    )
    result, projected = multiply(problem, dma=dma, keep_projected=True)
    assert_close(result, problem.result)
    assert_close(projected, problem.projected)


@pytest.mark.parametrize("dma", DMA_MODES)
def test_gradient_of_rows_contracts_the_outputs(dma, rng):
    problem = draw(rng, (1,) * 9 + (0, 45), contract="out", width_out=72, width_in=200, dtype=jnp.bfloat16)
    result, _ = multiply(problem, dma=dma, output_dtype=jnp.bfloat16)
    assert_close(result, problem.result, jnp.bfloat16)


def test_rows_that_share_16_rows_with_no_group_are_zero_and_those_beyond_are_not_written(rng):
    problem = draw(rng, (20, 0, 3), start=21, num_rows=96)
    result, _ = multiply(problem, zero_outside=False)
    assert_close(result[16:48], problem.result[16:48])
    # What was not written reads as NaN.
    assert np.isnan(result[:16]).all()
    assert np.isnan(result[48:]).all()


def test_no_rows_in_any_group_give_zeros_and_read_nothing(rng):
    problem = draw(rng, (0, 0, 0), num_rows=48)
    result, _ = multiply(problem)
    np.testing.assert_array_equal(result, 0)


@pytest.mark.parametrize("sizes", [(5,), (16, 16), (127, 1), (64, 65, 63), (129, 0, 191, 193, 7), (255, 257)], ids=str)
def test_every_remainder_of_a_group_is_multiplied(sizes, rng):
    problem = draw(rng, sizes, start=0, width_in=16, width_out=24)
    tiles = dataclasses.replace(TILES, most=int(rng.choice([TILES.chunk, TILES.most])))
    assert_close(multiply(problem, tiles=tiles)[0], problem.result)


@pytest.mark.parametrize("dma", DMA_MODES)
def test_groups_meet_one_tile_of_columns_after_the_other_where_a_pass_has_several(dma, rng):
    """Two passes of two tiles each, the last one narrower; one group is two visits, others share 16 rows."""
    options = dict(projections=2, activation=Activation("silu"), bias=True, row_scale=True)
    problem = draw(rng, HOT_EMPTY_AND_SMALL, width_in=24, width_out=840, num_rows=768, **options)
    tiles = dataclasses.replace(TILES, columns=256, column_tiles=2)
    result, projected = multiply(problem, dma=dma, tiles=tiles, keep_projected=True)
    assert_close(result, problem.result)
    assert_close(projected, problem.projected)


@pytest.mark.parametrize("sizes", [(1,) * 9 + (0, 45), (0, 0)], ids=str)
def test_gradient_of_rows_is_computed_with_several_tiles_of_columns_in_a_pass(sizes, rng):
    problem = draw(rng, sizes, contract="out", width_in=24, width_out=384, dtype=jnp.bfloat16)
    tiles = dataclasses.replace(TILES, column_tiles=3)
    result, _ = multiply(problem, tiles=tiles, output_dtype=jnp.bfloat16)
    assert_close(result, problem.result, jnp.bfloat16)


def test_tiles_of_a_pass_must_divide_all(rng):
    problem = draw(rng, (5,), width_out=384)
    with pytest.raises(ValueError, match="column_tiles=2 must divide the 3 tiles of 384 columns"):
        multiply(problem, tiles=dataclasses.replace(TILES, column_tiles=2))


@pytest.mark.slow
@pytest.mark.parametrize("least", [64, 128, 256])
@pytest.mark.parametrize("chunk", [128, 256, 512])
@pytest.mark.parametrize("chunks", [1, 2])
def test_every_number_of_rows_is_multiplied_with_every_kind_of_tiles(chunks, chunk, least, rng):
    if least > chunk:
        pytest.skip("least is at most a chunk")
    most = int(rng.integers(chunk // 64, 2 * chunk // 64)) * 64
    tiles = RowTiles(rows=chunks * chunk, columns=128, chunk=chunk, remainder=64, least=least, most=most)
    sizes = rng.permutation([*range(1, 560, 37), 0, 64, 128, 192, 256, 320, 512, 3 * chunk])
    problem = draw(rng, sizes, start=0, width_in=8, width_out=8)
    assert_close(multiply(problem, tiles=tiles)[0], problem.result)


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_activation_is_applied_in_float32(name, dtype, rng):
    activation = Activation(name, limit=1.0) if name in ("swigluoai_uninterleave", "swiglustep") else Activation(name)
    projections = 2 if activation.is_gated else 1
    problem = draw(rng, (3, 0, 70), projections=projections, activation=activation, bias=True, dtype=dtype)
    assert_close(multiply(problem, output_dtype=dtype)[0], problem.result, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("device", TPU_DEVICES)
@pytest.mark.parametrize("contract", ["in", "out"])
def test_tiles_chosen_by_default_compute_what_they_should(device, contract, rng):
    sizes = (9, 0, 270)
    sizes_of = dict(num_rows=sum(sizes), num_groups=3, width_in=392, width_out=1000, projections=1)
    tiles = choose_row_tiles(RowsProblem(**sizes_of, itemsize=4, output_itemsize=4), TPU_DEVICES[device]).tiles
    problem = draw(rng, sizes, width_in=392, width_out=1000, contract=contract)
    assert_close(multiply(problem, tiles=tiles, device=device)[0], problem.result)


class _WithoutWait:
    """A copy for which nobody waits."""

    def __init__(self, copy):
        self._copy = copy

    def start(self):
        self._copy.start()

    def wait(self):
        pass


def test_a_forgotten_wait_is_caught(rng, monkeypatch):
    make_async_copy = pltpu.make_async_copy
    monkeypatch.setattr(pltpu, "make_async_copy", lambda *refs: _WithoutWait(make_async_copy(*refs)))
    problem = draw(rng, (20, 30))
    with interpreting_tpu("v5e", dma="eager", checked=False) as interpretation:
        table = VisitTable.of(problem.groups, problem.operands["rows"].shape[0], TILES.rows)
        device = TPU_DEVICES["v5e"]
        result = rows_kernel.multiply_rows(
            **problem.operands, table=table, tiles=TILES, output_dtype=jnp.float32, device=device
        )
        jax.block_until_ready(result)
    assert interpretation.num_racing == 1
    assert interpretation.semaphores_left


@pytest.mark.parametrize("device", TPU_DEVICES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("num_rows", [1, 64, 4096, 262_144])
@pytest.mark.parametrize(
    ("num_groups", "width_in", "width_out", "projections"),
    [
        (128, 2048, 768, 2),
        (128, 768, 2048, 1),
        (8, 4096, 14336, 2),
        (8, 14336, 4096, 1),
        (8, 28672, 4096, 1),
        (32, 7168, 2048, 2),
        (128, 2880, 2880, 2),
        (1, 8, 8, 2),
    ],
)
def test_chosen_tiles_fit_the_device(num_rows, num_groups, width_in, width_out, projections, itemsize, device):
    problem = RowsProblem(
        num_rows=num_rows,
        num_groups=num_groups,
        width_in=width_in,
        width_out=width_out,
        projections=projections,
        kept=True,
        scaled_rows=num_rows,
        itemsize=itemsize,
        output_itemsize=itemsize,
    )
    tiles = choose_row_tiles(problem, TPU_DEVICES[device]).tiles
    check_row_tiles(tiles, TPU_DEVICES[device], 0)
    assert tiles.columns < width_out + 256


def gate_and_up(num_rows, num_groups, width_in, width_out) -> RowsProblem:
    sizes = dict(num_rows=num_rows, num_groups=num_groups, width_in=width_in, width_out=width_out)
    return RowsProblem(**sizes, projections=2, itemsize=2, output_itemsize=2)


@pytest.mark.parametrize("device", ["v6e", "7x"])
@pytest.mark.parametrize("num_rows", [4096, 16384])
def test_tiles_fill_the_columns_of_wide_matrix_units_where_the_result_has_as_many(device, num_rows):
    tiles = choose_row_tiles(gate_and_up(num_rows, 8, 4096, 14336), TPU_DEVICES[device]).tiles
    assert tiles.columns % 256 == 0


def test_where_loading_matrix_units_takes_long_more_rows_are_multiplied_at_once():
    many, few = gate_and_up(16384, 8, 4096, 14336), gate_and_up(8 * 100, 8, 4096, 14336)
    assert choose_row_tiles(many, TPU_DEVICES["7x"]).tiles.chunk == 512
    assert choose_row_tiles(many, TPU_DEVICES["v6e"]).tiles.chunk == 256
    assert choose_row_tiles(many, TPU_DEVICES["v5e"]).tiles.chunk == 128
    # A visit that is one chunk is code for every multiple of 64 rows, so that few rows of a group are not padded to 512.
    tiles = choose_row_tiles(few, TPU_DEVICES["7x"]).tiles
    assert tiles.rows == tiles.chunk
    assert sorted((*tiles.remainders, tiles.chunk)) == list(range(64, tiles.rows + 1, 64))


@pytest.mark.parametrize("device", TPU_DEVICES)
@pytest.mark.parametrize(("width_in", "fills_matrix_units"), [(4096, True), (2880, False)])
def test_more_rows_than_a_chunk_are_multiplied_at_once_unless_registers_would_be_spilled(
    device, width_in, fills_matrix_units
):
    tiles = choose_row_tiles(gate_and_up(16384, 8, width_in, 2880), TPU_DEVICES[device]).tiles
    is_narrow = TPU_DEVICES[device].mxu_size == 128
    beyond = tiles.rows > tiles.chunk and (fills_matrix_units or not is_narrow)
    assert (max(tiles.remainders) > tiles.chunk) == beyond


@pytest.mark.parametrize("device", ["v5p", "7x"])
@pytest.mark.parametrize("num_rows", [2048, 8192])
def test_rows_are_read_once_by_each_core_where_gate_and_up_do_not_fit_vector_memory_and_copies_matter(device, num_rows):
    tiles = choose_row_tiles(gate_and_up(num_rows, 32, 7168, 2048), TPU_DEVICES[device]).tiles
    assert tiles.column_tiles * tiles.columns * TPU_DEVICES[device].cores == 2048


def test_rows_that_are_too_long_for_vector_memory_are_refused_by_the_limit():
    problem = RowsProblem(
        num_rows=100, num_groups=2, width_in=10**6, width_out=8, projections=1, itemsize=2, output_itemsize=2
    )
    reason = row_too_long(problem, TPU_DEVICES["v6e"])
    assert "128 rows and 128 columns of 1000000 elements take" in reason
    assert f"v6e has {vmem_limit_bytes(TPU_DEVICES['v6e'])} to give" in reason
    with pytest.raises(ValueError, match="128 rows and 128 columns of 1000000 elements"):
        choose_row_tiles(problem, TPU_DEVICES["v6e"])


@pytest.mark.parametrize(
    ("change", "needed", "limit"),
    [
        (dict(columns=96), 0, "columns of a tile must be a multiple of 128, got 96"),
        (dict(chunk=64), 0, "chunk must be a multiple of 128, got 64"),
        (dict(rows=192), 0, "rows of a tile must be a multiple of chunk=128, got 192"),
        (dict(remainder=24), 0, "remainder must be a multiple of 16 that divides chunk=128, got 24"),
        (dict(least=96), 0, "least must be a multiple of remainder=64 up to chunk=128, got 96"),
        (dict(most=64), 0, "most must be a multiple of remainder=64 from chunk=128 on, got 64"),
        (dict(most=200), 0, "most must be a multiple of remainder=64 from chunk=128 on, got 200"),
        (dict(column_tiles=0), 0, "column_tiles must be at least 1, got 0"),
        (dict(), 2**40, "take 1099511627776 bytes of vector memory, v5e has"),
    ],
)
def test_tiles_that_do_not_fit_are_refused_by_the_limit_they_hit(change, needed, limit):
    with pytest.raises(ValueError, match=limit):
        check_row_tiles(dataclasses.replace(TILES, **change), TPU_DEVICES["v5e"], needed)


@pytest.mark.parametrize(
    ("device", "width_in", "scaled_rows", "used_mib"), [("v5p", 28672, 0, 66.68), ("v6e", 14336, 16512, 129.63)]
)
def test_tiles_that_the_compiler_had_no_room_for_are_not_chosen(device, width_in, scaled_rows, used_mib):
    """Down projection and gradient of Mixtral 8x7B with 8192 tokens; what the compiler said that the tiles take."""
    columns, rows, chunk = (256, 256, 128) if device == "v5p" else (1408, 512, 256)
    least = chunk // (2 if chunk == 128 else 1)
    refused = RowTiles(rows=rows, columns=columns, chunk=chunk, remainder=chunk // 2, least=least, most=3 * chunk // 2)
    sizes = dict(width_in=width_in, projections=1, itemsize=2, output_itemsize=2)
    needed = limits.rows_vmem_bytes(refused, kept=False, scaled_rows=scaled_rows, device=TPU_DEVICES[device], **sizes)
    assert needed > vmem_limit_bytes(TPU_DEVICES[device])
    assert needed < used_mib * 2**20
    problem = RowsProblem(num_rows=16384, num_groups=8, width_out=4096, scaled_rows=scaled_rows, **sizes)
    assert choose_row_tiles(problem, TPU_DEVICES[device]).tiles != refused
