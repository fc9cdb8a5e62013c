"""Run as a program with more fake devices than the tests have: layers on all of them against the layer on one."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from oracles.dispatch import count_sent_rows
from support.sharded_layers import SHARED, assert_equal_forward_and_backward, layer_pair, make_mesh, small_config

from moe_jax import ParallelConfig

CASES = {
    16: [(1, 16, 1, "padded_all_to_all", "expert"), (2, 4, 2, "allgather_reducescatter", "expert")],
    32: [(2, 8, 2, "ragged_all_to_all", ("data", "expert"))],
}


def main(num_devices: int) -> None:
    assert jax.device_count() == num_devices
    rng = np.random.default_rng()
    for data, expert, tensor, strategy, expert_axis in CASES[num_devices]:
        parallel = ParallelConfig(
            strategy=strategy, expert_axis=expert_axis, tensor_axis="tensor", data_axis="data", sequence_axis="expert"
        )
        settings = small_config(shared_experts=SHARED, num_experts=32, top_k=3)
        single, sharded = layer_pair(rng, settings, make_mesh(data, expert, tensor), parallel)
        x = jnp.asarray(rng.normal(size=(1, 21, 6)), jnp.float32)
        aux = assert_equal_forward_and_backward(single, sharded, x, rng)
        assert aux.sent_rows.tolist() == count_sent_rows(aux.topk_ids[0], sharded.axes, sharded.config)
        print("equal", data, expert, tensor, strategy)


if __name__ == "__main__":
    main(int(sys.argv[1]))
