"""The kernel on rows of groups, interpreted with race detection in both DMA modes, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import ClosedJaxpr, Jaxpr
from oracles import experts as oracle
from support.rounding import ROUNDED_ONCE
from support.tpu_interpretation import DMA_MODES, interpreting_tpu

from moe_jax.kernels.activations import ACTIVATIONS, Activation
from moe_jax.kernels.device import TPU_DEVICES
from moe_jax.kernels.groups import Groups
from moe_jax.kernels.mosaic_tpu import limits, rows_kernel
from moe_jax.kernels.mosaic_tpu.choice import RowsProblem, choose_row_tiles, row_too_long
from moe_jax.kernels.mosaic_tpu.limits import check_row_tiles, vmem_limit_bytes
from moe_jax.kernels.mosaic_tpu.schedule import VisitTable
from moe_jax.kernels.mosaic_tpu.tiles import RowTiles

TILES = RowTiles(rows=256, columns=128, chunk=128, remainder=64, least=64, most=192)
HOT_EMPTY_AND_SMALL = (130, 0, 17, 1, 300)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Random operands, and the float64 result that the rows of each group must have."""

    operands: dict
    groups: Groups
    projected: np.ndarray
    """[P, M, N], zero in rows of no group."""
    result: np.ndarray
    """[M, N], zero in rows of no group."""


