"""Compile MoE layers and models, split over the chips of a slice, for slices of TPUs that this machine lacks.

    python tests/aot/tpu_slices.py [--slices v6e:2x2 v6e:16x16] [--programs layer model]

The layer is `MoERunner` with the sizes of Qwen3-30B-A3B; the model is that one with fewer layers, built from its `config.json`
as `from_pretrained` builds it; the generation is that of gpt-oss-20b, prefill and decode, and that of Qwen3-30B-A3B with tokens
split over the ranks of their experts, and the kernel that sends them there by remote DMA. Experts are split over up to 16 chips,
tokens over the others, and the kernels run inside `jax.shard_map`. What is asked for is the `pallas_tpu` implementation: if a
compiled program has none of its kernels, that is a failure, as is a copy of expert weights during a generation. A failure makes
the exit code 1.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from slice_models import GPT_OSS, QWEN3_MOE
from tpu_counts import versions
from tpu_weight_copies import copied_bytes

from moe_jax import MoEConfig, MoERunner
from moe_jax.aot.model_programs import abstract_model, compile_generation
from moe_jax.aot.sizes import Sizes
from moe_jax.aot.targets import TPU_ENVIRONMENT, TpuTarget
from moe_jax.config import ParallelConfig
from moe_jax.families import get_family

SLICES = ("v6e:2x2", "v6e:16x16")
PROGRAMS = ("layer", "model", "generation", "remote DMA")
MOST_EXPERT_RANKS = 16
TOKENS = 128
"""Of each device."""
KERNEL = 'custom_call_target="tpu_custom_call"'
PARALLEL = ParallelConfig(expert_axis="expert", data_axis="data")


def mesh_of(target: TpuTarget) -> Mesh:
    """All chips of the slice."""
    devices = np.array(target.topology().devices)
    return Mesh(devices.reshape(-1, min(devices.size, MOST_EXPERT_RANKS)), ("data", "expert"))


def on_mesh(mesh: Mesh, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    """An argument that is split over a mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def lowered_layer(mesh: Mesh) -> Any:
    """A layer on `TOKENS` tokens of each device."""
    config = MoEConfig(
        hidden_size=QWEN3_MOE["hidden_size"],
        intermediate_size=QWEN3_MOE["moe_intermediate_size"],
        num_experts=QWEN3_MOE["num_experts"],
        top_k=QWEN3_MOE["num_experts_per_tok"],
        parallel=PARALLEL,
        implementation="pallas_tpu",
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
    )
    layer = nnx.eval_shape(lambda: MoERunner(config, rngs=nnx.Rngs(0), mesh=mesh))
    graph, state = nnx.split(layer)
    specs = dict(nnx.to_flat_state(layer.partition_specs()))
    arguments = [
        (path, variable.replace(on_mesh(mesh, variable.shape, variable.dtype, specs[path])))
        for path, variable in nnx.to_flat_state(state)
    ]
    tokens = on_mesh(mesh, (mesh.size * TOKENS, config.hidden_size), jnp.bfloat16, PartitionSpec("data"))
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(nnx.from_flat_state(arguments), tokens)


def lowered_model(mesh: Mesh) -> Any:
    """A model on one sequence of `TOKENS` tokens for each device."""
    decoder = get_family(QWEN3_MOE).build_decoder(QWEN3_MOE)
    model = abstract_model(decoder, dtype=jnp.bfloat16, mesh=mesh, parallel=PARALLEL, implementation="pallas_tpu")
    graph, state = nnx.split(model)
    ids = on_mesh(mesh, (mesh.size, TOKENS), jnp.int32, PartitionSpec("data"))
    return jax.jit(lambda state, ids: nnx.merge(graph, state)(ids)).lower(state, ids)


