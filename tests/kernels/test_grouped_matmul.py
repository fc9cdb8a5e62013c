"""What every implementation of `grouped_matmul` must do. A later implementation joins by being listed by the op."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracles import experts as oracle

from moe_jax.kernels import explain_grouped_matmul, grouped_matmul
from moe_jax.kernels.grouped_matmul.api import IMPLEMENTATIONS as MODULES

IMPLEMENTATIONS = [module.NAME for module in MODULES]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)

GROUP_SIZES = [(1, 0, 127, 3), (129,), (0,), (0, 40, 0, 0, 0), (3, 2, 0, 1, 64, 0, 9)]


def draw(rng, num_rows, num_groups, width_in=24, width_out=33, dtype=jnp.float32):
    rows = jnp.array(rng.normal(size=(num_rows, width_in)), dtype)
    weights = jnp.array(rng.normal(size=(num_groups, width_out, width_in)), dtype)
    return rows, weights


def assert_close(result, expected, rtol=2e-5):
    expected = np.asarray(expected, np.float64)
    scale = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=0, atol=rtol * scale + 1e-30)


@functools.partial(jax.jit, static_argnames=("implementation", "preferred_element_type"))
def multiply(rows, weights, group_sizes, **kwargs):
    return grouped_matmul(rows, weights, group_sizes, **kwargs)


@each_implementation
@pytest.mark.parametrize("group_sizes", GROUP_SIZES, ids=str)
def test_each_row_is_multiplied_by_the_matrix_of_its_group(implementation, group_sizes, rng):
    rows, weights = draw(rng, sum(group_sizes), len(group_sizes))
    result = multiply(rows, weights, jnp.array(group_sizes), implementation=implementation)
    assert_close(result, oracle.grouped_matmul(rows, weights, group_sizes))


@each_implementation
@pytest.mark.parametrize("group_sizes", [(1, 0, 127, 3), (0,)], ids=str)
def test_rows_outside_every_group_do_not_leak_into_the_result(implementation, group_sizes, rng):
    used = sum(group_sizes)
    rows, weights = draw(rng, used + 5, len(group_sizes))
    rows = rows.at[used:].set(jnp.nan)
    result = multiply(rows, weights, jnp.array(group_sizes), implementation=implementation)
    assert_close(result[:used], oracle.grouped_matmul(rows[:used], weights, group_sizes))
    np.testing.assert_array_equal(result[used:], 0)


@each_implementation
def test_rows_outside_every_group_do_not_leak_into_gradients(implementation, rng):
    group_sizes, used = jnp.array([4, 0, 9]), 13
    rows, weights = draw(rng, used + 6, 3)
    bias = jnp.array(rng.normal(size=(3, 33)), jnp.float32)

    def pullback(rows):
        call = functools.partial(grouped_matmul, group_sizes=group_sizes, implementation=implementation)
        _, vjp = jax.vjp(lambda rows, weights, bias: call(rows, weights, bias=bias), rows, weights, bias)
        return vjp

    cotangent = jnp.array(rng.normal(size=(used + 6, 33)), jnp.float32)
    clean = pullback(rows)(cotangent)
    poisoned = pullback(rows.at[used:].set(jnp.nan))(cotangent.at[used:].set(jnp.nan))
    np.testing.assert_array_equal(poisoned[0][used:], 0)
    for actual, expected in zip(poisoned, clean, strict=True):
        assert_close(actual, expected)


@each_implementation
def test_gradients_are_those_of_the_definition(implementation, rng):
    group_sizes = (3, 0, 41, 1, 8)
    rows, weights = draw(rng, sum(group_sizes), len(group_sizes))
    bias = jnp.array(rng.normal(size=weights.shape[:2]), jnp.float32)
    cotangent = rng.normal(size=(len(rows), weights.shape[1]))

    def loss(rows, weights, bias):
        result = grouped_matmul(rows, weights, jnp.array(group_sizes), bias=bias, implementation=implementation)
        return jnp.sum(result * jnp.array(cotangent, jnp.float32))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(rows, weights, bias)
    group = np.repeat(np.arange(len(group_sizes)), group_sizes)
    rows64, weights64 = np.float64(rows), np.float64(weights)
    assert_close(gradients[0], np.einsum("mn,mnd->md", cotangent, weights64[group]))
    member = np.eye(len(group_sizes))[group]
    assert_close(gradients[1], np.einsum("mg,mn,md->gnd", member, cotangent, rows64))
    assert_close(gradients[2], np.einsum("mg,mn->gn", member, cotangent))


@each_implementation
def test_bias_is_added_to_the_rows_of_its_group_only(implementation, rng):
    group_sizes = (2, 0, 11)
    rows, weights = draw(rng, 16, 3)
    bias = jnp.array(rng.normal(size=(3, 33)), jnp.float32)
    result = multiply(rows, weights, jnp.array(group_sizes), bias=bias, implementation=implementation)
    assert_close(result, oracle.grouped_matmul(rows, weights, group_sizes, bias=bias))
    np.testing.assert_array_equal(result[13:], 0)


@each_implementation
def test_results_of_devices_that_hold_parts_of_the_groups_add_up(implementation, rng):
    group_sizes = (6, 0, 17, 3, 9)
    rows, weights = draw(rng, sum(group_sizes) + 2, len(group_sizes))
    rows = rows.at[-2:].set(jnp.nan)
    whole = 0
    for first, last in [(0, 2), (2, 4), (4, 5)]:
        part = multiply(
            rows, weights[first:last], jnp.array(group_sizes), group_offset=first, implementation=implementation
        )
        assert_close(part, oracle.grouped_matmul(rows, weights[first:last], group_sizes, group_offset=first))
        whole += part
    assert_close(whole, oracle.grouped_matmul(rows, weights, group_sizes))


@each_implementation
@pytest.mark.parametrize("shape", [(0, 24, 33), (5, 24, 1), (5, 1, 33), (1, 1, 1)], ids=str)
def test_extreme_sizes(implementation, shape, rng):
    num_rows, width_in, width_out = shape
    rows, weights = draw(rng, num_rows, 3, width_in, width_out)
    sizes = (num_rows // 2, 0, num_rows - num_rows // 2)
    result = multiply(rows, weights, jnp.array(sizes), implementation=implementation)
    assert result.shape == (num_rows, width_out)
    assert_close(result, oracle.grouped_matmul(rows, weights, sizes))


@each_implementation
def test_bfloat16_accumulates_in_float32(implementation, rng):
    rows, weights = draw(rng, 40, 2, 700, 33, jnp.bfloat16)
    sizes = (13, 27)
    exact = oracle.grouped_matmul(rows.astype(jnp.float32), weights.astype(jnp.float32), sizes)
    rounded = multiply(rows, weights, jnp.array(sizes), implementation=implementation)
    assert rounded.dtype == jnp.bfloat16
    assert_close(rounded, exact, rtol=2**-8)
    wide = multiply(rows, weights, jnp.array(sizes), preferred_element_type=jnp.float32, implementation=implementation)
    assert wide.dtype == jnp.float32
    assert_close(wide, exact, rtol=2e-5)


@each_implementation
def test_vmap_is_the_same_as_a_loop(implementation, rng):
    stacked = [draw(rng, 20, 3) for _ in range(4)]
    rows, weights = (jnp.stack(parts) for parts in zip(*stacked, strict=True))
    sizes = jnp.array([[20, 0, 0], [0, 0, 0], [7, 6, 7], [1, 2, 3]])
    call = functools.partial(grouped_matmul, implementation=implementation)
    result = jax.jit(jax.vmap(call))(rows, weights, sizes)
    for index in range(4):
        assert_close(result[index], oracle.grouped_matmul(rows[index], weights[index], np.array(sizes[index])))


@each_implementation
@pytest.mark.parametrize("check_vma", [True, False])
def test_runs_inside_shard_map(implementation, check_vma, rng):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, weights = draw(rng, 24, 3)
    sizes = np.array([[5, 0, 7], [0, 12, 0]])

    def loss(rows, weights, sizes):
        return jnp.sum(grouped_matmul(rows, weights, sizes, implementation=implementation) ** 2)

    def local(rows, weights, sizes):
        return jax.lax.psum(loss(rows, weights, sizes[0]), "data")

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P(), check_vma=check_vma)
    value, gradient = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1)))(rows, weights, jnp.array(sizes))
    halves = [
        jax.value_and_grad(loss, argnums=(0, 1))(rows[12 * i : 12 * i + 12], weights, jnp.array(sizes[i]))
        for i in (0, 1)
    ]
    assert_close(value, halves[0][0] + halves[1][0])
    assert_close(gradient[0], jnp.concatenate([halves[0][1][0], halves[1][1][0]]))
    assert_close(gradient[1], halves[0][1][1] + halves[1][1][1])


ROWS, WEIGHTS, SIZES = jnp.ones((6, 4)), jnp.ones((3, 5, 4)), jnp.array([1, 2, 3])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"rows must be \[M, D\], got shape \(4,\)", {"rows": ROWS[0]}),
        (ValueError, r"weights must be \[G, N, D\]", {"weights": WEIGHTS[0]}),
        (ValueError, "at least one group", {"weights": WEIGHTS[:0]}),
        (ValueError, "must share D", {"rows": ROWS[:, :3]}),
        (ValueError, "at least the 3 groups", {"group_sizes": SIZES[:2]}),
        (ValueError, r"bias must be \[G, N\] = \(3, 5\), got shape \(5,\)", {"bias": jnp.ones(5)}),
        (ValueError, r"group_offset must be in \[0, 0\].*got 1", {"group_offset": 1}),
        (TypeError, "rows must be floating, got int32", {"rows": jnp.ones((6, 4), jnp.int32)}),
        (TypeError, "one dtype, got float32 and bfloat16", {"weights": WEIGHTS.astype(jnp.bfloat16)}),
        (TypeError, "group_sizes must be integer, got float32", {"group_sizes": SIZES.astype(jnp.float32)}),
        (TypeError, "preferred_element_type must be floating", {"preferred_element_type": jnp.int32}),
        (ValueError, "unknown implementation 'cuda'.*xla, reference", {"implementation": "cuda"}),
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
    assert [name for name, _ in choice.rejected] == [name for name in IMPLEMENTATIONS if name != "xla"]
    assert all(reason for _, reason in choice.rejected)
    assert str(choice).startswith("grouped_matmul: xla")
