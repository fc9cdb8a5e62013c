"""What every implementation of `grouped_matmul` must do. A later implementation joins by being listed by the op."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracles import expert_gradients
from oracles import experts as oracle
from support.implementations import UNDER_TEST, assert_close, each_implementation_with
from support.implementations import each_implementation as each_implementation_of
from support.rounding import ROUNDED_ONCE

from moe_jax.kernels import explain_grouped_matmul, grouped_matmul
from moe_jax.kernels.device import GPU_DEVICES, targeting
from moe_jax.kernels.grouped_matmul.api import IMPLEMENTATIONS as MODULES

each_implementation = each_implementation_of(MODULES)
each_implementation_sampled = each_implementation_of(MODULES, sampled=True)

ACCUMULATION = 1e-5
"""Largest error of a product that was accumulated in float32 and not rounded, relative to the largest value."""


def draw(rng, implementation, num_rows, num_groups, width_in=24, width_out=33, dtype=None):
    """Rows and weights of the nearest widths that the implementation takes, in its dtype."""
    width_in, width_out = implementation.width(width_in), implementation.width(width_out)
    rows = jnp.array(rng.normal(size=(num_rows, width_in)), dtype or implementation.dtype)
    weights = jnp.array(rng.normal(size=(num_groups, width_out, width_in)), dtype or implementation.dtype)
    return rows, weights


def draw_bias(rng, weights):
    return jnp.array(rng.normal(size=weights.shape[:2]), jnp.float32)


@functools.partial(jax.jit, static_argnames=("implementation", "preferred_element_type"))
def _multiply(rows, weights, group_sizes, **kwargs):
    return grouped_matmul(rows, weights, group_sizes, **kwargs)


def multiply(implementation, rows, weights, group_sizes, **kwargs):
    with implementation.running():
        return _multiply(rows, weights, jnp.array(group_sizes), implementation=implementation.name, **kwargs)


def gradients_of(implementation, rows, weights, bias, group_sizes, cotangent, **kwargs):
    """Gradients with respect to rows, weights and bias of sum(result * cotangent)."""

    def loss(rows, weights, bias):
        result = grouped_matmul(
            rows, weights, jnp.array(group_sizes), bias=bias, implementation=implementation.name, **kwargs
        )
        return jnp.vdot(result, cotangent.astype(result.dtype), preferred_element_type=jnp.float32)

    with implementation.running():
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(rows, weights, bias)


@each_implementation
@pytest.mark.parametrize(
    "group_sizes", [(1, 0, 127, 3), (129,), (0,), (0, 40, 0, 0, 0), (3, 2, 0, 1, 64, 0, 9)], ids=str
)
def test_each_row_is_multiplied_by_the_matrix_of_its_group(implementation, group_sizes, rng):
    rows, weights = draw(rng, implementation, sum(group_sizes), len(group_sizes))
    result = multiply(implementation, rows, weights, group_sizes)
    assert result.dtype == rows.dtype
    assert_close(result, oracle.grouped_matmul(rows, weights, group_sizes), implementation.rounding)


def test_replicated_arrays_need_not_vary_where_the_offset_of_groups_does(rng):
    rows, weights = draw(rng, UNDER_TEST["xla"], 60, 2)
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(rows, weights, sizes):
        offset = jax.lax.axis_index("expert") * 2
        result = grouped_matmul(rows, weights, sizes, group_offset=offset, implementation="xla")
        return jax.lax.psum(result, "expert")

    result = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P()))(
        rows, weights, jnp.array([20, 3, 7, 30])
    )
    # Both devices hold the same two matrices, as those of the first and of the last two groups.
    assert_close(result, oracle.grouped_matmul(rows, jnp.concatenate([weights] * 2), (20, 3, 7, 30)), 1e-5)


def test_numpy_arrays_are_multiplied_like_those_of_jax_without_jit(rng):
    rows, weights = (np.asarray(array) for array in draw(rng, UNDER_TEST["xla"], 60, 4))
    result = grouped_matmul(rows, weights, np.array([40, 0, 3, 17]), implementation="xla")
    assert_close(result, oracle.grouped_matmul(rows, weights, (40, 0, 3, 17)), 1e-5)


@each_implementation_with(
    MODULES, "group_sizes", [(1, 0, 127, 3), (0, 9, 1), (0,)], sampled=[(1, 0, 127, 3), (0, 9, 1)]
)
def test_rows_outside_every_group_do_not_leak_into_the_result(implementation, group_sizes, rng):
    used = sum(group_sizes)
    rows, weights = draw(rng, implementation, used + 5, len(group_sizes))
    rows = rows.at[used:].set(jnp.nan)
    result = multiply(implementation, rows, weights, group_sizes)
    expected = oracle.grouped_matmul(rows[:used], weights, group_sizes)
    assert_close(result[:used], expected, implementation.rounding)
    np.testing.assert_array_equal(result[used:], 0)


@each_implementation_sampled
def test_rows_outside_every_group_do_not_leak_into_gradients(implementation, rng):
    group_sizes, used = (4, 0, 9), 13
    rows, weights = draw(rng, implementation, used + 6, 3)
    bias = draw_bias(rng, weights)
    cotangent = jnp.array(rng.normal(size=(used + 6, weights.shape[1])), implementation.dtype)
    expected = expert_gradients.grouped_matmul(rows, weights, group_sizes, cotangent)
    rows, cotangent = rows.at[used:].set(jnp.nan), cotangent.at[used:].set(jnp.nan)

    def pullback(rows, weights, bias, cotangent):
        call = functools.partial(grouped_matmul, group_sizes=jnp.array(group_sizes), implementation=implementation.name)
        return jax.vjp(lambda rows, weights, bias: call(rows, weights, bias=bias), rows, weights, bias)[1](cotangent)

    with implementation.running():
        gradients = jax.jit(pullback)(rows, weights, bias, cotangent)
    np.testing.assert_array_equal(gradients[0][used:], 0)
    for actual, exact in zip(gradients, expected, strict=True):
        assert_close(actual, exact, implementation.rounding)


@each_implementation
def test_gradients_are_those_of_the_definition(implementation, rng):
    group_sizes = (3, 0, 91, 1, 8)
    rows, weights = draw(rng, implementation, sum(group_sizes), len(group_sizes))
    bias = draw_bias(rng, weights)
    cotangent = jnp.array(rng.normal(size=(len(rows), weights.shape[1])), implementation.dtype)
    gradients = gradients_of(implementation, rows, weights, bias, group_sizes, cotangent)
    expected = expert_gradients.grouped_matmul(rows, weights, group_sizes, cotangent)
    for actual, exact, argument in zip(gradients, expected, (rows, weights, bias), strict=True):
        assert actual.dtype == argument.dtype
        assert_close(actual, exact, implementation.rounding)


@each_implementation
@pytest.mark.parametrize("group_sizes", [(2, 0, 11), (70, 0, 33)], ids=str)
def test_bias_is_added_to_the_rows_of_its_group_only(implementation, group_sizes, rng):
    used = sum(group_sizes)
    rows, weights = draw(rng, implementation, used + 3, 3)
    bias = draw_bias(rng, weights)
    result = multiply(implementation, rows, weights, group_sizes, bias=bias)
    assert_close(result, oracle.grouped_matmul(rows, weights, group_sizes, bias=bias), implementation.rounding)
    np.testing.assert_array_equal(result[used:], 0)


@pytest.mark.parametrize(("offset", "nearest"), [(-1, 0), (-7, 0), (2, 1), (7, 1)])
def test_of_offsets_that_there_are_not_the_nearest_is_taken(offset, nearest, rng):
    rows, weights = jnp.asarray(rng.normal(size=(9, 4))), jnp.asarray(rng.normal(size=(2, 5, 4)))
    sizes = (2, 3, 4)
    result = grouped_matmul(rows, weights, jnp.array(sizes), group_offset=jnp.int32(offset))
    assert_close(result, oracle.grouped_matmul(rows, weights, sizes, group_offset=nearest), 1e-5)


@each_implementation
@pytest.mark.parametrize("group_sizes", [(6, 0, 17, 3, 9), (6, 0, 97, 3, 9)], ids=str)
def test_results_of_devices_that_hold_parts_of_the_groups_add_up(implementation, group_sizes, rng):
    rows, weights = draw(rng, implementation, sum(group_sizes) + 2, len(group_sizes))
    rows = rows.at[-2:].set(jnp.nan)
    whole = 0
    for first, last in [(0, 2), (2, 4), (4, 5)]:
        part = multiply(implementation, rows, weights[first:last], group_sizes, group_offset=jnp.int32(first))
        expected = oracle.grouped_matmul(rows, weights[first:last], group_sizes, group_offset=first)
        assert_close(part, expected, implementation.rounding)
        whole += part
    assert_close(whole, oracle.grouped_matmul(rows, weights, group_sizes), implementation.rounding)


@each_implementation
def test_gradients_of_a_part_of_the_groups_are_zero_for_rows_of_others(implementation, rng):
    group_sizes, first = (7, 21, 3, 10), 1
    rows, weights = draw(rng, implementation, sum(group_sizes) + 4, 2)
    bias = draw_bias(rng, weights)
    cotangent = jnp.array(rng.normal(size=(len(rows), weights.shape[1])), implementation.dtype)
    expected = expert_gradients.grouped_matmul(rows, weights, group_sizes, cotangent, group_offset=first)
    gradients = gradients_of(implementation, rows, weights, bias, group_sizes, cotangent, group_offset=first)
    for actual, exact in zip(gradients, expected, strict=True):
        assert_close(actual, exact, implementation.rounding)
    np.testing.assert_array_equal(gradients[0][:7], 0)
    np.testing.assert_array_equal(gradients[0][31:], 0)


@each_implementation
@pytest.mark.parametrize("shape", [(0, 24, 33), (5, 24, 1), (5, 1, 33), (1, 1, 1)], ids=str)
def test_extreme_sizes(implementation, shape, rng):
    num_rows, width_in, width_out = shape
    rows, weights = draw(rng, implementation, num_rows, 3, width_in, width_out)
    sizes = (num_rows // 2, 0, num_rows - num_rows // 2)
    result = multiply(implementation, rows, weights, sizes)
    assert result.shape == (num_rows, weights.shape[1])
    assert_close(result, oracle.grouped_matmul(rows, weights, sizes), implementation.rounding)


@each_implementation_with(MODULES, "sizes", [(13, 27), (5, 9)], sampled=[(13, 27)])
def test_bfloat16_accumulates_in_float32(implementation, sizes, rng):
    rows, weights = draw(rng, implementation, sum(sizes), 2, 700, 33, jnp.bfloat16)
    exact = oracle.grouped_matmul(rows, weights, sizes)
    rounded = multiply(implementation, rows, weights, sizes)
    assert rounded.dtype == jnp.bfloat16
    assert_close(rounded, exact, ROUNDED_ONCE["bfloat16"])
    wide = multiply(implementation, rows, weights, sizes, preferred_element_type="float32")
    assert wide.dtype == jnp.float32
    assert_close(wide, exact, ACCUMULATION)


@each_implementation_sampled
def test_float32_weights_beside_bfloat16_rows_have_gradients_that_were_never_rounded(implementation, rng):
    group_sizes = (30, 0, 5)
    rows, weights = draw(rng, implementation, sum(group_sizes), 3, dtype=jnp.bfloat16)
    weights = jnp.array(rng.normal(size=weights.shape), jnp.float32)
    bias = draw_bias(rng, weights)
    cotangent = jnp.array(rng.normal(size=(len(rows), weights.shape[1])), jnp.bfloat16)
    rounded = weights.astype(jnp.bfloat16)
    gradients = gradients_of(
        implementation, rows, weights, bias, group_sizes, cotangent, preferred_element_type="float32"
    )
    expected = expert_gradients.grouped_matmul(rows, rounded, group_sizes, cotangent)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
    assert_close(gradients[0], expected[0], ROUNDED_ONCE["bfloat16"])
    assert_close(gradients[1], expected[1], ACCUMULATION)
    assert_close(gradients[2], expected[2], ACCUMULATION)


@each_implementation_with(MODULES, "group_sizes", [(40, 0, 3), (90, 0, 13)], left_out=[(90, 0, 13)])
def test_repeated_calls_give_the_same_bits(implementation, group_sizes, rng):
    rows, weights = draw(rng, implementation, sum(group_sizes), 3)
    bias = draw_bias(rng, weights)
    cotangent = jnp.array(rng.normal(size=(len(rows), weights.shape[1])), implementation.dtype)
    arguments = (implementation, rows, weights, bias, group_sizes, cotangent)
    for first, second in zip(gradients_of(*arguments), gradients_of(*arguments), strict=True):
        np.testing.assert_array_equal(first, second)
    calls = [multiply(implementation, rows, weights, group_sizes, bias=bias) for _ in range(2)]
    np.testing.assert_array_equal(*calls)


@each_implementation
def test_vmap_is_the_same_as_a_loop(implementation, rng):
    stacked = [draw(rng, implementation, 20, 3) for _ in range(4)]
    rows, weights = (jnp.stack(parts) for parts in zip(*stacked, strict=True))
    sizes = jnp.array([[20, 0, 0], [0, 0, 0], [7, 6, 7], [1, 2, 3]])
    with implementation.running():
        result = jax.jit(jax.vmap(functools.partial(grouped_matmul, implementation=implementation.name)))(
            rows, weights, sizes
        )
    for index in range(4):
        expected = oracle.grouped_matmul(rows[index], weights[index], np.array(sizes[index]))
        assert_close(result[index], expected, implementation.rounding)


SHARDED_SIZES = ((5, 0, 7), (0, 12, 0))


def sharded_loss(implementation, num_devices, check_vma):
    """Sum of the weighted results of rows that are split over devices, 12 to each."""
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(rows, weights, sizes, cotangent):
        result = grouped_matmul(rows, weights, sizes[0], implementation=implementation.name)
        return jax.lax.psum(jnp.vdot(result, cotangent, preferred_element_type=jnp.float32), "data")

    by_row = P("data")
    specs = (by_row, P(), by_row, by_row)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)


@each_implementation_with(MODULES, "check_vma", [True, False], left_out=[True])
def test_runs_inside_shard_map(implementation, check_vma, rng):
    num_devices = 2 if implementation.runs_on_meshes else 1
    rows, weights = draw(rng, implementation, 12 * num_devices, 3)
    sizes = np.array(SHARDED_SIZES[:num_devices])
    cotangent = jnp.array(rng.normal(size=(len(rows), weights.shape[1])), implementation.dtype)
    loss = sharded_loss(implementation, num_devices, check_vma)
    with implementation.running():
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(rows, weights, jnp.array(sizes), cotangent)
    shards = [slice(12 * index, 12 * index + 12) for index in range(num_devices)]
    results = [oracle.grouped_matmul(rows[at], weights, sizes[index]) for index, at in enumerate(shards)]
    exact = np.concatenate(results) * np.float64(cotangent)
    assert abs(value - exact.sum()) <= implementation.rounding * np.abs(exact).sum()
    parts = [
        expert_gradients.grouped_matmul(rows[at], weights, sizes[index], cotangent[at])
        for index, at in enumerate(shards)
    ]
    assert_close(gradients[0], np.concatenate([part[0] for part in parts]), implementation.rounding)
    assert_close(gradients[1], sum(part[1] for part in parts), 2 * implementation.rounding)


@each_implementation_sampled
@pytest.mark.parametrize("check_vma", [True, False])
def test_traces_inside_shard_map_over_several_devices(implementation, check_vma, rng):
    rows, weights = draw(rng, implementation, 24, 3)
    cotangent = jnp.ones((24, weights.shape[1]), implementation.dtype)
    loss = sharded_loss(implementation, 2, check_vma)
    with targeting(implementation.target):
        gradients = jax.eval_shape(jax.grad(loss, argnums=(0, 1)), rows, weights, jnp.array(SHARDED_SIZES), cotangent)
    assert [gradient.shape for gradient in gradients] == [rows.shape, weights.shape]


ROWS, WEIGHTS, SIZES = jnp.ones((6, 4)), jnp.ones((3, 5, 4)), jnp.array([1, 2, 3])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"rows must be \[M, D\], got shape \(4,\)", {"rows": ROWS[0]}),
        (ValueError, r"weights must be \[G, N, D\]", {"weights": WEIGHTS[0]}),
        (ValueError, r"G >= 1 and D >= 1, got shape \(0, 5, 4\)", {"weights": WEIGHTS[:0]}),
        (ValueError, r"D >= 1, got shape \(3, 5, 0\)", {"rows": ROWS[:, :0], "weights": WEIGHTS[..., :0]}),
        (ValueError, "must share D", {"rows": ROWS[:, :3]}),
        (ValueError, "at least the 3 groups", {"group_sizes": SIZES[:2]}),
        (ValueError, r"bias must be \[G, N\] = \(3, 5\), got shape \(5,\)", {"bias": jnp.ones(5)}),
        (ValueError, r"group_offset must be in \[0, 0\].*got 1", {"group_offset": 1}),
        (TypeError, "group_offset must be one integer, got 0.7", {"group_offset": 0.7}),
        (TypeError, "group_offset must be one integer, got False", {"group_offset": False}),
        (TypeError, r"group_offset must be one integer, got float32 of shape \(\)", {"group_offset": jnp.float32(0)}),
        (TypeError, r"group_offset must be one integer, got bool of shape \(\)", {"group_offset": np.bool_(0)}),
        (
            TypeError,
            r"group_offset must be one integer, got int32 of shape \(1,\)",
            {"group_offset": jnp.zeros(1, int)},
        ),
        (TypeError, "rows must be floating, got int32", {"rows": jnp.ones((6, 4), jnp.int32)}),
        (
            TypeError,
            r"weights must have the dtype of rows, float32, got bfloat16",
            {"weights": WEIGHTS.astype(jnp.bfloat16)},
        ),
        (
            TypeError,
            r"weights must have the dtype of rows, bfloat16, or float32.*got float16",
            {"rows": ROWS.astype(jnp.bfloat16), "weights": WEIGHTS.astype(jnp.float16)},
        ),
        (TypeError, "group_sizes must be integer, got float32", {"group_sizes": SIZES.astype(jnp.float32)}),
        (TypeError, "preferred_element_type must be floating", {"preferred_element_type": jnp.int32}),
        (
            ValueError,
            "unknown implementation 'cuda'.*pallas_gpu, pallas_tpu, xla, reference",
            {"implementation": "cuda"},
        ),
    ],
)
def test_invalid_arguments_are_refused(error, message, arguments):
    arguments = {"rows": ROWS, "weights": WEIGHTS, "group_sizes": SIZES, **arguments}
    for function in (grouped_matmul, explain_grouped_matmul):
        with pytest.raises(error, match=message):
            function(**arguments)


def test_explain_names_implementation_formulation_and_reasons_from_shapes_alone():
    choice = explain_grouped_matmul(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (ROWS, WEIGHTS, SIZES)))
    assert choice.implementation == "xla"
    assert "rows" in choice.formulation
    assert "2 per group" in choice.reason
    assert [name for name, _ in choice.rejected] == [module.NAME for module in MODULES if module.NAME != "xla"]
    assert all(reason for _, reason in choice.rejected)
    assert str(choice).startswith("grouped_matmul: xla")


def explain_on(device, num_rows, *, width_in=768, width_out=2048, dtype=jnp.bfloat16, groups=16, **kwargs):
    """What `explain_grouped_matmul` says on a GPU of that name, or on the machine at hand if the name is None."""
    shape = jax.ShapeDtypeStruct
    arguments = (
        shape((num_rows, width_in), dtype),
        shape((groups, width_out, width_in), dtype),
        shape((groups,), jnp.int32),
    )
    if device is None:
        return explain_grouped_matmul(*arguments, **kwargs)
    with targeting(GPU_DEVICES[device]):
        return explain_grouped_matmul(*arguments, **kwargs)


UNSUPPORTED = [
    (None, {}, "compute capability 9.0 .Hopper. or 10.x .Blackwell., the platform is 'cpu'"),
    ("a100", {}, "Hopper.*Blackwell.*a100 has 8.0"),
    ("h200", dict(dtype=jnp.float32), "operands must be bfloat16 or float16.*got float32"),
    ("h200", dict(width_in=776), "D must be a multiple of 16.*got 776"),
    ("h200", dict(width_out=2056), "N must be a multiple of 16.*got 2056"),
    ("h200", dict(preferred_element_type=jnp.float64), "result must be float32, bfloat16 or float16, got float64"),
]


@pytest.mark.parametrize(("device", "arguments", "limit"), UNSUPPORTED)
def test_kernels_for_gpus_say_which_limit_was_hit(device, arguments, limit):
    with pytest.raises(NotImplementedError, match=limit):
        explain_on(device, 100, implementation="pallas_gpu", **arguments)


@pytest.mark.parametrize(("device", "arguments", "limit"), UNSUPPORTED)
def test_what_kernels_for_gpus_cannot_compute_is_left_to_xla_and_explained(device, arguments, limit):
    choice = explain_on(device, 100, **arguments)
    assert choice.implementation == "xla"
    assert re.search(limit, dict(choice.rejected)["pallas_gpu"])


@pytest.mark.parametrize(
    ("device", "num_rows", "formulation"),
    [
        ("h200", 16 * 16, r"^stream kernel, StreamTiles\(rows=\d+"),
        ("h200", 16 * 16 + 1, r"^rows kernel, RowTiles\(rows=64"),
        ("h100", 16 * 1000, r"^rows kernel, RowTiles\(rows=128"),
        ("b200", 16, r"^rows kernel, RowTiles\(rows=128"),
    ],
)
def test_explain_names_kernel_tiles_and_where_they_come_from(device, num_rows, formulation):
    choice = explain_on(device, num_rows)
    assert choice.implementation == "pallas_gpu"
    assert re.search(formulation, choice.formulation)
    assert f"analytic default, no tuned entry of {device} for 16 groups, 768 -> 2048, bfloat16" in choice.reason
