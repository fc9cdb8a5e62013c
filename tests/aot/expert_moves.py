"""Compiles the moving of experts between ranks for TPUs and GPUs that this machine lacks, and checks what memory it needs.

    JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 \\
        python tests/aot/expert_moves.py [TARGET ...]

Prints the temporary memory in rows (the weights of one expert in one layer) and ends with status 1 if it exceeds one layer's
local experts, one row and the tables, if the result doesn't take the place of the argument, or if no ragged all-to-all is
left.
"""

import argparse
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.aot.targets import check_environment, target_named
from moe_jax.device_layouts import home_row_by_row
from moe_jax.load_balancing.exchange import ExpertSharding, jitted_move

NUM_LAYERS, SLOTS = 3, 16
ROWS = {"gate_up_proj of Qwen3-30B-A3B": (2, 768, 2048), "down_proj of gpt-oss-120b": (2880, 2880)}
TABLES = 2**16
"""Bytes for which slot takes its expert from where."""


def compile_move(target: Any, row: tuple[int, ...]) -> Any:
    """The program that moves bfloat16 experts of that shape over all devices of the target."""
    devices = np.array(target.topology().devices)
    mesh = Mesh(devices, ("expert",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, "expert")
    slots = SLOTS * devices.size
    shape = (NUM_LAYERS, slots, *row)
    home = home_row_by_row(NamedSharding(mesh, spec), len(shape))
    experts = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=home)
    source = jax.ShapeDtypeStruct((NUM_LAYERS, slots), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    sharding = ExpertSharding(mesh, spec, is_stacked=True)
    with target.lowering():
        return jitted_move((sharding,), (experts.format,)).lower((experts,), (source,)).compile()


def main() -> int:
    """Compile for every target and every row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "targets",
        nargs="*",
        default=["v6e:2x2"],
        metavar="TARGET",
        help="slices of TPUs or hosts x GPUs per host, such as v6e:2x2 or h200:1x8 (default: v6e:2x2)",
    )
    targets = parser.parse_args().targets
    check_environment()
    failed = False
    for name in targets:
        for label, row in ROWS.items():
            program = compile_move(target_named(name), row)
            memory, row_bytes = program.memory_analysis(), 2 * int(np.prod(row))
            temporary = memory.temp_size_in_bytes / row_bytes
            collectives = len(re.findall(r"ragged-all-to-all(?:-start)?\(", program.as_text()))
            is_good = (
                memory.temp_size_in_bytes <= (SLOTS + 1) * row_bytes + TABLES
                and memory.alias_size_in_bytes >= NUM_LAYERS * SLOTS * row_bytes
                and collectives == 1
            )
            failed |= not is_good
            print(
                f"{'ok    ' if is_good else 'FAILED'} {name}, {label}: {temporary:.2f} rows beside the "
                f"{NUM_LAYERS} x {SLOTS} that move, {collectives} ragged all-to-all",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
