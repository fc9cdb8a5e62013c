"""Which arrays of a model move with its experts, and that nothing has moved when one of them cannot."""

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
    after = nnx.to_pure_dict(nnx.state(layer))
    for name, values in after["routed_experts"].items():
        np.testing.assert_array_equal(values, before["routed_experts"][name], err_msg=name)
    np.testing.assert_array_equal(after["replicas"]["physical_to_logical"], before["replicas"]["physical_to_logical"])
