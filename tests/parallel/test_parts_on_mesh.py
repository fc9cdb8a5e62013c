"""What a layer on a mesh refuses, and what it counts where ranks hold the tokens of others."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles.layers_under_test import call, random_layer
from support.sharded_layers import SHARED, layer_pair, make_mesh, sharded_like, small_config

from moe_jax import MoERunner, ParallelConfig, RouterConfig


def test_a_foreign_shared_module_put_in_later_is_refused_where_each_rank_would_add_it(rng):
    layer = random_layer(rng, small_config(shared_experts=SHARED))
    sharded = sharded_like(layer, make_mesh(1, 4, 1))
    sharded.shared_experts = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="shared_experts must be a SharedExperts, .* 4 ranks, got Linear"):
        sharded(jnp.ones((3, 6)))


def test_a_foreign_shared_function_runs_where_no_ranks_hold_the_same_tokens(rng):
    parallel = ParallelConfig(strategy="allgather_reducescatter", expert_axis="expert", sequence_axis="expert")
    single, sharded = layer_pair(rng, small_config(), make_mesh(1, 4, 1), parallel, shared_experts=jnp.sin)
    x = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
    np.testing.assert_allclose(call(sharded, x), call(single, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(strategy="replicated", data_axis="expert"), "'replicated' cannot run: .*got 'expert'"),
        (dict(strategy="ragged_all_to_all", capacity_factor=1.0), "'ragged_all_to_all' cannot run: .*capacity_factor"),
    ],
)
def test_a_strategy_that_cannot_run_is_refused_when_the_layer_is_built(settings, message):
    config = small_config(parallel=ParallelConfig(expert_axis="expert", **settings))
    with pytest.raises(NotImplementedError, match=message):
        nnx.eval_shape(lambda: MoERunner(config, rngs=nnx.Rngs(0), mesh=make_mesh(1, 4, 1)))


@pytest.mark.parametrize("data_axis", ["expert", ("expert", "tensor")], ids=str)
def test_a_choice_without_room_counts_once_however_many_ranks_dispatch_it(data_axis, rng):
    parallel = ParallelConfig(
        strategy="padded_all_to_all",
        capacity_factor=0.25,
        expert_axis="expert",
        tensor_axis="tensor",
        data_axis=data_axis,
    )
    config = small_config(router=RouterConfig(renormalize=False))
    single, sharded = layer_pair(rng, config, make_mesh(1, 2, 2), parallel)
    x = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)
    ids = jnp.zeros((16, 2), jnp.int32).at[:, 1].set(1)  # both on the first rank
    y, aux = call(sharded, x, forced_ids=ids, with_aux=True)
    # Of the 16 choices of each expert rank's eight tokens, the first two find room.
    kept = np.zeros((16, 2), bool)
    kept[[0, 8]] = True
    np.testing.assert_allclose(y, call(single, x, forced_ids=jnp.where(kept, ids, -1)), rtol=1e-5, atol=1e-5)
    assert aux.dropped_rows == (~kept).sum()
