"""Balancing layers that are scanned: those of a causal language model, and those of a model of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles.layers_under_test import random_like
from support.balanced_layers import config, make_mesh
from support.published_configs import CONFIGS

from moe_jax import MoERunner, ParallelConfig
from moe_jax.families import get_family
from moe_jax.load_balancing import EplbConfig, ExpertLoadBalancer
from moe_jax.models import CausalLM
from moe_jax.models.parameter_sources import parameter_shardings
from moe_jax.placement import logical_load

EXPERTS, REDUNDANT = 4, 2


def small_model(rng, mesh=None, *, layer_types, redundant):
    """gpt-oss with layers of these two kinds."""
    sizes = {"hidden_size": 8, "vocab_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}
    experts = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": 4}
    hf_config = {**CONFIGS["gpt_oss"], **sizes, **experts, "num_hidden_layers": len(layer_types)}
    hf_config["layer_types"] = layer_types
    decoder = get_family(hf_config).build_decoder(hf_config)
    parallel = None if mesh is None else ParallelConfig(expert_axis="expert")

    def create():
        return CausalLM(
            decoder,
            rngs=nnx.Rngs(0),
            parallel=parallel,
            mesh=mesh,
            num_redundant_experts=redundant,
            implementation="reference",
        )

    model = nnx.eval_shape(create)
    shardings = parameter_shardings(model)
    slots = np.array([0, 1, 2, 3, 0, 1])[: EXPERTS + redundant]

    def value(path, leaf):
        if path[-2] == "replicas":
            table = {"physical_to_logical": slots, "replica_count": [2, 2, 1, 1]}.get(path[-1])
            table = [[0, 4, -1], [1, 5, -1], [2, -1, -1], [3, -1, -1]] if table is None else table
            drawn = jnp.broadcast_to(jnp.array(table, jnp.int32), leaf.shape)
        else:
            drawn = random_like(rng, leaf)
            drawn = drawn[:, slots] if path[-2] == "routed_experts" else drawn
        return jax.device_put(drawn, shardings[path])

    nnx.update(model, nnx.map_state(value, nnx.state(model)))
    return model


def test_layers_of_all_stacks_are_balanced_in_their_order_and_need_no_redundant_experts(rng):
    model = small_model(rng, layer_types=["full_attention", *["full_attention", "sliding_attention"] * 2], redundant=0)
    balancer = ExpertLoadBalancer(model)
    assert [layers.rows for layers in balancer.layers] == [(0,), (1, 3), (2, 4)]
    first, second = model.stacks
    in_groups = [first.blocks[0], second.blocks[0], second.blocks[1]]

    def down_proj():
        of_layers = np.concatenate([block.feed_forward.routed_experts.down_proj[...] for block in in_groups])
        return of_layers[[0, 1, 3, 2, 4]]

    before = down_proj()
    placement = rng.permuted(np.tile(np.arange(EXPERTS), (5, 1)), axis=1)
    balancer.place(model, placement)
    np.testing.assert_array_equal(balancer.physical_to_logical(model), placement)
    np.testing.assert_array_equal(down_proj(), before[np.arange(5)[:, None], placement])


@pytest.mark.slow
def test_scanned_layers_are_rearranged_each_for_its_own_load(rng):
    model = small_model(rng, make_mesh(2), layer_types=["sliding_attention", "full_attention"] * 2, redundant=REDUNDANT)
    balancer = ExpertLoadBalancer(model, EplbConfig(window_size=2))
    assert [layers.rows for layers in balancer.layers] == [(0, 2), (1, 3)]
    assert (balancer.num_layers, balancer.num_physical, balancer.num_ranks) == (4, EXPERTS + REDUNDANT, 2)
    run = nnx.jit(lambda model, ids: model(ids, with_aux=True))
    ids = jnp.asarray(rng.integers(16, size=(3, 7)))
    before, aux = run(model, ids)
    state = balancer.record(balancer.init(), aux.physical_load)
    _, report = balancer.rearrange(model, state)
    np.testing.assert_array_equal(report.logical_load, aux.expert_load)
    for placement in (report.new_physical_to_logical, rng.permuted(report.new_physical_to_logical, axis=1)):
        balancer.place(model, placement)
        np.testing.assert_array_equal(balancer.physical_to_logical(model), placement)
        after, moved = run(model, ids)
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
        # Every layer's slots hold what its own row of the placement says.
        counted = logical_load(np.asarray(moved.physical_load), placement, EXPERTS)
        np.testing.assert_array_equal(counted, aux.expert_load)


@pytest.mark.parametrize("redundant", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_layers_stacked_by_vmap_are_rearranged_each_for_its_own_load(redundant, rng):
    """What a model of one's own scans: a `MoERunner` whose arrays have a leading axis of layers."""
    mesh = make_mesh(4)
    settings = config(num_redundant_experts=redundant, parallel=ParallelConfig(expert_axis="expert"))
    layers = nnx.jit(nnx.vmap(lambda rngs: MoERunner(settings, rngs=rngs, mesh=mesh)))(nnx.Rngs(0).split(3))
    balancer = ExpertLoadBalancer(layers, EplbConfig(window_size=2))
    assert balancer.layers == (((), (0, 1, 2), True),)

    @nnx.jit
    def run(layers, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def through(x, layer):
            y, aux = layer(x, with_aux=True)
            return x + y, aux.physical_load

        return through(x, layers)

    x = jnp.asarray(rng.normal(size=(33, 6)), jnp.float32)
    before, load = run(layers, x)
    _, report = balancer.rearrange(layers, balancer.record(balancer.init(), load))
    for placement in (report.new_physical_to_logical, rng.permuted(report.new_physical_to_logical, axis=1)):
        balancer.place(layers, placement)
        after, moved = run(layers, x)
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
        np.testing.assert_array_equal(logical_load(np.asarray(moved), placement, 8), report.logical_load)
    gradients = nnx.grad(lambda layers: (run(layers, x)[0] ** 2).sum())(layers)
    summed = balancer.sum_replica_gradients(layers, gradients).routed_experts.down_proj[...]
    plain = np.asarray(gradients.routed_experts.down_proj[...])
    same = placement[:, :, None] == placement[:, None, :]
    np.testing.assert_allclose(
        summed, np.einsum("lpq,lqij->lpij", same, plain), rtol=0, atol=1e-5 * np.abs(plain).max()
    )


def test_layers_stacked_along_two_axes_are_refused():
    stack = nnx.vmap(nnx.vmap(lambda rngs: MoERunner(config(), rngs=rngs)))
    with pytest.raises(ValueError, match="along one axis, got 2 axes of sizes 2, 3 in the model"):
        ExpertLoadBalancer(nnx.eval_shape(lambda: stack(nnx.Rngs(0).split((2, 3)))))
