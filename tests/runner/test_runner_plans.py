"""The scaling plan and the reduction plan, for every combination of what decides them."""

import itertools

import jax.numpy as jnp
import pytest

from moe_jax import MoEConfig, RouterConfig
from moe_jax.routing import route
from moe_jax.runner import ReductionPlan, ScalingPlan

SIZES = dict(hidden_size=8, intermediate_size=8, num_experts=4, top_k=2)


def scaling_config(factor, to_output, trick=False):
    router = RouterConfig(routed_scaling_factor=factor, apply_scale_to_output=to_output)
    return MoEConfig(**SIZES, router=router, inverse_scale_shared_in_float16=trick)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("has_shared", [False, True])
@pytest.mark.parametrize("trick", [False, True])
@pytest.mark.parametrize("to_output", [False, True])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_routed_output_outweighs_shared_output_by_the_factor_exactly_once(factor, to_output, trick, has_shared, dtype):
    if trick and not to_output:
        with pytest.raises(ValueError, match="apply_scale_to_output"):
            scaling_config(factor, to_output, trick)
        return
    config = scaling_config(factor, to_output, trick)
    plan = ScalingPlan.of(config, has_shared_experts=has_shared)
    routed, shared = plan.output_factors(dtype)
    # Renormalised weights add up to 1, and so to what the router has multiplied them by.
    in_router = float(route(jnp.zeros((1, 4)), config.router, 4, 2).topk_weights.sum())
    assert in_router * routed / shared == pytest.approx(factor)
    assert sum(value != 1 for value in (in_router, routed, shared)) == (factor != 1)
    assert plan.applied_to == ("routed output" if to_output else "router weights")


def test_float16_trick_leaves_routed_unscaled_only_in_float16_beside_shared_experts():
    config = scaling_config(4.0, to_output=True, trick=True)
    with_shared = ScalingPlan.of(config, has_shared_experts=True)
    assert with_shared.output_factors(jnp.float16) == (1.0, 0.25)
    assert with_shared.output_factors(jnp.bfloat16) == (4.0, 1.0)
    assert ScalingPlan.of(config, has_shared_experts=False).output_factors(jnp.float16) == (4.0, 1.0)


BOOLEANS = (False, True)


@pytest.mark.parametrize("num_ranks", [1, 4])
@pytest.mark.parametrize("zero_experts", BOOLEANS)
@pytest.mark.parametrize(("reduce_results", "shared", "transform"), list(itertools.product(BOOLEANS, repeat=3)))
def test_every_partial_result_is_summed_once_or_left_to_the_caller(
    reduce_results, shared, transform, zero_experts, num_ranks
):
    plan = ReductionPlan.of(
        num_ranks=num_ranks,
        reduce_results=reduce_results,
        has_shared_experts=shared,
        has_output_transform=transform,
        has_zero_experts=zero_experts,
    )
    sums_of_routed = plan.routed_before_transform + plan.final
    sums_of_shared = plan.shared_alone + (plan.final and shared)
    if num_ranks == 1:
        assert (sums_of_routed, sums_of_shared, plan.result_is_partial) == (0, 0, False)
        return
    whole = reduce_results or transform or zero_experts
    assert sums_of_routed == whole
    assert sums_of_shared == (whole and shared)
    assert plan.result_is_partial == (not whole)
    assert plan.routed_before_transform == transform  # the transform may be non-linear


@pytest.mark.parametrize(("shared", "transform", "routed_ranks"), list(itertools.product(BOOLEANS, BOOLEANS, [1, 2])))
def test_routed_output_that_comes_back_summed_leaves_the_shared_one_to_be_summed_alone(shared, transform, routed_ranks):
    plan = ReductionPlan.of(
        num_ranks=4,
        routed_ranks=routed_ranks,
        reduce_results=True,
        has_shared_experts=shared,
        has_output_transform=transform,
        has_zero_experts=False,
    )
    assert plan.routed_before_transform == (routed_ranks > 1)
    assert plan.routed_comes_summed == (routed_ranks == 1)
    assert plan.shared_alone == shared
    assert not plan.final
    assert not plan.result_is_partial


# reduce_results, shared, transform -> routed before the transform, shared alone, sum at the end (spec 1.4)
UPSTREAM_TABLE = {
    (False, False, False): (False, False, False),
    (False, False, True): (True, False, False),
    (False, True, False): (False, False, False),
    (False, True, True): (True, True, False),
    (True, False, False): (False, False, True),
    (True, False, True): (True, False, False),
    (True, True, False): (False, False, True),
    (True, True, True): (True, True, False),
}


@pytest.mark.parametrize("case", UPSTREAM_TABLE, ids=str)
def test_reductions_happen_where_upstream_has_them(case):
    reduce_results, shared, transform = case
    plan = ReductionPlan.of(
        num_ranks=2,
        reduce_results=reduce_results,
        has_shared_experts=shared,
        has_output_transform=transform,
        has_zero_experts=False,
    )
    assert (plan.routed_before_transform, plan.shared_alone, plan.final) == UPSTREAM_TABLE[case]