def draw(
    rng,
    sizes,
    *,
    start=3,
    num_rows=None,
    width_in=72,
    width_out=200,
    projections=1,
    contract="in",
    activation=None,
    bias=False,
    row_scale=False,
    dtype=jnp.float32,
):
    """A problem whose rows hold NaN wherever they belong to no group."""
    sizes = np.array(sizes)
    end = start + int(sizes.sum())
    num_rows = num_rows or -(-(end + 20) // 16) * 16
    group_of_row = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.full((num_rows, width_in), np.nan)
    rows[start:end] = rng.normal(size=(end - start, width_in))
    rows = jnp.array(rows, dtype)
    weights = jnp.array(rng.normal(size=(len(sizes), projections, width_out, width_in)) / width_in**0.5, dtype)
    biases = jnp.array(rng.normal(size=(len(sizes), projections, width_out)), dtype)
    scale = np.full(num_rows, np.nan, np.float32)
    scale[start:end] = rng.uniform(0.5, 1.5, end - start)

    projected = np.zeros((projections, num_rows, width_out))
    for row, group in zip(range(start, end), group_of_row, strict=True):
        projected[:, row] = np.float64(weights[group]) @ np.float64(rows[row])
        if bias:
            projected[:, row] += np.float64(biases[group])
    result = projected[0]
    if activation is not None:
        parameters = {name: getattr(activation, name) for name in ("limit", "alpha", "beta")}
        result = oracle.activate(activation.name, *projected, **parameters)
    if row_scale:
        result = np.where(np.isnan(scale)[:, None], 0, result * scale[:, None])
    operands = dict(rows=rows, contract=contract, activation=activation)
    operands["weights"] = weights if contract == "in" else weights.swapaxes(2, 3)
    operands["bias"] = biases if bias else None
    operands["row_scale"] = jnp.array(scale) if row_scale else None
    groups = Groups(jnp.array(start + np.cumsum(sizes) - sizes, jnp.int32), jnp.array(sizes, jnp.int32))
    return Problem(operands, groups, projected, result)


def multiply(problem, *, dma="on_wait", tiles=TILES, device="v5e", zero_outside=True, **options):
    """The kernel's result and projections, without the padding of columns."""
    width_out = problem.result.shape[1]
    options = dict(output_dtype=jnp.float32) | options
    with interpreting_tpu(device, dma=dma) as interpretation:
        num_rows = problem.operands["rows"].shape[0]
        table = VisitTable.of(problem.groups, num_rows, tiles.rows, zero_outside=zero_outside)
        result, projected = rows_kernel.multiply_rows(
            **problem.operands, table=table, tiles=tiles, device=TPU_DEVICES[device], **options
        )
        jax.block_until_ready(result)
    assert interpretation.num_kernels == 1
    return result[:, :width_out], None if projected is None else projected[:, :, :width_out]


def assert_close(result, expected, dtype=jnp.float32):
    scale = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(
        np.asarray(result, np.float64), expected, rtol=0, atol=ROUNDED_ONCE[jnp.dtype(dtype).name] * scale
    )


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


@pytest.mark.parametrize(
    ("contract", "columns", "panel"),
    [("in", 1280, 512), ("out", 1280, 512), ("in", 1408, 512), ("out", 1024, 512), ("in", 1536, 512)],
)
def test_tiles_of_many_columns_are_multiplied_panel_by_panel(contract, columns, panel, rng, monkeypatch):
    """Panels of two strips of 256 columns, and what is left: one strip, a strip and a half, nothing."""
    options = dict(projections=2, activation=Activation("silu"), bias=True) if contract == "in" else {}
    problem = draw(rng, (130, 0, 17), width_in=16, width_out=columns - 30, contract=contract, row_scale=True, **options)
    projections = options.get("projections", 1)
    monkeypatch.setattr(limits, "MOST_PANEL_ELEMENTS", projections * 16 * 512)
    assert limits.panel_columns(columns, projections, 16) == panel
    tiles = dataclasses.replace(TILES, columns=columns)
    result, _ = multiply(problem, tiles=tiles)
    assert_close(result, problem.result)


@pytest.mark.parametrize(
    ("columns", "projections", "depth", "panel"),
    [(1536, 2, 2048, 768), (2048, 1, 2048, 2048), (4096, 1, 7168, 512), (5760, 1, 4096, 1024), (384, 2, 28672, 256)],
)
def test_panels_are_equal_where_a_few_more_of_them_make_them_so(columns, projections, depth, panel):
    assert limits.panel_columns(columns, projections, depth) == panel


@pytest.mark.parametrize("device", TPU_DEVICES)
@pytest.mark.parametrize("contract", ["in", "out"])
def test_long_rows_are_multiplied_in_pieces_and_by_several_strips(contract, device, rng):
    """Pieces of 512 and 256 columns with one that is narrower on v5e and v5p, a strip of 512 columns on 7x, else of 256."""
    options = dict(projections=2, activation=Activation("silu"), bias=True) if contract == "in" else {}
    sizes_of = dict(width_in=600, width_out=500, contract=contract, row_scale=True, dtype=jnp.bfloat16)
    problem = draw(rng, (130, 0, 17), **sizes_of, **options)
    tiles = dataclasses.replace(TILES, columns=512)
    assert_close(multiply(problem, tiles=tiles, device=device)[0], problem.result)


@pytest.mark.parametrize(
    ("device", "size", "depth_at_once"),
    [
        ("v5e", 16, 2048),
        ("v5e", 64, 512),
        ("v5p", 64, 512),
        ("v5p", 96, 256),
        ("v5p", 128, 256),
        ("v5p", 192, 256),
        ("v6e", 64, 7168),
        ("7x", 512, 7168),
    ],
)
def test_pieces_fill_the_matrix_units_where_a_strip_is_wider_than_one(device, size, depth_at_once):
    assert limits.contracted_at_once(size, 7168, 2, TPU_DEVICES[device]) == depth_at_once
    assert limits.contracted_at_once(size, 7168, 4, TPU_DEVICES[device]) == 7168


@pytest.mark.parametrize(
    ("device", "panel", "projections", "strip"),
    [
        ("7x", 512, 1, 512),
        ("7x", 384, 1, 384),
        ("7x", 512, 2, 256),
        ("7x", 256, 2, 256),
        ("7x", 1024, 1, 256),
        ("v6e", 512, 1, 256),
        ("v5p", 512, 1, 256),
        ("v5e", 128, 1, 128),
    ],
)
def test_a_panel_of_two_strips_is_one_where_matrix_units_multiply_by_a_strip_each(device, panel, projections, strip):
    assert limits.strip_columns(panel, projections, TPU_DEVICES[device]) == strip


def equations_within(value):
    """All equations of a program, those of loops and branches too."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from equations_within(each)
    elif isinstance(value, (Jaxpr, ClosedJaxpr)):
        for equation in value.eqns:
            yield equation
            yield from equations_within(list(equation.params.values()))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("device", TPU_DEVICES)
def test_each_product_of_a_panel_reads_its_rows_anew_where_a_tile_is_half_a_register(device, dtype, rng):
    """Each of four products reads another scalar, for 64, 128 and 192 rows: the compiler cannot know that rows are the same."""
    options = dict(projections=2, activation=Activation("silu"))
    problem = draw(rng, (130, 0, 17), width_in=24, width_out=500, dtype=dtype, **options)
    tiles = dataclasses.replace(TILES, columns=512)
    anew = device != "7x" and dtype == jnp.bfloat16

    def result(rows):
        table = VisitTable.of(problem.groups, rows.shape[0], tiles.rows)
        operands = problem.operands | {"rows": rows}
        return rows_kernel.multiply_rows(
            **operands, table=table, tiles=tiles, output_dtype=jnp.float32, device=TPU_DEVICES[device]
        )[0]

    equations = list(equations_within(jax.make_jaxpr(result)(problem.operands["rows"])))
    products = [equation for equation in equations if equation.primitive.name == "dot_general"]
    read = [equation.invars for equation in equations if equation.primitive.name == "get"]
    scalars = [str(index) for reference, *index in read if reference.aval.shape == (4,)]
    assert len(products) == 3 * 4
    assert len(scalars) == (3 * 4 if anew else 0)
    assert len(set(scalars)) == (4 if anew else 0)


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
    needed = limits.rows_vmem_bytes(refused, kept=False, scaled_rows=scaled_rows, **sizes)
    assert needed > vmem_limit_bytes(TPU_DEVICES[device])
    assert needed < used_mib * 2**20
    problem = RowsProblem(num_rows=16384, num_groups=8, width_out=4096, scaled_rows=scaled_rows, **sizes)
    assert choose_row_tiles(problem, TPU_DEVICES[device]).tiles != refused
