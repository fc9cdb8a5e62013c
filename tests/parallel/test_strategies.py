"""Every dispatch strategy: the layer on a mesh equals the layer on one device, forward and backward, and counts what it moves.

`make test` runs a design in which every pair of options meets at least once; `make test-slow` every strategy with every mesh of
eight devices and every layer, where tokens are and the options in turn; `MOE_JAX_WHOLE_PRODUCT=1` makes either run the whole
product.
"""

import functools
import os
import secrets

import jax.numpy as jnp
import numpy as np
import pytest
from oracles.dispatch import count_sent_rows
from oracles.layers_under_test import random_layer
from support.dispatch_cases import LAYERS, covering, in_turn, product, whole_product_is_asked_for
from support.sharded_layers import assert_equal_results, small_config, value_and_gradients

PRODUCT = product(lambda num_devices: num_devices <= 8)
CASES = PRODUCT if whole_product_is_asked_for() else covering(PRODUCT)
SLOW_CASES = [case for case in in_turn(PRODUCT) if case not in CASES]


@functools.cache
def on_one_device(layer):
    """A layer on one device with a problem, and what it answers: drawn and compiled once for all cases that share it."""
    seed = int(os.environ.get("MOE_JAX_TEST_SEED") or secrets.randbits(32))
    print(f"layer {layer!r} drawn from seed {seed}")
    rng = np.random.default_rng(seed)
    changes, parts = LAYERS[layer]
    parts = parts() if parts else {}
    single = random_layer(rng, small_config(**changes), **parts)
    # An odd number of tokens: some ranks have fewer than others, or none.
    x, direction = (jnp.asarray(rng.normal(size=(1, 5, 6)), jnp.float32) for _ in range(2))
    return single, parts, x, direction, value_and_gradients(single, x, direction)


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)], ids=str
)
def test_layer_on_a_mesh_equals_the_layer_on_one_device(case):
    single, parts, x, direction, expected = on_one_device(case.layer)
    sharded = case.layer_on_mesh(single, parts)
    aux = assert_equal_results(expected, value_and_gradients(sharded, x, direction))
    assert aux.dropped_rows == 0
    physical = aux.topk_ids[0] if sharded.replicas is None else np.asarray(sharded.replicas(aux.topk_ids[0]))
    assert aux.sent_rows.tolist() == count_sent_rows(physical, sharded.axes, sharded.config)
