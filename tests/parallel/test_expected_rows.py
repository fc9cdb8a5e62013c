"""How many rows a rank's experts can expect: kernels are chosen for these, not for what there is room for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles.layers_under_test import random_layer
from support.sharded_layers import make_mesh, sharded_like, small_config

from moe_jax import ExpertMapManager, ParallelConfig, RoutedExperts, SharedExpertsConfig
from moe_jax.experts import routed
from moe_jax.placement import ParallelRanks

SAME_TOKENS = dict(expert_axis="expert", tensor_axis="tensor", data_axis="data")
OTHER_TOKENS = dict(sequence_axis="expert", **SAME_TOKENS)
MIXED = dict(expert_axis=("data", "expert"), tensor_axis="tensor", data_axis="data")
EXCHANGED_TENSORS = dict(expert_axis="expert", tensor_axis=("tensor", "data"), data_axis="data")
TOKENS, TOP_K, SHARED = 32, 2, 3


@pytest.fixture
def seen(monkeypatch):
    """What `fused_moe` was told to expect, and the number of choices that it was given, for each call that is traced."""
    calls = []

    def recording(x, topk_weights, topk_ids, *weights, expected_rows, **kwargs):
        calls.append((expected_rows, topk_ids.size))
        return jnp.zeros_like(x)

    monkeypatch.setattr(routed, "fused_moe", recording)
    jax.clear_caches()  # also of programs around the layer, which other tests may have traced for the same shapes
    yield calls
    jax.clear_caches()


CASES = [
    ("replicated", SAME_TOKENS, (1, 8, 1), dict()),
    ("replicated", SAME_TOKENS, (2, 2, 2), dict()),
    ("allgather_reducescatter", OTHER_TOKENS, (1, 8, 1), dict()),
    ("allgather_reducescatter", MIXED, (2, 4, 1), dict(micro_batches=2)),
    ("padded_all_to_all", OTHER_TOKENS, (1, 8, 1), dict(capacity_factor=1.25)),
    ("padded_all_to_all", EXCHANGED_TENSORS, (2, 2, 2), dict(one_row_per_rank=True)),
    ("ragged_all_to_all", SAME_TOKENS, (1, 4, 1), dict()),
    ("ragged_all_to_all", OTHER_TOKENS, (2, 4, 1), dict(micro_batches=2)),
]


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["separate", "fused"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_expect_an_even_share_of_the_choices_whatever_the_strategy(case, fused, seen, rng):
    strategy, axes, sizes, options = case
    data, expert, _ = sizes
    shared = SharedExpertsConfig(intermediate_size=8 * SHARED, bias=True)
    config = small_config(shared_experts=shared, fuse_shared_experts=fused)
    single = random_layer(rng, config)
    sharded = sharded_like(single, make_mesh(*sizes), ParallelConfig(strategy=strategy, **axes, **options))
    sharded(jnp.ones((1, TOKENS, 6)))
    # Over data axes that don't split experts, tokens are split and experts are copied.
    in_expert_ranks = TOKENS if "data" in axes["expert_axis"] else TOKENS // data
    ranks = expert * data if "data" in axes["expert_axis"] else expert
    if axes is EXCHANGED_TENSORS:  # every tensor rank has the tokens of all
        in_expert_ranks = TOKENS
    per_token = TOP_K + (SHARED if fused else 0)
    batches = options.get("micro_batches", 1)
    assert {expected for expected, _ in seen} == {in_expert_ranks * per_token // ranks // batches}
    assert all(expected <= choices for expected, choices in seen)


def test_a_share_that_is_no_integer_is_rounded_up(seen, rng):
    parallel = ParallelConfig(strategy="replicated", **SAME_TOKENS)
    sharded = sharded_like(random_layer(rng, small_config()), make_mesh(1, 4, 1), parallel)
    sharded(jnp.ones((5, 6)))
    assert seen == [(3, 10)]  # 10 choices, four ranks


def test_one_rank_without_a_mesh_expects_its_share(seen, rng):
    manager = ExpertMapManager(global_num_experts=8, ranks=ParallelRanks(ep_size=4, ep_rank=1, use_ep=True))
    experts = RoutedExperts(small_config(), expert_map_manager=manager, rngs=nnx.Rngs(0))
    ids = jnp.asarray(rng.integers(8, size=(9, 2)), jnp.int32)
    experts(jnp.ones((9, 6)), jnp.ones((9, 2)), ids)
    assert seen == [(5, 18)]  # 18 choices, two of eight experts


def test_a_rank_with_all_experts_expects_all_choices(seen):
    experts = RoutedExperts(small_config(), rngs=nnx.Rngs(0))
    experts(jnp.ones((9, 6)), jnp.ones((9, 2)), jnp.asarray(np.zeros((9, 2)), jnp.int32))
    assert seen == [(None, 18)]
