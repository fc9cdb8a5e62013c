"""The same layer on one device and on a mesh, and what must be equal between them."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType
from oracles.layers_under_test import random_layer

from moe_jax import MoEConfig, ParallelConfig, SharedExpertsConfig

SHARED = SharedExpertsConfig(intermediate_size=8, bias=True, sigmoid_gate=True)
PARALLEL = ParallelConfig(expert_axis="expert", tensor_axis="tensor", data_axis="data", strategy="replicated")
AXES = ("data", "expert", "tensor")


def small_config(**changes) -> MoEConfig:
    """A layer of eight experts whose biases count."""
    base = dict(
        hidden_size=6, intermediate_size=8, num_experts=8, top_k=2, expert_bias=True, implementation="reference"
    )
    return MoEConfig(**(base | changes))


def make_mesh(data, expert, tensor, kind=AxisType.Auto):
    """A mesh of the first devices with the axes "data", "expert" and "tensor"."""
    devices = jax.devices()[: data * expert * tensor]
    return jax.make_mesh((data, expert, tensor), AXES, axis_types=(kind,) * 3, devices=devices)


def sharded_like(single, mesh, parallel=PARALLEL, **parts):
    """The layer `single` with the same parameters, on a mesh."""
    settings = dataclasses.replace(single.config, parallel=parallel)
    return random_layer(None, settings, values=nnx.state(single), mesh=mesh, **parts)


def layer_pair(rng, settings, mesh, parallel=PARALLEL, **parts):
    """The same layer without and with a mesh."""
    single = random_layer(rng, settings, **parts)
    return single, sharded_like(single, mesh, parallel, **parts)


def transforms():
    """An input transform, and an output transform that is not linear."""
    into = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
    out = nnx.Sequential(nnx.Linear(6, 6, rngs=nnx.Rngs(1)), nnx.silu)
    return dict(routed_input_transform=into, routed_output_transform=out)


@nnx.jit
def value_and_gradients(layer, x, direction):
    """Output, aux, and gradients of parameters and input along `direction`."""

    def loss(layer, x):
        y, aux = layer(x, with_aux=True)
        return (y * direction).sum(), (y, aux)

    (_, (y, aux)), gradients = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
    return y, aux, gradients


def assert_equal_forward_and_backward(single, sharded, x, rng, context=contextlib.nullcontext):
    """Output, routing, loads and every gradient. Returns the aux of `sharded`."""
    direction = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    expected = value_and_gradients(single, x, direction)
    with context():
        return assert_equal_results(expected, value_and_gradients(sharded, x, direction))


def assert_equal_results(expected, actual):
    """Two results of `value_and_gradients`, but for the rows sent, which only a mesh has. Returns the second aux."""
    expected, actual = (jax.tree.map(np.asarray, results) for results in (expected, actual))
    aux = actual[1]
    actual = (actual[0], dataclasses.replace(aux, sent_rows=expected[1].sent_rows), actual[2])
    flat, _ = jax.tree.flatten_with_path(expected)
    for (path, one), other in zip(flat, jax.tree.leaves(actual), strict=True):
        tolerance = 1e-5 * max(1.0, np.abs(one).max(initial=0))
        np.testing.assert_allclose(other, one, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))
    return aux
