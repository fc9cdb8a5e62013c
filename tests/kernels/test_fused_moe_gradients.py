"""What the gradients of every implementation of `fused_moe` must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.implementations import (
    BFLOAT16_GRADIENT_ERROR,
    BFLOAT16_GRADIENT_NORM_ERROR,
    UNDER_TEST,
    assert_close,
    each_implementation_with,
)
from support.implementations import each_implementation as each_implementation_of
from support.moe_blocks import Block

from moe_jax.kernels.fused_moe.api import IMPLEMENTATIONS as MODULES

each_implementation = each_implementation_of(MODULES)
each_implementation_sampled = each_implementation_of(MODULES, sampled=True)

FEW_ROWS = dict(tokens=13, experts=3, top_k=2, bias=True, hidden=72)
MANY_ROWS = dict(tokens=130, experts=4, top_k=2, intermediate=33)
ON_THE_INPUT = dict(tokens=60, top_k=1, apply_router_weight_on_input=True, bias=True)
OTHER_ACTIVATIONS = [dict(activation="swigluoai", bias=True), dict(activation="gelu", bias=True)]
BLOCKS = [
    FEW_ROWS,
    MANY_ROWS,
    dict(tokens=1, experts=8, top_k=2),
    dict(activation="relu2_no_mul", bias=True),
    *OTHER_ACTIVATIONS,
    ON_THE_INPUT,
]


def check_gradients(rng, implementation, block, **kwargs):
    """Of a block some of whose pairs have no expert."""
    block = Block.draw(rng, implementation, **block)
    ids = block.arrays["topk_ids"].at[4::7, -1].set(-1).at[5::9, 0].set(1000)
    block = block.with_arrays(topk_ids=ids)
    cotangent = block.draw_cotangent(rng)
    block.assert_gradients_right(block.gradients(cotangent, **kwargs), cotangent)


@each_implementation_with(MODULES, "block", BLOCKS, sampled=[MANY_ROWS], left_out=OTHER_ACTIVATIONS)
def test_gradients_are_those_of_the_oracle(implementation, block, rng):
    check_gradients(rng, implementation, block)


@each_implementation_with(MODULES, "block", [FEW_ROWS, MANY_ROWS, ON_THE_INPUT], left_out=[MANY_ROWS])
def test_gradients_are_the_same_if_the_activation_is_computed_again(implementation, block, rng):
    check_gradients(rng, implementation, block, recompute_activation=True)


@each_implementation_with(MODULES, "expected_rows", [1, 39], left_out=[39])
def test_gradients_are_right_however_many_rows_were_expected(implementation, expected_rows, rng):
    check_gradients(rng, implementation, dict(tokens=39, experts=2, top_k=1, bias=True), expected_rows=expected_rows)


@each_implementation
def test_gradients_of_a_device_that_holds_some_experts(implementation, rng):
    block = Block.draw(rng, implementation, tokens=21, experts=7, bias=True).held(2, 5)
    cotangent = block.draw_cotangent(rng)
    gradients = block.gradients(cotangent, expert_offset=jnp.int32(2))
    block.assert_gradients_right(gradients, cotangent, expert_offset=2)


@each_implementation_with(MODULES, "on_input", [False, True], left_out=[False])
def test_poisoned_padding_tokens_do_not_leak_into_gradients(implementation, on_input, rng):
    block = Block.draw(rng, implementation, tokens=20, bias=True, apply_router_weight_on_input=on_input)
    padding = (jnp.arange(20) >= 13) | (jnp.arange(20) == 0)
    block = block.with_arrays(topk_ids=jnp.where(padding[:, None], -1, block.arrays["topk_ids"]))
    poison = {name: jnp.where(padding[:, None], jnp.nan, block.arrays[name]) for name in ("x", "topk_weights")}
    cotangent = block.draw_cotangent(rng)
    gradients = block.with_arrays(**poison).gradients(cotangent)
    block.assert_gradients_right(gradients, cotangent)
    for name in poison:
        np.testing.assert_array_equal(gradients[name][padding], 0)


@each_implementation_with(MODULES, "tokens", [11, 60], left_out=[11])
def test_float32_weights_beside_bfloat16_tokens_have_gradients_that_were_never_rounded(implementation, tokens, rng):
    block = Block.draw(rng, implementation, tokens=tokens, experts=3, dtype="bfloat16", weights_dtype="float32")
    cotangent = block.draw_cotangent(rng)
    gradients = block.gradients(cotangent)
    names = ("gate_up_proj", "down_proj")
    rounded = block.with_arrays(**{name: block.arrays[name].astype(jnp.bfloat16) for name in names})
    expected = rounded.expected_gradients(cotangent)
    assert gradients["x"].dtype == jnp.bfloat16
    for name in names:
        assert gradients[name].dtype == jnp.float32
        assert_close(gradients[name], expected[name], BFLOAT16_GRADIENT_ERROR, BFLOAT16_GRADIENT_NORM_ERROR)
        assert np.mean(gradients[name] == gradients[name].astype(jnp.bfloat16)) < 0.1


@each_implementation
def test_rematerialisation_does_not_change_gradients(implementation, rng):
    if not implementation.runs_rematerialised:
        pytest.skip("its interpreter has side effects")
    check_gradients(rng, implementation, dict(), wrap=jax.checkpoint)


@each_implementation_sampled
def test_gradients_trace_through_rematerialisation(implementation, rng):
    block = Block.draw(rng, implementation)
    gradients = block.traced_gradients(block.draw_cotangent(rng), wrap=jax.checkpoint)
    for name, gradient in gradients.items():
        assert (gradient.shape, gradient.dtype) == (block.arrays[name].shape, block.arrays[name].dtype), name


@pytest.mark.parametrize("block", [*BLOCKS, dict(activation="swiglustep", bias=True)], ids=str)
def test_gradients_of_the_oracle_are_the_slopes_of_its_results(block, rng):
    block = Block.draw(rng, UNDER_TEST["reference"], **{**block, "tokens": min(block.get("tokens", 19), 19)})
    cotangent = rng.normal(size=block.arrays["x"].shape)
    for name, gradient in block.expected_gradients(cotangent).items():
        direction = rng.normal(size=gradient.shape)
        exact = np.asarray(block.arrays[name], np.float64)
        ends = [np.sum(block.expected(**{name: exact + step * direction}) * cotangent) for step in (1e-5, -1e-5)]
        slope = (ends[0] - ends[1]) / 2e-5
        assert abs(np.sum(gradient * direction) - slope) <= 1e-5 * np.linalg.norm(gradient) + 1e-9, name
