"""The kernel that streams weights past few rows, interpreted with race detection, against float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import experts as oracle
from support.gpu_interpretation import interpreting

from moe_jax.kernels.activations import ACTIVATIONS, Activation
from moe_jax.kernels.device import GPU_DEVICES
from moe_jax.kernels.groups import Groups
from moe_jax.kernels.mosaic_gpu.schedule import TileTable, aligned_groups, aligned_num_rows
from moe_jax.kernels.mosaic_gpu.stream_kernel import stream_weights
from moe_jax.kernels.mosaic_gpu.stream_tiles import check_stream_tiles, default_stream_tiles, shared_memory_bytes
from moe_jax.kernels.mosaic_gpu.tiles import StreamTiles

H200 = GPU_DEVICES["h200"]
SMALL = StreamTiles(rows=8, columns=64, depth=64, stages=3, splits=1)
HOT_EMPTY_AND_SMALL = (19, 0, 1, 8)
ROUNDING = {"float32": 2e-5, "bfloat16": 2**-8, "float16": 2**-10}

MODELS = {
    # experts, experts per token, hidden size, intermediate size
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "qwen3-235b-a22b": (128, 8, 4096, 1536),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "deepseek-v3": (256, 8, 7168, 2048),
    "deepseek-v3, a rank of 8": (32, 8, 7168, 2048),
    "deepseek-v3, a rank of 32": (8, 8, 7168, 2048),
    "gpt-oss-20b": (32, 4, 2880, 2880),
    "gpt-oss-120b": (128, 4, 2880, 2880),
    "olmoe": (64, 8, 2048, 1024),
}
TOKENS = (1, 8, 32, 128)


def defaults_of_models():
    """Every choice of tiles for decoding one of the models, as (projections, tiles)."""
    chosen = {}
    for experts, top_k, hidden, intermediate in MODELS.values():
        for tokens in TOKENS:
            for projections, width_in, width_out in ((2, hidden, intermediate), (1, intermediate, hidden)):
                tiles = default_stream_tiles(tokens * top_k, experts, width_in, width_out, projections, 2, H200)
                chosen[projections, tiles] = None
    return sorted(chosen, key=str)


def named(choice):
    projections, tiles = choice
    return (
        f"{projections}x{tiles.columns}x{tiles.depth}, {tiles.rows} rows, {tiles.stages} stages, {tiles.splits} splits"
    )


@dataclasses.dataclass(frozen=True)
class Problem:
    """Random operands, and the float64 result that the rows of groups must have."""

    operands: dict
    groups: Groups
    result: np.ndarray
    """[M, N], zero in rows of no group."""
    member: np.ndarray
    """Whether a row belongs to a group."""


def draw(
    rng,
    sizes=HOT_EMPTY_AND_SMALL,
    *,
    starts=None,
    num_rows=None,
    width_in=192,
    width_out=80,
    projections=2,
    activation=None,
    bias=False,
    row_scale=False,
    dtype="bfloat16",
    other_rows=np.nan,
):
    """A problem whose rows hold `other_rows` wherever they belong to no group."""
    sizes = jnp.array(sizes, jnp.int32)
    groups = aligned_groups(sizes) if starts is None else Groups(jnp.array(starts, jnp.int32), sizes)
    num_rows = num_rows or aligned_num_rows(int(sizes.sum()), len(sizes))
    group_of_row = np.full(num_rows, -1)
    for group, (start, size) in enumerate(zip(groups.starts, groups.sizes, strict=True)):
        group_of_row[start : start + size] = group
    member = group_of_row >= 0

    rows = np.where(member[:, None], rng.normal(size=(num_rows, width_in)), other_rows)
    rows = jnp.array(rows, dtype)
    shape = (len(sizes), projections, width_out)
    weights = jnp.array(rng.normal(size=(*shape, width_in)) / width_in**0.5, dtype)
    biases = jnp.array(rng.normal(size=shape), dtype)
    scale = jnp.array(np.where(member, rng.uniform(0.5, 1.5, num_rows), np.nan), jnp.float32)

    of_row = group_of_row[member]
    projected = np.einsum(
        "md,mpnd->mpn", np.asarray(rows, np.float64)[member], np.asarray(weights, np.float64)[of_row], optimize=True
    )
    if bias:
        projected += np.asarray(biases, np.float64)[of_row]
    result = np.zeros((num_rows, width_out))
    result[member] = projected[:, 0]
    if activation is not None:
        parameters = {name: getattr(activation, name) for name in ("limit", "alpha", "beta")}
        result[member] = oracle.activate(activation.name, *np.moveaxis(projected, 1, 0), **parameters)
    if row_scale:
        result[member] *= np.asarray(scale, np.float64)[member, None]

    operands = dict(rows=rows, weights=weights.reshape(-1, width_out, width_in), projections=projections)
    operands["activation"] = activation
    operands["bias"] = biases.reshape(-1, width_out) if bias else None
    operands["row_scale"] = scale if row_scale else None
    return Problem(operands, groups, result, member)


def stream(problem, tiles=SMALL, *, blocks=2, output_dtype="float32"):
    """The kernel's result on a device of so few multiprocessors that each block computes several units."""
    table = TileTable.of(problem.groups, problem.operands["rows"].shape[0], tiles.rows, "aligned")
    device = dataclasses.replace(H200, multiprocessors=blocks)
    with interpreting(blocks):
        return stream_weights(**problem.operands, table=table, tiles=tiles, output_dtype=output_dtype, device=device)


