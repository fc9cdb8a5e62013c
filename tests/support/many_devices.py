"""Run as a program with more simulated devices than the tests have: layers on all of them against the layer on one.

Of the cases with so many devices, those whose turn it is; all of them with `MOE_JAX_WHOLE_PRODUCT=1`.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from oracles.dispatch import count_sent_rows
from oracles.layers_under_test import random_layer
from support.dispatch_cases import LAYERS, in_turn, product, whole_product_is_asked_for
from support.sharded_layers import SHARED, assert_equal_results, small_config, value_and_gradients


def main(num_devices: int) -> None:
    assert jax.device_count() == num_devices
    cases = product(lambda devices: devices == num_devices)
    if not whole_product_is_asked_for():
        cases = in_turn(cases)[:: len(LAYERS) + 1]  # so that layers come in turn, too
    rng = np.random.default_rng()
    for case in cases:
        changes, parts = LAYERS[case.layer]
        parts = parts() if parts else {}
        # Experts, and features of shared ones, of which every rank can have a share.
        changes = changes | dict(num_experts=32 - changes.get("num_redundant_experts", 0))
        if "shared_experts" in changes:
            changes["shared_experts"] = dataclasses.replace(SHARED, intermediate_size=16)
        single = random_layer(rng, small_config(**changes), **parts)
        x, direction = (jnp.asarray(rng.normal(size=(1, 21, 6)), jnp.float32) for _ in range(2))
        expected = value_and_gradients(single, x, direction)
        sharded = case.layer_on_mesh(single, parts)
        aux = assert_equal_results(expected, value_and_gradients(sharded, x, direction))
        physical = aux.topk_ids[0] if sharded.replicas is None else np.asarray(sharded.replicas(aux.topk_ids[0]))
        assert aux.sent_rows.tolist() == count_sent_rows(physical, sharded.axes, sharded.config)
        print("equal:", case, flush=True)
        jax.clear_caches()
    print(f"{len(cases)} cases are equal")


if __name__ == "__main__":
    main(int(sys.argv[1]))
