"""Balancing on meshes with Explicit axes, the default of `jax.make_mesh`, be they current or not."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from support import golden_cases
from support.balanced_layers import logical_experts, plain_and_balanced

from moe_jax import ParallelConfig, from_pretrained
from moe_jax.load_balancing import EplbConfig, ExpertLoadBalancer

CASE = golden_cases.golden_case("mixtral", "full_tied")  # 12 experts
CURRENT = [contextlib.nullcontext, jax.set_mesh]


def explicit_mesh():
    return jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])


@pytest.mark.slow
@pytest.mark.parametrize("current", CURRENT, ids=["no", "yes"])
def test_a_layer_is_trained_and_rearranged_and_its_copies_stay_equal(current, rng):
    mesh = explicit_mesh()
    plain, layer = plain_and_balanced(rng, mesh, ParallelConfig(expert_axis="expert"), redundant=4)
    x = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)
    expected = plain(x)
    with current(mesh):
        balancer = ExpertLoadBalancer(layer, EplbConfig(window_size=2))
        optimizer = nnx.Optimizer(layer, optax.sgd(0.0, momentum=0.9), wrt=nnx.Param)  # outputs stay

        @nnx.jit
        def step(layer, optimizer, load, x):
            def loss(layer):
                y, aux = layer(x, with_aux=True)
                return (y**2).mean(), (y, aux)

            gradients, (y, aux) = nnx.grad(loss, has_aux=True)(layer)
            optimizer.update(layer, balancer.sum_replica_gradients(layer, gradients))
            return y, balancer.record(load, aux.physical_load)

        y, load = step(layer, optimizer, balancer.init(), x)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
        placement = rng.permuted(balancer.physical_to_logical(layer), axis=1)
        _, same = balancer.place(layer, placement, optimizer)
        assert same is optimizer
        np.testing.assert_array_equal(layer.replicas.physical_to_logical[...], placement[0])
        moved, load = step(layer, optimizer, load, x)
        np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-5)
        logical_experts(layer)
        _, report, _ = balancer.rearrange(layer, load, optimizer)
        logical_experts(layer)
    assert report.logical_load.sum() == 2 * 16 * 2


@pytest.mark.parametrize("current", CURRENT, ids=["no", "yes"])
def test_experts_of_a_model_move_although_it_computes_with_auto_axes(current, rng):
    mesh = explicit_mesh()
    model = from_pretrained(CASE.folder("fused"), dtype=np.float32, mesh=mesh, num_redundant_experts=4)
    (mixture,) = (stack.blocks[0].feed_forward for stack in model.stacks)
    weights = np.asarray(mixture.routed_experts.down_proj[...])
    with current(mesh):
        balancer = ExpertLoadBalancer(model)
        placement = rng.permuted(balancer.physical_to_logical(model), axis=1)
        moves, *_ = balancer.place(model, placement)
    expected = np.stack([layer[source] for layer, source in zip(weights, moves.source, strict=True)])
    np.testing.assert_array_equal(mixture.routed_experts.down_proj[...], expected)
    np.testing.assert_array_equal(mixture.replicas.physical_to_logical[...], placement)
    assert mixture.routed_experts.down_proj[...].sharding.mesh == model.mesh
