"""Layers with random parameters, and those parameters as the dictionary that the oracle reads."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import MoEConfig, MoERunner
from moe_jax.experts.replicas import ReplicaMap


def random_layer(rng, config: MoEConfig, *, scale=0.3, values=None, mesh=None, **kwargs) -> MoERunner:
    """A layer of `config` whose floating parameters, biases included, are normal with standard deviation `scale`.

    Args:
        values: use this state instead of random numbers.
        mesh: passed on to the layer; parameters are split as it says.
    """
    # Built abstractly, because compiling an initializer for every shape takes longer than the tests.
    layer = nnx.eval_shape(lambda: MoERunner(config, rngs=nnx.Rngs(0), mesh=mesh, **kwargs))
    if config.num_redundant_experts:
        layer.replicas = ReplicaMap.initial(config.num_experts, config.num_redundant_experts)
    if values is None:
        values = jax.tree.map(lambda leaf: random_like(rng, leaf, scale), nnx.state(layer))
    if mesh is not None:
        values = jax.tree.map(
            lambda spec, leaf: jax.device_put(leaf, NamedSharding(mesh, spec)),
            layer.partition_specs(),
            values,
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )
    nnx.update(layer, values)
    return layer


def random_like(rng, leaf, scale=0.3):
    """Normal values in the shape and dtype of `leaf`; integers stay as they are."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return jnp.asarray(rng.normal(size=leaf.shape) * scale, leaf.dtype)


def parameters_of(module) -> dict:
    """Nested dictionary of float64 numpy arrays."""
    return jax.tree.map(lambda value: np.asarray(value, np.float64), nnx.to_pure_dict(nnx.state(module)))


def call(layer, *args, **kwargs):
    """The layer under `nnx.jit`: one compilation instead of one per operation."""
    static = {name: kwargs.pop(name) for name in ("with_aux",) if name in kwargs}
    return nnx.jit(lambda layer, args, kwargs: layer(*args, **kwargs, **static))(layer, args, kwargs)