def compiled(slice_name: str, program: str) -> dict[str, Any]:
    """What came of compiling one program."""
    target = TpuTarget.named(slice_name)
    mesh = mesh_of(target)
    if program == "generation":
        return compiled_generation(target, mesh, GPT_OSS, PARALLEL)
    if program == "remote DMA":
        parallel = ParallelConfig(expert_axis="expert", data_axis=("data", "expert"), strategy="remote_dma")
        return compiled_generation(target, mesh, QWEN3_MOE, parallel)
    started = time.perf_counter()
    with target.lowering():
        executable = {"layer": lowered_layer, "model": lowered_model}[program](mesh).compile()
    kernels = executable.as_text().count(KERNEL)
    if not kernels:
        raise ValueError("no kernel in the compiled program")
    return {
        "devices": mesh.size,
        "kernels": kernels,
        "temporary_bytes": executable.memory_analysis().temp_size_in_bytes,
        "seconds": round(time.perf_counter() - started, 1),
    }


def compiled_generation(
    target: TpuTarget, mesh: Mesh, config: dict[str, Any], parallel: ParallelConfig
) -> dict[str, Any]:
    """What came of compiling prefill and decode, none of which may copy expert weights."""
    decoder = get_family(config).build_decoder(config)
    with target.lowering():
        model = abstract_model(decoder, dtype=jnp.bfloat16, mesh=mesh, parallel=parallel, implementation="pallas_tpu")
    # A rank has the tokens of all ranks that share the experts with it: so few that nothing but weights is large.
    prompt_length = 4 * TOKENS // mesh.shape["expert"]
    sizes = Sizes(batch_size=mesh.size, prompt_length=prompt_length, cache_length=2 * TOKENS)
    experts = decoder.layers[0].feed_forward
    matrices_of_a_layer = (
        experts.num_experts // mesh.shape["expert"] * experts.hidden_size * experts.intermediate_size * 2
    )
    seconds = 0.0
    for program in compile_generation(model, target, sizes):
        if program.refused is not None:
            raise ValueError(f"{program.name} does not compile: {program.refused}")
        if not program.text.count(KERNEL):
            raise ValueError(f"no kernel in {program.name}")
        if copied := copied_bytes(program.text, matrices_of_a_layer * 3 // 4):
            raise ValueError(f"{program.name} copies {copied} bytes of weights")
        seconds += program.seconds
    return {"devices": mesh.size, "copied_bytes": 0, "seconds": round(seconds, 1)}


def compiled_in_child(slice_name: str, program: str) -> dict[str, Any]:
    """`compiled` in a process of its own."""
    command = [sys.executable, __file__, "--child", slice_name, program]
    child = subprocess.run(command, env={**os.environ, **TPU_ENVIRONMENT}, capture_output=True, text=True, check=False)
    row = {"tpu": slice_name, "program": program}
    if child.returncode:
        return {**row, "failure": f"exit code {child.returncode}: {child.stderr[-1500:]}"}
    return {**row, **json.loads(child.stdout.strip().splitlines()[-1])}


def main() -> int:
    """Compile, print, and say whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--slices",
        nargs="+",
        default=list(SLICES),
        metavar="SLICE",
        help=f"slices of TPUs (default: {' '.join(SLICES)})",
    )
    parser.add_argument(
        "--programs",
        nargs="+",
        default=list(PROGRAMS),
        choices=PROGRAMS,
        metavar="PROGRAM",
        help=f"programs: {' '.join(PROGRAMS)} (default: all)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/aot"),
        metavar="FOLDER",
        help="where to write the results (default: %(default)s)",
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(compiled(*arguments.child)))
        return 0
    rows = []
    for slice_name, program in itertools.product(arguments.slices, arguments.programs):
        rows.append(compiled_in_child(slice_name, program))
        print(json.dumps(rows[-1]), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    result = {"versions": versions(), "static": True, "rows": rows}
    (arguments.output / "tpu_slices.json").write_text(json.dumps(result, indent=1) + "\n")
    return int(any("failure" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
