"""What every implementation of `fused_moe` must compute. A later implementation joins by being listed by the op."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.implementations import assert_close, each_implementation_with
from support.implementations import each_implementation as each_implementation_of
from support.moe_blocks import Block

from moe_jax.kernels import Activation
from moe_jax.kernels.fused_moe.api import IMPLEMENTATIONS as MODULES

each_implementation = each_implementation_of(MODULES)
each_implementation_sampled = each_implementation_of(MODULES, sampled=True)


SIZES = [
    dict(tokens=129, experts=13, top_k=4, hidden=33, intermediate=7),
    dict(tokens=40, experts=11, top_k=11),
    dict(tokens=2, experts=9, top_k=3, hidden=70, intermediate=33, bias=True),
    dict(tokens=20, experts=61, top_k=2, hidden=45, intermediate=75, bias=True),
    dict(tokens=1, experts=5, top_k=1, hidden=2101, intermediate=3),
]
SIZES_LIKE_OTHERS = [
    dict(tokens=1, experts=8, top_k=2),
    dict(tokens=16, experts=8, top_k=2, hidden=64, intermediate=48),
    dict(tokens=300, experts=3, top_k=1),
    dict(tokens=3, experts=1, top_k=1, hidden=1, intermediate=1),
    dict(tokens=2, experts=61, top_k=2),
]
"""Other tests have kernels run these, or sizes that are the same when rounded to their widths."""


@each_implementation_with(MODULES, "sizes", [*SIZES, *SIZES_LIKE_OTHERS], left_out=SIZES_LIKE_OTHERS)
def test_is_the_weighted_sum_of_the_chosen_experts(implementation, sizes, rng):
    Block.draw(rng, implementation, **sizes).assert_right()


@each_implementation_sampled
@pytest.mark.parametrize("tokens", [30, 130], ids=["few rows", "many rows"])
def test_odd_empty_and_hot_experts_with_biases_beside_foreign_ones(implementation, tokens, rng):
    """The rows of experts are 7 or more, none, almost all, 1, and the rest; `explain_fused_moe` says in what regime that is."""
    block = Block.draw(rng, implementation, tokens=tokens, experts=5, top_k=2, hidden=200, intermediate=72, bias=True)
    ids = np.full((tokens, 2), 2)
    ids[:, 1] = rng.choice([-1, 0, 4, 5, 9], size=tokens)
    ids[3:10, 1], ids[1, 0], ids[::11] = 0, 3, -1
    block.with_arrays(topk_ids=jnp.array(ids, jnp.int32)).assert_right()


@each_implementation_sampled
def test_zero_tokens_give_zero_rows(implementation, rng):
    block = Block.draw(rng, implementation, tokens=0)
    assert block.run().shape == (0, implementation.width(24))


@each_implementation
@pytest.mark.parametrize("tokens", [37, 260])
def test_all_tokens_on_one_expert(implementation, tokens, rng):
    block = Block.draw(rng, implementation, tokens=tokens, experts=9, top_k=1)
    block.with_arrays(topk_ids=jnp.full((tokens, 1), 6, jnp.int32)).assert_right()


@each_implementation
def test_one_hot_expert_beside_others(implementation, rng):
    block = Block.draw(rng, implementation, tokens=150, experts=16, top_k=4)
    hot = jnp.where(jnp.arange(4) == 0, 5, (block.arrays["topk_ids"] % 4) + 8)
    block.with_arrays(topk_ids=hot.astype(jnp.int32)).assert_right()


@each_implementation
def test_an_expert_chosen_twice_by_a_token_counts_twice(implementation, rng):
    block = Block.draw(rng, implementation, tokens=6, top_k=3)
    block.with_arrays(topk_ids=jnp.array([[2, 2, 4]] * 6, jnp.int32)).assert_right()


@each_implementation_with(MODULES, "sizes", [(24, 5), (24, 80), (4, 20), (200, 5)], left_out=[(24, 80)])
def test_foreign_and_missing_experts_contribute_nothing_whatever_their_weight(implementation, sizes, rng):
    tokens, experts = sizes
    block = Block.draw(rng, implementation, tokens=tokens, experts=experts, top_k=3)
    ids = np.array(rng.integers(-1, 2 * experts, size=(tokens, 3)), np.int32)
    ids[::6] = [-1, experts, 2**31 - 1]
    foreign = (ids < 0) | (ids >= experts)
    weights = block.arrays["topk_weights"]
    expected = block.with_arrays(topk_ids=jnp.array(ids)).expected()
    poisoned = block.with_arrays(
        topk_ids=jnp.array(ids),
        topk_weights=jnp.where(foreign, jnp.array([jnp.nan, jnp.inf, -jnp.inf])[:3], weights),
        x=jnp.where(foreign.all(axis=1)[:, None], jnp.nan, block.arrays["x"]),
    )
    result = poisoned.run()
    block.assert_close(result, expected)
    np.testing.assert_array_equal(result[foreign.all(axis=1)], 0)


@each_implementation_with(MODULES, "traced_offset", [False, True], left_out=[False])
def test_devices_that_hold_parts_of_the_experts_add_up_to_the_whole(implementation, traced_offset, rng):
    block = Block.draw(rng, implementation, tokens=21, experts=7, bias=True)
    whole = 0
    for first, last in [(0, 3), (3, 4), (4, 7)]:
        part = block.held(first, last)
        result = part.run(expert_offset=jnp.int32(first) if traced_offset else first)
        part.assert_close(result, part.expected(expert_offset=first))
        whole += result.astype(jnp.float32)
    block.assert_close(whole, block.expected())


@each_implementation_with(MODULES, "expected_rows", [0, 15, 400], left_out=[15, 400])
def test_result_is_right_however_many_rows_were_expected(implementation, expected_rows, rng):
    block = Block.draw(rng, implementation, tokens=200, experts=5, top_k=2, bias=True)
    ids = block.arrays["topk_ids"].at[:, 1].set(3).at[::3].set(-1)
    block.with_arrays(topk_ids=ids).assert_right(expected_rows=expected_rows)


ACTIVATIONS = [
    Activation("silu", limit=0.5),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("relu2"),
    Activation("swigluoai"),
    Activation("swigluoai_uninterleave", limit=0.7),
    Activation("swiglustep", limit=0.4),
    Activation("silu_no_mul"),
    Activation("gelu_no_mul"),
    Activation("gelu_tanh_no_mul"),
    Activation("relu2_no_mul"),
]


# Kernels have tests of their own with every activation.
SAMPLED_ACTIVATIONS = [Activation("gelu"), Activation("relu2_no_mul"), Activation("swiglustep", limit=0.4)]


@each_implementation_with(
    MODULES,
    "activation",
    ACTIVATIONS,
    sampled=SAMPLED_ACTIVATIONS[:2],
    left_out=[activation for activation in ACTIVATIONS if activation not in SAMPLED_ACTIVATIONS],
)
def test_every_activation_with_biases(implementation, activation, rng):
    Block.draw(rng, implementation, tokens=13, experts=2, top_k=2, activation=activation, bias=True).assert_right()


@each_implementation
@pytest.mark.parametrize(("tokens", "top_k"), [(19, 1), (19, 3), (90, 3)])
def test_router_weights_on_the_input(implementation, tokens, top_k, rng):
    block = Block.draw(rng, implementation, tokens=tokens, top_k=top_k, bias=True, apply_router_weight_on_input=True)
    block.assert_right()


@each_implementation
def test_bfloat16_is_within_rounding_of_the_exact_result(implementation, rng):
    block = Block.draw(rng, implementation, tokens=33, hidden=128, intermediate=96, dtype="bfloat16")
    result = block.run()
    assert result.dtype == jnp.bfloat16
    assert_close(result, block.expected(), 1e-2, norm_error=5e-3)


@each_implementation
def test_float32_weights_beside_bfloat16_tokens_are_rounded_to_their_dtype(implementation, rng):
    block = Block.draw(rng, implementation, tokens=9, dtype="bfloat16", weights_dtype="float32", bias=True)
    rounded = {name: block.arrays[name].astype(jnp.bfloat16) for name in ("gate_up_proj", "down_proj")}
    result = block.run()
    assert result.dtype == jnp.bfloat16
    assert_close(result, block.with_arrays(**rounded).expected(), 1e-2, norm_error=5e-3)


WITH_FLOAT16 = [module for module in MODULES if module.NAME != "pallas_tpu"]


@each_implementation_with(WITH_FLOAT16, "tokens", [1, 9, 260], left_out=[9, 260])
def test_float16_results_may_be_out_of_range_until_they_are_weighted(implementation, tokens, rng):
    block = Block.draw(rng, implementation, tokens=tokens, experts=4, top_k=2, bias=True, dtype="float16")
    x, down_proj, topk_weights = (block.arrays[name] for name in ("x", "down_proj", "topk_weights"))
    block = block.with_arrays(x=4 * x, down_proj=2.0**15 * down_proj, topk_weights=2.0**-9 * topk_weights)
    unweighted = block.with_arrays(topk_weights=jnp.ones_like(topk_weights)).expected()
    assert abs(unweighted).max() > 2 * 65504
    assert_close(block.run(), block.expected(), 1e-2, norm_error=5e-3)
    cotangent = 2.0**-4 * block.draw_cotangent(rng)
    expected = block.expected_gradients(cotangent)
    for name, gradient in block.gradients(cotangent).items():
        assert_close(gradient, expected[name], 2e-2, norm_error=1e-2)


@each_implementation_with(MODULES, "tokens", [1, 9, 300], left_out=[9, 300])
def test_a_bias_is_added_before_a_product_is_rounded(implementation, tokens, rng):
    block = Block.draw(
        rng, implementation, tokens=tokens, experts=2, top_k=1, activation="relu2_no_mul", bias=True, dtype="bfloat16"
    )
    zeros = {name: jnp.zeros_like(array) for name, array in block.arrays.items() if name != "topk_ids"}
    # 1000.25, which bfloat16 lacks, in both products, and 1000 less by both biases; relu(0.25)^2 is 1/16 in between.
    block = block.with_arrays(
        x=zeros["x"].at[:, :2].set(jnp.array([1000, 0.25], jnp.bfloat16)),
        topk_weights=jnp.ones_like(zeros["topk_weights"]),
        gate_up_proj=zeros["gate_up_proj"].at[:, 0, :2, :2].set(1),
        gate_up_bias=zeros["gate_up_bias"] - 1000,
        down_proj=zeros["down_proj"].at[:, :, :2].set(jnp.array([16000, 4], jnp.bfloat16)),
        down_bias=zeros["down_bias"] - 1000,
    )
    np.testing.assert_array_equal(block.expected(), 0.25)
    np.testing.assert_array_equal(block.run(), 0.25)
    np.testing.assert_array_equal(block.run_before_gradient(), 0.25)


@each_implementation
@pytest.mark.parametrize(("tokens", "hidden", "intermediate"), [(1, 128, 128), (33, 511, 128)])
@pytest.mark.parametrize(("experts", "top_k", "ranks"), [(8, 2, 1), (64, 6, 4)])
def test_sample_of_the_upstream_grid(implementation, tokens, hidden, intermediate, experts, top_k, ranks, rng):
    if implementation.is_slow and ranks > 1:
        pytest.skip("eight calls that tell nothing which the other cases don't")
    # spec 10.6: randn / 10, bfloat16, absolute tolerance 2e-2; each rank computes its share of the experts.
    sizes = dict(tokens=tokens, hidden=hidden, intermediate=intermediate, experts=experts, top_k=top_k)
    block = Block.draw(rng, implementation, **sizes, dtype="bfloat16")
    names = ("x", "gate_up_proj", "down_proj")
    block = block.with_arrays(
        **{name: jnp.array(rng.normal(size=block.arrays[name].shape) / 10, jnp.bfloat16) for name in names}
    )
    share = experts // ranks
    total = jnp.zeros(block.arrays["x"].shape)
    for first in range(0, experts, share):
        total += block.held(first, first + share).run(expert_offset=jnp.int32(first)).astype(jnp.float32)
    np.testing.assert_allclose(total, block.expected(), rtol=0, atol=2e-2)
