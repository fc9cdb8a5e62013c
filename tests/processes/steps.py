"""Steps over all processes of a job without end, one line each: what `test_lost_processes.py` interrupts.

python steps.py COORDINATOR COUNT NUMBER
"""

import itertools
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.parallel import create_mesh, initialize_distributed


def main():
    coordinator, count, number = sys.argv[1:]
    initialize_distributed(coordinator, int(count), int(number))
    mesh = create_mesh({"data": jax.device_count()})
    split = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.device_put(np.ones(jax.device_count(), np.float32), split)
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(lambda x: x.sum(), out_shardings=everywhere)
    for index in itertools.count():
        print(index, float(step(x)), flush=True)


if __name__ == "__main__":
    main()
