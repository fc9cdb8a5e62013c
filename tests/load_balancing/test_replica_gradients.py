"""Training with copies is training without: gradients are summed over copies, and experts may move in between."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from support.balanced_layers import logical_experts, make_mesh, plain_and_balanced

from moe_jax import ParallelConfig
from moe_jax.load_balancing import EplbConfig, ExpertLoadBalancer
from moe_jax.load_balancing.exchange import ExpertSharding
from moe_jax.load_balancing.gradients import sum_over_copies
from moe_jax.placement import compute_logical_maps


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("extra", [0, 4])
def test_every_copy_gets_the_sum_over_the_copies(is_stacked, extra, rng):
    num_layers, num_experts, width = (3 if is_stacked else 1), 8, 5
    slots = np.concatenate([np.arange(num_experts), rng.integers(3, size=extra)])
    placement = np.stack([rng.permutation(slots) for _ in range(num_layers)])
    values = rng.normal(size=(*placement.shape, width)).astype(np.float32)
    expected = np.stack(
        [[values[la][placement[la] == e].sum(axis=0, dtype=float) for e in placement[la]] for la in range(num_layers)]
    )
    mesh, spec = make_mesh(4), PartitionSpec(None, "expert") if is_stacked else PartitionSpec("expert")
    array = jax.device_put(values if is_stacked else values[0], NamedSharding(mesh, spec))
    tables = [jnp.asarray(table) for table in compute_logical_maps(placement, num_experts)]
    add_up = jax.jit(sum_over_copies, static_argnames="sharding")
    result = np.asarray(add_up(array, *tables, sharding=ExpertSharding(mesh, spec, is_stacked)))
    result = result if is_stacked else result[None]
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    for layer in range(num_layers):
        for expert in range(num_experts):
            copies = result[layer][placement[layer] == expert]
            np.testing.assert_array_equal(copies, np.broadcast_to(copies[0], copies.shape))


def test_copies_are_summed_where_integers_have_64_bits_too(rng):
    placement = np.array([[0, 1, 2, 3, 1, 0]])
    values = rng.normal(size=(6, 5)).astype(np.float32)
    expected = np.stack([values[placement[0] == expert].sum(axis=0, dtype=float) for expert in placement[0]])
    with jax.enable_x64(True):
        tables = [jnp.asarray(table) for table in compute_logical_maps(placement, 4)]
        result = sum_over_copies(jnp.asarray(values), *tables, sharding=ExpertSharding(None, PartitionSpec(), False))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_sum_over_copies_is_rounded_once(num_ranks):
    """256 + 1 + 1 + 1 + 1/4 is 256 in bfloat16 one by one, 258 if each of two ranks rounds, and 260 if the sum alone is rounded."""
    placement, values = np.array([[0, 1, 0, 0, 0, 0]]), np.array([[256], [7], [1], [1], [1], [0.25]])
    mesh, spec = make_mesh(num_ranks), PartitionSpec("expert")
    array = jax.device_put(jnp.asarray(values, jnp.bfloat16), NamedSharding(mesh, spec))
    tables = [jnp.asarray(table) for table in compute_logical_maps(placement, 2)]
    result = jax.jit(sum_over_copies, static_argnames="sharding")(
        array, *tables, sharding=ExpertSharding(mesh, spec, is_stacked=False)
    )
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(result, np.float32)[:, 0], [260, 7, 260, 260, 260, 260])


@nnx.jit
def train_plainly(layer, optimizer, x, target):
    gradients = nnx.grad(lambda layer: ((layer(x) - target) ** 2).mean())(layer)
    optimizer.update(layer, gradients)


def optimizer_of(layer):
    return nnx.Optimizer(layer, optax.adam(1e-2, eps=1e-3), wrt=nnx.Param)


@pytest.mark.parametrize(
    ("sizes", "parallel", "expert_bias"),
    [
        pytest.param((4,), ParallelConfig(expert_axis="expert"), False, id="expert 4"),
        pytest.param(
            (2, 2, 2),
            ParallelConfig(expert_axis="expert", tensor_axis="tensor", data_axis="data"),
            True,
            id="expert 2 tensor 2 data 2, biases",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_training_with_moving_copies_equals_training_without_copies(sizes, parallel, expert_bias, rng):
    plain, balanced = plain_and_balanced(rng, make_mesh(*sizes), parallel, expert_bias=expert_bias)
    balancer = ExpertLoadBalancer(balanced, EplbConfig(window_size=2))
    state = balancer.init()
    plain_optimizer, optimizer = optimizer_of(plain), optimizer_of(balanced)

    @nnx.jit
    def train(layer, optimizer, state, x, target):
        def loss(layer):
            y, aux = layer(x, with_aux=True)
            return ((y - target) ** 2).mean(), aux

        gradients, aux = nnx.grad(loss, has_aux=True)(layer)
        optimizer.update(layer, balancer.sum_replica_gradients(layer, gradients))
        return balancer.record(state, aux.physical_load)

    moved = 0
    for turn in range(5):
        x, target = (jnp.asarray(rng.normal(size=(24, 6)), jnp.float32) for _ in range(2))
        train_plainly(plain, plain_optimizer, x, target)
        state = train(balanced, optimizer, state, x, target)
        if turn in (1, 3):
            placement = rng.permuted(balancer.physical_to_logical(balanced), axis=1)
            moves, optimizer = balancer.place(balanced, placement, optimizer)
            moved += moves.sent + moves.copied
        for name, values in logical_experts(balanced).items():  # which also compares the copies
            expected = getattr(plain.routed_experts, name)[...]
            np.testing.assert_allclose(values, expected, rtol=0, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(balanced.router.weight[...], plain.router.weight[...], rtol=0, atol=2e-5)
    assert moved > 0
