"""Layers with random parameters, and those parameters as the dictionary that the oracle reads."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import MoEConfig, MoERunner


def randomize(module, rng, scale=0.3):
    """Give every floating variable of `module`, biases included, normal values of standard deviation `scale`."""

    def draw(value):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return value
        values = jnp.asarray(rng.normal(size=value.shape) * scale, value.dtype)
        return jax.device_put(values, value.sharding)

    nnx.update(module, jax.tree.map(draw, nnx.state(module)))
    return module


def random_layer(rng, config: MoEConfig, **kwargs) -> MoERunner:
    """A layer of `config` whose parameters are all random and non-trivial."""
    return randomize(MoERunner(config, rngs=nnx.Rngs(int(rng.integers(2**31))), **kwargs), rng)


def parameters_of(module) -> dict:
    """Nested dictionary of float64 numpy arrays."""
    return jax.tree.map(lambda value: np.asarray(value, np.float64), nnx.to_pure_dict(nnx.state(module)))