def assert_rows_of_groups_are_right(problem, result):
    bound = ROUNDING[str(result.dtype)]
    got, expected = np.asarray(result, np.float64)[problem.member], problem.result[problem.member]
    np.testing.assert_allclose(got, expected, rtol=bound, atol=bound * np.abs(expected).max(initial=0))


def three_steps(tiles):
    """A width in that takes three steps, of which the last reaches beyond it if that is possible."""
    return 2 * tiles.depth + 64


@pytest.mark.parametrize("choice", defaults_of_models(), ids=named)
def test_every_default_computes_exactly_the_rows_of_groups(choice, rng):
    projections, tiles = choice
    sizes = (tiles.rows + 3, 0)
    gated = dict(activation=Activation("silu")) if projections == 2 else dict(row_scale=True)
    problem = draw(
        rng, sizes, width_in=three_steps(tiles), width_out=tiles.columns + 16, projections=projections, **gated
    )
    result = stream(problem, tiles, output_dtype="bfloat16")
    assert result.dtype == jnp.bfloat16
    assert_rows_of_groups_are_right(problem, result)


@pytest.mark.parametrize("splits", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_bias_activation_and_scale_are_applied_once_however_the_contraction_is_split(splits, rng):
    tiles = dataclasses.replace(SMALL, splits=splits)
    problem = draw(rng, (11, 0, 1), width_in=192, activation=Activation("swigluoai"), bias=True, row_scale=True)
    assert_rows_of_groups_are_right(problem, stream(problem, tiles, blocks=3))


@pytest.mark.parametrize("rows", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_split_contractions_of_wider_tiles_have_parts_of_their_own(rows, rng):
    tiles = StreamTiles(rows=rows, columns=128, depth=64, stages=2, splits=2)
    problem = draw(rng, (rows + 1, 3), width_out=136, projections=1, bias=True, dtype="float16")
    assert_rows_of_groups_are_right(problem, stream(problem, tiles, output_dtype="float16"))


@pytest.mark.parametrize("splits", [1, 2])
def test_rows_of_no_tile_are_not_written(splits, rng):
    problem = draw(rng, (5, 9), starts=(0, 32), num_rows=64, projections=1, other_rows=1.0)
    tiles = dataclasses.replace(SMALL, rows=32, splits=splits)
    result = stream(problem, tiles)
    assert_rows_of_groups_are_right(problem, result)
    # Memory that nothing wrote reads as NaN. Each tile reaches across these rows.
    assert np.isnan(result[8:32]).all()
    assert np.isnan(result[48:]).all()


@pytest.mark.parametrize("width_in", [48, 96, 16])
def test_widths_that_allow_no_wide_swizzle_and_widths_below_a_step_are_contracted(width_in, rng):
    problem = draw(rng, (3, 0, 9), width_in=width_in, width_out=16, projections=1)
    assert_rows_of_groups_are_right(problem, stream(problem, blocks=1))


@pytest.mark.parametrize("splits", [1, 2])
def test_columns_beyond_a_result_that_is_one_copy_wide_are_not_stored(splits, rng):
    problem = draw(rng, (3, 0, 9), width_out=64, projections=1)
    tiles = dataclasses.replace(SMALL, columns=128, splits=splits)
    assert_rows_of_groups_are_right(problem, stream(problem, tiles, output_dtype="bfloat16"))


def test_no_rows_in_any_group_write_nothing(rng):
    problem = draw(rng, (0, 0), num_rows=8, projections=1)
    assert np.isnan(stream(problem)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_applied_to_projections_with_bias(name, rng):
    activation = Activation(name, limit=2.0) if name == "swigluoai_uninterleave" else Activation(name)
    problem = draw(rng, projections=2 if activation.is_gated else 1, activation=activation, bias=True)
    assert_rows_of_groups_are_right(problem, stream(problem))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "columns", "splits"),  # every pair of two of them
    [
        (rows, columns, (1, 2, 4)[(i + j) % 3])
        for i, rows in enumerate((8, 16, 32, 64))
        for j, columns in enumerate((64, 128, 256))
    ],
)
def test_tiles_of_every_size_are_computed_by_blocks_that_differ_in_their_number_of_units(rows, columns, splits, rng):
    tiles = StreamTiles(rows=rows, columns=columns, depth=64, stages=2, splits=splits)
    projections = 1 if rows * columns > 64 * 128 else 2
    activation = Activation("silu") if projections == 2 else None
    problem = draw(
        rng,
        (rows + 5, 0, 2 * rows, 1),
        width_in=336,
        width_out=columns + 8,
        projections=projections,
        activation=activation,
        bias=True,
        row_scale=True,
    )
    assert_rows_of_groups_are_right(problem, stream(problem, tiles, blocks=5))


@pytest.mark.parametrize("choice", defaults_of_models(), ids=named)
def test_defaults_keep_most_of_the_shared_memory_in_flight(choice):
    projections, tiles = choice
    in_flight = tiles.stages * projections * tiles.columns * tiles.depth * 2
    assert 120_000 < in_flight < shared_memory_bytes(tiles, projections, 2) <= H200.shared_memory_bytes


@pytest.mark.parametrize(("rows_per_group", "rows"), [(0.1, 8), (1, 8), (4, 8), (8, 16), (16, 32), (32, 64), (500, 64)])
def test_default_rows_hold_most_groups_of_a_random_routing(rows_per_group, rows):
    assert default_stream_tiles(int(256 * rows_per_group), 256, 2048, 768, 2, 2, H200).rows == rows


def test_defaults_leave_room_for_a_float32_result():
    shape = (648, 64, 32, 1760, 1, 2, H200)  # so narrow that results take more of the shared memory than the operands
    narrow, wide = default_stream_tiles(*shape), default_stream_tiles(*shape, output_itemsize=4)
    assert wide.stages < narrow.stages
    assert shared_memory_bytes(wide, 1, 2, 4) <= H200.shared_memory_bytes < shared_memory_bytes(narrow, 1, 2, 4)
    assert default_stream_tiles(*shape, output_itemsize=2) == narrow


def test_the_contraction_is_split_by_default_only_where_too_few_tiles_have_much_to_read():
    assert default_stream_tiles(1, 1, 16384, 1024, 1, 2, H200).splits > 1
    assert default_stream_tiles(1, 1, 2048, 1024, 1, 2, H200).splits == 1
    assert default_stream_tiles(512, 64, 16384, 1024, 1, 2, H200).splits == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rows=24), "rows of a tile must be 8, 16, 32 or 64, got 24"),
        (dict(columns=96), "columns of a tile must be a multiple of 64, got 96"),
        (dict(columns=512), "at most 256 columns with 128 accumulators per thread"),
        (dict(depth=96), "depth must be a multiple of 64 for a contracted dimension of 192, got 96"),
        (dict(splits=4), "splits must be 1 to 3"),
        (dict(stages=1), "at least 2 stages"),
        (dict(stages=20), "bytes of shared memory for 2 projections, h200 has 232448"),
    ],
)
def test_illegal_tiles_are_refused_with_the_limit_they_hit(change, message):
    tiles = dataclasses.replace(SMALL, **({"rows": 64} if "columns" in change else {}) | change)
    with pytest.raises(ValueError, match=message):
        check_stream_tiles(tiles, 2, 192, 2, H200)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(width_in=200), "widths must be multiples of 16 elements of 2 bytes, got 200"),
        (dict(width_out=88), "widths must be multiples of 16 elements of 2 bytes, got 88"),
        (dict(num_rows=44), "the number of rows must be a multiple of 8, got 44"),
        (dict(projections=1), "is a function of 2 projections, got 1"),
        (dict(activation=None), "activation None is a function of 1 projections, got 2"),
    ],
)
def test_operands_that_the_kernel_cannot_take_are_refused(change, message, rng):
    options = dict(num_rows=40, width_in=192, width_out=80, projections=2, activation=Activation("silu")) | change
    problem = draw(rng, **(options | dict(activation=None)))
    problem = dataclasses.replace(problem, operands=problem.operands | dict(activation=options["activation"]))
    with pytest.raises(ValueError, match=message):
        stream(problem, output_dtype="bfloat16")
