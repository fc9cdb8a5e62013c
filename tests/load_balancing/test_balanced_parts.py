"""Which arrays of a model move with its experts, each once, and that nothing has moved when one of them cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles.layers_under_test import random_layer
from support.balanced_layers import config, logical_experts

from moe_jax.load_balancing import EplbConfig, ExpertLoadBalancer

LAYER = config(num_redundant_experts=8)


class Block(nnx.Module):
    def __init__(self, rng):
        self.moe = random_layer(rng, LAYER)


class Predictor(nnx.Module):
    def __init__(self, rng):
        self.layers = nnx.List([Block(rng)])


class PredictingModel(nnx.Module):
    """The path of its first layer, `layers.0.moe`, is the end of that of its last one."""

    def __init__(self, rng):
        self.layers = nnx.List([Block(rng)])
        self.predictor = Predictor(rng)

    @property
    def moe_layers(self):
        return [self.layers[0].moe, self.predictor.layers[0].moe]


def recorded(balancer, rng):
    """A load under which experts change places."""
    load = rng.integers(1, 50, size=(balancer.num_layers, balancer.num_physical)) * (
        np.arange(balancer.num_physical) < 3
    )
    return balancer.record(balancer.init(), jnp.asarray(load + 1, jnp.int32))


def make_copies_equal(layer):
    """Of every expert that has several slots, as in a model that was built and not drawn."""
    placement = np.asarray(layer.replicas.physical_to_logical[...])
    first = np.array([np.flatnonzero(placement == expert)[0] for expert in range(layer.config.num_experts)])
    for variable in nnx.state(layer)["routed_experts"].values():
        variable[...] = variable[...][first[placement]]


def test_a_layer_whose_path_ends_like_another_ones_gets_its_own_experts(rng):
    model = PredictingModel(rng)
    for layer in model.moe_layers:
        make_copies_equal(layer)
    before = [logical_experts(layer) for layer in model.moe_layers]
    balancer = ExpertLoadBalancer(model, EplbConfig(window_size=4, step_interval=4))
    old = balancer.physical_to_logical(model)
    balancer.rearrange(model, recorded(balancer, rng))
    new = balancer.physical_to_logical(model)
    assert (old != new).any(axis=1).all()
    assert (new[0] != new[1]).any()
    for layer, weights in zip(model.moe_layers, before, strict=True):
        for name, values in logical_experts(layer).items():
            np.testing.assert_array_equal(values, weights[name], err_msg=name)


def test_nothing_moves_if_an_optimizer_state_cannot_move(rng):
    layer = random_layer(rng, config(num_redundant_experts=8, hidden_size=16, intermediate_size=8))
    make_copies_equal(layer)
    optimizer = nnx.Optimizer(layer, optax.adafactor(1e-2, min_dim_size_to_factor=8), wrt=nnx.Param)
    balancer = ExpertLoadBalancer(layer, EplbConfig(window_size=4, step_interval=4))
    before, state = nnx.to_pure_dict(nnx.state(layer)), recorded(balancer, rng)
    with pytest.raises(ValueError, match="must be that of the 16 physical experts"):
        balancer.rearrange(layer, state, optimizer)
    assert_same_state(layer, before)


def test_numbers_in_place_of_arrays_of_experts_stay(rng):
    """What adafactor keeps of an array that it doesn't factor."""
    layer = random_layer(rng, LAYER)
    make_copies_equal(layer)
    state = optax.adafactor(1e-2).init(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), state)
    before = jax.tree.map(np.asarray, state)
    balancer = ExpertLoadBalancer(layer)
    moves, after = balancer.place(layer, np.roll(balancer.physical_to_logical(layer), 5, axis=1), state)
    is_moved = []
    for (path, new), old in zip(jax.tree.leaves_with_path(after), jax.tree.leaves(before), strict=True):
        is_moved.append("routed_experts" in jax.tree_util.keystr(path) and new.size > 1)
        np.testing.assert_array_equal(new, old[moves.source[0]] if is_moved[-1] else old)
    assert sum(is_moved) == 4


