"""The benchmark of one MoE layer."""

import pytest

from moe_jax.benchmarking.moe_block_speed import measure_moe_block
from moe_jax.config import MoEConfig


@pytest.mark.parametrize(("activation", "matrices"), [("silu", 3), ("relu2_no_mul", 2)])
def test_operations_are_those_of_the_matrices_that_the_activation_has(activation, matrices):
    config = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, activation=activation)
    assert measure_moe_block(config, tokens=3, rounds=1).flops == matrices * 2 * 16 * 8 * 3 * 2
