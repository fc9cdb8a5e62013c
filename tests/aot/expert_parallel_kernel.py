"""Compile the expert-parallel kernel for slices of TPUs that this machine lacks, and print what it takes as JSON.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 python tests/aot/expert_parallel_kernel.py [--output FILE]

Needs jax and libtpu. A kernel that does not fit into vector memory does not compile.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES
from moe_jax.kernels.device import TPU_DEVICES, targeting
from moe_jax.kernels.expert_parallel import expert_parallel_moe, explain_expert_parallel_moe

SLICES = {"v5e:2x2": "v5e", "v6e:2x2": "v6e", "v5p:2x2x1": "v5p", "tpu7x:2x2x1": "7x"}
"""Slices of TPUs, and the name of their device."""
MODELS = ("deepseek-v3", "qwen3-30b-a3b")
TOKENS = (128, 2048)
"""Of each rank."""
MESHES = {"one axis": ("rank",), "two axes as one": ("outer", "inner"), "beside a data axis": ("inner",)}
"""Axes over which experts are split."""


def compiled(slice_name, model, tokens, mesh_name):
    """Compile one case and describe it."""
    axes = MESHES[mesh_name]
    devices = np.array(topologies.get_topology_desc(slice_name, platform="tpu").devices)
    if mesh_name == "one axis":
        mesh = Mesh(devices, ("rank",))
    else:
        mesh = Mesh(devices.reshape(2, -1), ("outer", "inner"))
    num_ranks = int(np.prod([mesh.shape[axis] for axis in axes]))
    shape = EXPERT_SHAPES[model]
    tokens_spec, experts_spec = PartitionSpec(mesh.axis_names), PartitionSpec(axes)
    local, specs, arguments = [], [], []
    for name, array in shape.fused_moe_arguments(tokens).items():
        if array is None:
            continue
        is_experts = name.endswith("_proj")
        rows = array.shape[0] // num_ranks if is_experts else array.shape[0]
        copies = num_ranks if is_experts else devices.size
        specs.append(experts_spec if is_experts else tokens_spec)
        local.append(jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype))
        sharding = NamedSharding(mesh, specs[-1])
        arguments.append(jax.ShapeDtypeStruct((rows * copies, *array.shape[1:]), array.dtype, sharding=sharding))

    def on_rank(*arrays):
        return expert_parallel_moe(*arrays, axis=axes, activation=shape.activation, implementation="pallas_tpu")

    program = jax.shard_map(on_rank, mesh=mesh, in_specs=tuple(specs), out_specs=tokens_spec, check_vma=False)
    start = time.perf_counter()
    with targeting(TPU_DEVICES[SLICES[slice_name]]):
        formulation = explain_expert_parallel_moe(*local, num_ranks=num_ranks, activation=shape.activation).formulation
        executable = jax.jit(program).lower(*arguments).compile()
    return {
        "slice": slice_name,
        "model": model,
        "tokens": tokens,
        "mesh": mesh_name,
        "ranks": num_ranks,
        "jax": jax.__version__,
        "formulation": formulation,
        "temporary_bytes": executable.memory_analysis().temp_size_in_bytes,
        "compiled_in_seconds": round(time.perf_counter() - start, 1),
    }


def cases():
    """All models and numbers of tokens on one axis, and the other meshes once per slice."""
    yield from ((*case, "one axis") for case in itertools.product(SLICES, MODELS, TOKENS))
    yield from ((slice_name, "qwen3-30b-a3b", 128, mesh) for slice_name in SLICES for mesh in list(MESHES)[1:])


def main():
    """Compile every case; 1 if one does not compile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--slices", nargs="+", choices=SLICES, default=list(SLICES), help="slices of TPUs (default: all)"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="models (default: all)")
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        choices=TOKENS,
        default=list(TOKENS),
        help="tokens of each rank (default: both)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write all of it to FILE")
    arguments = parser.parse_args()
    rows = []
    for slice_name, model, tokens, mesh_name in cases():
        if slice_name not in arguments.slices or model not in arguments.models or tokens not in arguments.tokens:
            continue
        try:
            rows.append(compiled(slice_name, model, tokens, mesh_name))
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            failure = str(error)[:2000]
            rows.append(dict(slice=slice_name, model=model, tokens=tokens, mesh=mesh_name, failure=failure))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any("failure" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