def assert_same_state(layer, before):
    """The layer holds `before`, which `nnx.to_pure_dict` has made of its state."""
    after = nnx.to_pure_dict(nnx.state(layer))
    for part in ("routed_experts", "replicas"):
        for name, values in after[part].items():
            np.testing.assert_array_equal(values, before[part][name], err_msg=name)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (np.arange(16) % 7, r"every logical expert needs a physical slot, got none for \[7\]"),
        (np.arange(16) % 8 - 1, "no slot held expert -1"),
        (np.arange(8), r"must have the old one's shape \(1, 16\), got \(1, 8\)"),
    ],
)
def test_nothing_moves_to_a_placement_that_cannot_hold(placement, message, rng):
    layer = random_layer(rng, LAYER)
    make_copies_equal(layer)
    balancer = ExpertLoadBalancer(layer)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(layer)))
    with pytest.raises(ValueError, match=message):
        balancer.place(layer, placement[None])
    assert_same_state(layer, before)


def test_nothing_moves_if_an_array_is_on_no_device(rng):
    layer = random_layer(rng, LAYER)
    make_copies_equal(layer)
    balancer = ExpertLoadBalancer(layer)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(layer)))
    moments = {"routed_experts": before["routed_experts"]}
    with pytest.raises(TypeError, match=r"must be a jax.Array, got ndarray for down_bias"):
        balancer.place(layer, np.roll(balancer.physical_to_logical(layer), 5, axis=1), moments)
    assert_same_state(layer, before)


def test_a_placement_may_be_an_array_of_jax(rng):
    layer = random_layer(rng, LAYER)
    make_copies_equal(layer)
    balancer, before = ExpertLoadBalancer(layer), logical_experts(layer)
    placement = rng.permuted(balancer.physical_to_logical(layer), axis=1)
    balancer.place(layer, jnp.asarray(placement))
    np.testing.assert_array_equal(balancer.physical_to_logical(layer), placement)
    for name, values in logical_experts(layer).items():
        np.testing.assert_array_equal(values, before[name], err_msg=name)


def test_arrays_that_others_share_with_the_model_move_once(rng):
    """An optimizer that holds its model, and an average that starts as the model's own weights."""
    layer = random_layer(rng, LAYER)
    make_copies_equal(layer)
    optimizer = nnx.ModelAndOptimizer(layer, optax.sgd(1e-2, momentum=0.9), wrt=nnx.Param)
    average = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    balancer, before = ExpertLoadBalancer(layer), logical_experts(layer)
    placement = np.roll(balancer.physical_to_logical(layer), 5, axis=1)
    _, same, average = balancer.place(layer, placement, optimizer, average)
    assert same is optimizer
    assert optimizer.model is layer
    weights = nnx.to_pure_dict(nnx.state(layer))["routed_experts"]
    for name, values in logical_experts(layer).items():
        np.testing.assert_array_equal(values, before[name], err_msg=name)
        np.testing.assert_array_equal(average["routed_experts"][name], weights[name], err_msg=name)


def test_a_copy_of_the_model_moves_with_its_tables(rng):
    """Weights that average the model's, as a model of their own or as the state of one."""
    layer = random_layer(rng, LAYER)
    make_copies_equal(layer)
    balancer = ExpertLoadBalancer(layer)
    other = nnx.clone(layer)
    for variable in nnx.state(other)["routed_experts"].values():
        variable[...] *= 0.5
    graph, state = nnx.split(nnx.clone(other))
    x = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
    expected = np.asarray(other(x))
    new = np.roll(balancer.physical_to_logical(layer), 5, axis=1)
    _, same, state = balancer.place(layer, new, other, state)
    assert same is other
    for copy in (other, nnx.merge(graph, state)):
        np.testing.assert_array_equal(copy.replicas.physical_to_logical[...], new[0])
        assert not copy.replicas.physical_to_logical[...].committed, "it may still go to other devices, as before"
        np.testing.assert_allclose(copy(x), expected, rtol=0, atol=1e-6)


def test_a_copy_of_the_model_with_other_tables_or_none_is_refused(rng):
    layer = random_layer(rng, config())
    early = nnx.clone(layer)
    balancer = ExpertLoadBalancer(layer)  # which gives the layer tables
    stale = nnx.clone(layer)
    old = balancer.physical_to_logical(layer)
    new, newest = np.roll(old, 3, axis=1), np.roll(old, 5, axis=1)
    balancer.place(layer, new)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(layer)))
    for other, message in (
        (early, "the layer itself of what moves along must have placement tables: copy a model after"),
        (stale, "replicas.physical_to_logical.* must be the placement of the model, to move along with it"),
        (nnx.state(stale), "replicas.physical_to_logical.* must be the placement of the model"),
    ):
        with pytest.raises(ValueError, match=message):
            balancer.place(layer, newest, other)
    assert_same_state(layer, before)
