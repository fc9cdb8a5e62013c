"""Compile the expert computation for a TPU that this machine lacks, and look for copies of weights that XLA makes for the kernels.

    python tests/aot/tpu_weight_copies.py [--tpu v6e] [--models qwen3-30b-a3b gpt-oss-120b]

A kernel takes its weights from device memory, in rows of the last axis. XLA copies them for it if they lie otherwise, or are part
of a larger array: both cost as much memory, and more traffic than the kernel itself. Compiled are one layer; layers to which
`jax.lax.scan` hands out their part of stacked weights; and layers that are given the stack, as a model's are
(`fused_moe(..., layer=)`). Each with the weights laid out as JAX does by default, which for sizes that are no multiple of 128 need
not be row by row, and as `jax.experimental.layout` can demand. It is a report: copies are no failure.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from tpu_counts import versions

from moe_jax.aot.hlo import read_computations, type_bytes
from moe_jax.aot.targets import TPU_ENVIRONMENT, TPU_TOPOLOGIES, TpuTarget
from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES
from moe_jax.kernels import fused_moe

PROGRAMS = ("layer", "layers handed out", "layers of a stack")
LAYOUTS = ("default", "row by row")
TOKENS = 128
"""So few that nothing but weights is large."""
NUM_LAYERS = 4
_IN_PLACE = frozenset(
    {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "custom-call", "conditional", "constant"}
)
"""Instructions that copy nothing, or are the kernels."""
_UNFINISHED = ("-start", "-update")
"""Ends of the names of instructions whose type is that of their operands and results together; the results come with "-done"."""


def copied_bytes(program: str, least: int) -> int:
    """Bytes of the arrays, each of at least so many, that a compiled program makes beside its kernels; loops count once.

    Args:
        program: text of a compiled program.
        least: bytes of an array that counts.
    """
    computations = read_computations(program)
    fused = {
        called
        for computation in computations.values()
        for instruction in computation.instructions
        if instruction.opcode == "fusion"
        for called in instruction.called
    }
    sizes = (
        type_bytes(instruction.type)
        for name, computation in computations.items()
        if name not in fused
        for instruction in computation.instructions
        if instruction.opcode not in _IN_PLACE and not instruction.opcode.endswith(_UNFINISHED)
    )
    return sum(size for size in sizes if size >= least)


def compiled(tpu: str, model: str, program: str, layout: str) -> dict[str, Any]:
    """What one program copies: bytes of a layer's weights, copies of weights, and memory for temporaries."""
    target, shape = TpuTarget.named(tpu), EXPERT_SHAPES[model]
    sharding = target.one_device()
    is_scanned = program != "layer"

    def placed(argument: jax.ShapeDtypeStruct, *, is_weight: bool) -> jax.ShapeDtypeStruct:
        sizes = (NUM_LAYERS, *argument.shape) if is_weight and is_scanned else argument.shape
        rows = Format(Layout(tuple(range(len(sizes)))), sharding)
        chosen = rows if is_weight and layout == "row by row" else sharding
        return jax.ShapeDtypeStruct(sizes, argument.dtype, sharding=chosen)

    arguments = {name: value for name, value in shape.fused_moe_arguments(TOKENS).items() if value is not None}
    weights = {name: value for name, value in arguments.items() if name in ("gate_up_proj", "down_proj")}
    matrices = [math.prod(value.shape) * value.dtype.itemsize for value in weights.values()]
    others = {name: placed(value, is_weight=False) for name, value in arguments.items() if name not in weights}
    weights = {name: placed(value, is_weight=True) for name, value in weights.items()}

    options: Any = dict(activation=shape.activation, implementation="pallas_tpu")

    def run(others: dict[str, Any], weights: dict[str, Any]) -> jax.Array:
        if program == "layer":
            return fused_moe(**others, **weights, **options)
        if program == "layers handed out":
            layers, of_layer = weights, lambda weights: weights
        else:
            layers, of_layer = jnp.arange(NUM_LAYERS), lambda layer: {**weights, "layer": layer}
        return jax.lax.scan(
            lambda x, layer: (fused_moe(**others | {"x": x}, **of_layer(layer), **options), None), others["x"], layers
        )[0]

    with target.lowering():
        lowered = jax.jit(run).lower(others, weights)
        try:
            executable = lowered.compile()
        except jax.errors.JaxRuntimeError as error:  # there may be no room for the copies
            return {"weight_bytes_of_a_layer": sum(matrices), "not_compiled": str(error).splitlines()[0]}
    return {
        "weight_bytes_of_a_layer": sum(matrices),
        "copied_bytes": copied_bytes(executable.as_text(), min(matrices) // 2),
        "temporary_bytes": executable.memory_analysis().temp_size_in_bytes,
    }


def compiled_in_child(case: tuple[str, str, str, str]) -> dict[str, Any]:
    """`compiled` in a process of its own."""
    command = [sys.executable, __file__, "--child", *case]
    child = subprocess.run(command, env={**os.environ, **TPU_ENVIRONMENT}, capture_output=True, text=True, check=False)
    row = dict(zip(("tpu", "model", "program", "layout"), case, strict=True))
    if child.returncode:
        return {**row, "failure": child.stderr[-400:]}
    return {**row, **json.loads(child.stdout.strip().splitlines()[-1])}


def main() -> None:
    """Compile, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tpu",
        default="v6e",
        choices=TPU_TOPOLOGIES,
        metavar="TPU",
        help=f"generation: {' '.join(TPU_TOPOLOGIES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=["qwen3-30b-a3b", "gpt-oss-120b"],
        choices=EXPERT_SHAPES,
        metavar="MODEL",
        help=f"models: {' '.join(EXPERT_SHAPES)} (default: qwen3-30b-a3b gpt-oss-120b)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/aot"),
        metavar="FOLDER",
        help="where to write the results (default: %(default)s)",
    )
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(compiled(*arguments.child)))
        return
    rows = []
    for case in itertools.product([arguments.tpu], arguments.models, PROGRAMS, LAYOUTS):
        rows.append(compiled_in_child(case))
        print(json.dumps(rows[-1]), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    result = {"versions": versions(), "static": True, "rows": rows}
    (arguments.output / "tpu_weight_copies.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
