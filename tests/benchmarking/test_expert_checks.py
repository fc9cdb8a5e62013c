"""The GPU suite's checks: the float32 computation, and what it must not let pass."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import experts as oracle

from moe_jax.benchmarking import expert_checks
from moe_jax.benchmarking.expert_checks import (
    check_backward,
    check_forward,
    gradients_of,
    random_tokens,
    random_weights,
    relative_error,
)
from moe_jax.benchmarking.expert_contestants import contestants, in_first, sorted_block, tokamax_ragged_dot
from moe_jax.benchmarking.expert_references import float32_block, reference_programs
from moe_jax.benchmarking.expert_shapes import ExpertShape
from moe_jax.benchmarking.expert_work import draw_topk_ids
from moe_jax.kernels import Activation

SHAPE = ExpertShape(name="small", hidden_size=16, intermediate_size=24, num_experts=6, top_k=2)
RANK = dataclasses.replace(SHAPE, name="rank", ranks=2, has_bias=True, activation=Activation("swigluoai"))


def draw(rng, shape, tokens=20):
    weights = random_weights(shape, jax.random.key(int(rng.integers(2**31))))
    return weights, draw_topk_ids(rng, shape, tokens, "zipf")


@pytest.mark.parametrize("shape", [SHAPE, RANK], ids=lambda shape: shape.name)
def test_the_float32_computation_is_the_definition(shape, rng):
    weights, ids = draw(rng, shape)
    x, topk_weights = random_tokens(shape, 20, jax.random.key(1))
    activation = shape.activation
    parameters = dict(limit=7.0, alpha=1.702, beta=1.0) if activation.name == "swigluoai" else {}
    expected = oracle.fused_moe(
        x,
        topk_weights,
        np.where(ids < shape.local_experts, ids, -1),
        activate=lambda gate, up: oracle.activate(activation.name, gate, up, **parameters),
        **weights,
    )
    result = float32_block(x, topk_weights, jnp.asarray(ids), weights, shape=shape)
    assert relative_error(result, expected) < 1e-5


def right(x, topk_weights, topk_ids, weights, shape=SHAPE):
    return float32_block(x, topk_weights, topk_ids, weights, shape=shape).astype(x.dtype)


@pytest.mark.parametrize("shape", [SHAPE, RANK], ids=lambda shape: shape.name)
def test_a_right_block_passes_forward_and_backward(shape, rng):
    weights, ids = draw(rng, shape)
    block = functools.partial(right, shape=shape)
    check = check_forward(block, weights, weights, shape, ids, rng, with_traps=True)
    assert check.passed, check
    check = check_backward(jax.jit(gradients_of(block)), weights, shape, ids, rng)
    assert check.passed, check


@pytest.mark.parametrize("shape", [SHAPE, RANK], ids=lambda shape: shape.name)
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_the_float32_computations_can_be_compiled_beforehand(kind, shape, rng, monkeypatch):
    """A check that is given them compiles none of them."""
    monkeypatch.setattr(expert_checks, "jitted_references", None)
    weights, ids = draw(rng, shape)
    programs = reference_programs(kind, shape, len(ids)).items()
    references = {name: jax.jit(function).lower(*given).compile() for (name, _), (function, given) in programs}
    block = functools.partial(right, shape=shape)
    if kind == "forward":
        check = check_forward(block, weights, weights, shape, ids, rng, with_traps=True, references=references)
    else:
        check = check_backward(jax.jit(gradients_of(block)), weights, shape, ids, rng, references=references)
    assert check.passed, check


def test_contestants_compute_the_block(rng):
    weights, ids = draw(rng, RANK, 2)
    able, unable = contestants(RANK, 2)
    assert {"moe_jax xla", "jax.lax.ragged_dot"} <= {contestant.name for contestant in able}
    assert "tokamax.ragged_dot" in {*unable, *(contestant.name for contestant in able)}
    assert "moe_jax pallas_gpu" in unable
    for contestant in able:
        prepared = contestant.prepare(weights)
        call = jax.jit(contestant.block)
        check = check_forward(call, weights, prepared, RANK, ids, rng, with_traps=contestant.is_ours)
        assert check.passed, (contestant.name, check)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("raise ImportError('no absl')", "ImportError: no absl"),
        ("raise RuntimeError('flags are not parsed')", "RuntimeError: flags are not parsed"),
        ("", "AttributeError"),
    ],
)
def test_a_library_that_is_installed_but_broken_cannot_take_part(module, reason, tmp_path, monkeypatch):
    (tmp_path / "tokamax.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tokamax", raising=False)
    tokamax_ragged_dot.cache_clear()
    try:
        _, unable = contestants(SHAPE, 2)
    finally:
        tokamax_ragged_dot.cache_clear()
        sys.modules.pop("tokamax", None)
    assert reason in unable["tokamax.ragged_dot"]


def test_a_block_that_is_a_little_off_fails(rng):
    weights, ids = draw(rng, SHAPE)

    def off(*arguments):
        return right(*arguments) * 1.02

    assert not check_forward(off, weights, weights, SHAPE, ids, rng, with_traps=True).passed
    assert not check_backward(jax.jit(gradients_of(off)), weights, SHAPE, ids, rng).passed


def test_a_block_that_reads_the_rows_of_tokens_without_expert_fails(rng):
    weights, ids = draw(rng, SHAPE)

    def leaking(x, *arguments):
        return right(x, *arguments) + 0 * x

    assert check_forward(leaking, weights, weights, SHAPE, ids, rng, with_traps=False).passed
    assert check_forward(leaking, weights, weights, SHAPE, ids, rng, with_traps=True).error == float("inf")


def test_a_block_that_differs_from_call_to_call_fails(rng):
    weights, ids = draw(rng, SHAPE)
    factors = iter([1.0, 1.0 + 2**-7])

    def moody(*arguments):
        return right(*arguments) * next(factors)

    check = check_forward(moody, weights, weights, SHAPE, ids, rng, with_traps=True)
    assert check.error <= check.tolerance
    assert not check.passed


def test_a_gradient_that_misses_one_expert_fails(rng):
    weights, ids = draw(rng, SHAPE)
    gradients = gradients_of(right)
    hot = np.bincount(ids.reshape(-1)).argmax()

    def forgetful(*arguments):
        x, topk_weights, weights = gradients(*arguments)
        return x, topk_weights, {**weights, "down_proj": weights["down_proj"].at[hot].set(0)}

    assert not check_backward(jax.jit(forgetful), weights, SHAPE, ids, rng).passed


def test_other_layouts_hold_the_same_numbers(rng):
    weights, _ = draw(rng, RANK)
    other = in_first(weights)
    np.testing.assert_array_equal(other["gate_up_proj"][1, :, 24 + 5], weights["gate_up_proj"][1, 1, 5])
    np.testing.assert_array_equal(other["down_proj"][2, 7], weights["down_proj"][2, :, 7])
    np.testing.assert_array_equal(other["gate_up_bias"][1, 24:], weights["gate_up_bias"][1, 1])


def test_sorting_around_a_ragged_dot_computes_the_block(rng):
    weights, ids = draw(rng, RANK)
    x, topk_weights = random_tokens(RANK, 20, jax.random.key(1))

    def ragged_dot(rows, matrices, group_sizes):
        """Row by row, and NaN for rows of no group."""
        group = np.repeat(np.arange(len(group_sizes)), group_sizes)
        result = np.full((rows.shape[0], matrices.shape[2]), np.nan, np.float32)
        for row, which in enumerate(group):
            result[row] = np.asarray(rows[row], np.float32) @ np.asarray(matrices[which], np.float32)
        return jnp.asarray(result, rows.dtype)

    result = sorted_block(x, topk_weights, jnp.asarray(ids), in_first(weights), shape=RANK, ragged_dot=ragged_dot)
    expected = float32_block(x, topk_weights, jnp.asarray(ids), weights, shape=RANK)
    assert relative_error(result, expected) < 1e-2


def test_relative_error_never_lets_a_nan_pass():
    assert relative_error(np.array([1.0, np.nan]), np.array([1.0, np.nan])) == float("inf")
    assert relative_error(np.array([3.0, 4.0]), np.array([0.0, 4.0])) == pytest.approx(0.75)
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
