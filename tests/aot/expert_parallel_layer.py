"""Compile a layer whose tokens travel by ragged all-to-all for hardware that this machine lacks; check what it moves, and when.

    JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 \
        python tests/aot/expert_parallel_layer.py [--targets v6e:2x2 ...] [--output FILE]

Needs jax with its CUDA plugin, and libtpu. On TPUs, and on GPUs of one host, the program must move tensors of the size of tokens
by ragged all-to-all only, none larger than the rows that a rank's tokens have; and of two micro-batches, one must compute experts
while rows of the other are on their way. Between hosts with GPUs XLA rewrites the collective; what it makes of it is printed,
with bytes.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax import MoEConfig, MoERunner, ParallelConfig, SharedExpertsConfig
from moe_jax.aot.collectives import Collective, read_collectives
from moe_jax.aot.hlo import read_computations
from moe_jax.aot.targets import GpuTarget, Target, target_named

TARGETS = ("v6e:2x2", "h200:1x8", "h200:2x8")
GPU_OPTIONS = {"xla_gpu_enable_latency_hiding_scheduler": True}
"""Without it XLA schedules no computation of one micro-batch between start and end of the other's collectives."""
KERNELS = ("tpu_custom_call", "mosaic_gpu")
"""Targets of custom calls that compute experts."""
TOKENS_PER_RANK, TOP_K, EXPERTS = 256, 8, 64
HIDDEN = 1408  # no multiple of 256: TPUs pad rows to one
MICRO_BATCHES = 2


def layer_on(mesh: Mesh) -> MoERunner:
    """A layer, without weights, whose ranks each hold some of its tokens and experts."""
    config = MoEConfig(
        hidden_size=HIDDEN,
        intermediate_size=768,
        num_experts=EXPERTS,
        top_k=TOP_K,
        shared_experts=SharedExpertsConfig(intermediate_size=768),
        parallel=ParallelConfig(
            expert_axis="rank",
            sequence_axis="rank",
            strategy="ragged_all_to_all",
            micro_batches=MICRO_BATCHES,
            buffer_factor=1.0,
        ),
        param_dtype=jnp.bfloat16,
    )
    return nnx.eval_shape(lambda: MoERunner(config, rngs=nnx.Rngs(0), mesh=mesh))


def compiled_text(target: Target, mesh: Mesh) -> str:
    """The compiled program of the layer's call."""
    graph, state = nnx.split(layer := layer_on(mesh))

    def placed(spec: PartitionSpec, leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    weights = jax.tree.map(placed, layer.partition_specs(), state, is_leaf=is_spec)
    x = jax.ShapeDtypeStruct((mesh.size * TOKENS_PER_RANK, HIDDEN), jnp.bfloat16)
    with target.lowering():
        lowered = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(weights, placed(PartitionSpec("rank"), x))
        return lowered.compile(GPU_OPTIONS if isinstance(target, GpuTarget) else None).as_text()


def expert_kernels_beside(text: str, collective: Collective) -> int:
    """Kernels that are scheduled between start and end of a collective."""
    instructions = read_computations(text)[collective.computation].by_name()
    return sum(
        any(kernel in instructions[name].attributes for kernel in KERNELS)
        for name in collective.meanwhile
        if instructions[name].opcode == "custom-call"
    )


def report(name: str) -> dict:
    """What the program for one target moves."""
    target = target_named(name)
    devices = np.array(target.topology().devices)
    started = time.perf_counter()
    text = compiled_text(target, Mesh(devices, ("rank",), axis_types=(AxisType.Auto,)))
    moved = [
        {
            "kind": collective.kind,
            "operand": collective.operand_types,
            "operand_bytes": collective.operand_bytes,
            "async": collective.is_async,
            "computing_meanwhile": len(collective.meanwhile),
            "expert_kernels_meanwhile": expert_kernels_beside(text, collective),
        }
        for collective in read_collectives(text)
    ]
    return {"target": name, "devices": devices.size, "seconds": time.perf_counter() - started, "collectives": moved}


def faults(found: dict) -> list[str]:
    """What a program for one host, or one slice, must not do."""
    padded_hidden = 256 * math.ceil(HIDDEN / 256)
    tokens = TOKENS_PER_RANK // MICRO_BATCHES
    rank_bytes = tokens * HIDDEN * 2
    most = tokens * TOP_K * padded_hidden * 2
    large = [one for one in found["collectives"] if one["operand_bytes"] >= rank_bytes]
    ragged = [one for one in large if one["kind"] == "ragged-all-to-all"]
    wrong = [f"moves {one['operand']} by {one['kind']}" for one in large if one not in ragged]
    expected = 2 * 2 * MICRO_BATCHES  # there and back, in the first round and in the loop of the others
    if len(ragged) != expected:
        wrong.append(f"has {len(ragged)} ragged all-to-alls instead of {expected}")
    wrong += [f"moves {one['operand_bytes']} bytes, more than {most}" for one in ragged if one["operand_bytes"] > most]
    if not any(one["async"] and one["computing_meanwhile"] for one in ragged):
        wrong.append("computes nothing while rows are on their way")
    if not any(one["async"] and one["expert_kernels_meanwhile"] for one in ragged):
        wrong.append("computes no experts of one micro-batch while rows of the other are on their way")
    return wrong


def main() -> int:
    """Compile, print and check; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--targets",
        nargs="+",
        default=TARGETS,
        metavar="TARGET",
        help=f"slices of TPUs, or hosts x GPUs per host (default: {' '.join(TARGETS)})",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the report to FILE as JSON")
    arguments = parser.parse_args()
    reports, status = [], 0
    for name in arguments.targets:
        found = report(name)
        several_gpu_hosts = getattr(target_named(name), "hosts", 1) > 1
        found["faults"] = [] if several_gpu_hosts else faults(found)
        reports.append(found)
        print(f"{name}: {found['devices']} devices, compiled in {found['seconds']:.0f} s")
        for one in found["collectives"]:
            beside = f"{one['computing_meanwhile']} computing, {one['expert_kernels_meanwhile']} of them expert kernels"
            print(
                f"  {one['kind']:20} {one['operand_bytes']:>12,} bytes  {', '.join(one['operand'])}"
                f"  {'async, meanwhile ' + beside if one['async'] else 'sync'}"
            )
        for fault in found["faults"]:
            print(f"  FAULT: {fault}")
            status = 1
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(reports, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
