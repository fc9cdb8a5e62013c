"""Compile the TPU kernels that models of published shapes call, for TPUs that are not there, and report what they execute.

    make aot                                       (a sample of all, in .venv-aot)
    python tests/aot/tpu_kernels.py --all          (every kernel of every model, number of tokens and generation: hours)
    python tests/aot/tpu_kernels.py --search       (grouped matmuls side by side with megablox, every tiling of a list)

The expert computation is traced forward and backward; the kernels found in it are those that a user's program would call, with
the tiles that were chosen for them. Each is compiled alone. What the compiled code executes is then counted for uniform and for
Zipf-distributed choices of experts, and so are the bytes that it copies from and to device memory. All of it is static: it tells
no time. A kernel that does not compile, or needs more vector memory than there is, is a failure, which makes the exit code 1.
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax import MoEConfig, MoERunner
from moe_jax.aot.bundles import DUMP_VARIABLE, Schedule, dump_flags
from moe_jax.aot.scalar_unit import Execution
from moe_jax.aot.targets import TPU_ENVIRONMENT, TPU_TOPOLOGIES, TpuTarget
from moe_jax.aot.tpu_calls import TpuKernelCall, tpu_kernel_calls
from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES, ExpertShape
from moe_jax.config import ParallelConfig
from moe_jax.kernels import fused_moe, grouped_matmul

MODELS = (
    "mixtral-8x7b",
    "qwen3-30b-a3b",
    "qwen3-235b-a22b",
    "deepseek-v3-ep8",
    "deepseek-v3-ep32",
    "deepseek-v3-ep64",
    "gpt-oss-120b",
    "olmoe-1b-7b",
)
TOKENS = (8, 128, 2048, 8192)
ROUTINGS = ("uniform", "zipf")
COMPARED = ("qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v3-ep8")
COMPARED_TOKENS = 8192
LAYER_SLICES = ("v6e:2x2", "v6e:16x16")
TILINGS = tuple(itertools.product((128, 256, 512, 1024), (None,), (512, 768, 1024, 1536, 2048)))
"""Rows, contracted columns (None: all) and columns of a tile."""
Case = tuple[str, int, str]


def chosen_experts(shape: ExpertShape, tokens: int, routing: str) -> np.ndarray:
    """K different experts for each token; experts are equally likely, or as by Zipf's law, in an order of no meaning."""
    rng = np.random.default_rng(0)
    ranks = rng.permutation(shape.num_experts) + 1.0
    logits = -np.log(ranks) if routing == "zipf" else np.zeros(shape.num_experts)
    noise = rng.gumbel(size=(tokens, shape.num_experts))
    return np.argsort(-(logits + noise), axis=1)[:, : shape.top_k].astype(np.int32)


def traced(target: TpuTarget, case: Case, tiling: tuple[int, int | None, int] | None) -> Iterator[tuple[str, Any]]:
    """The kernels of a program, for each routing with the scalars that it causes."""
    model, tokens, program = case
    shape = EXPERT_SHAPES[model]
    arguments = shape.fused_moe_arguments(tokens)
    ids = arguments.pop("topk_ids")
    assert ids is not None
    if program in ("forward", "gradient"):
        leaves, structure = jax.tree.flatten(arguments)

        def forward(ids: jax.Array, *leaves: jax.Array) -> jax.Array:
            floating = jax.tree.unflatten(structure, leaves)
            return fused_moe(**floating, topk_ids=ids, activation=shape.activation, implementation="pallas_tpu")

        def gradient(ids: jax.Array, *leaves: jax.Array) -> Any:
            result, backward = jax.vjp(functools.partial(forward, ids), *leaves)
            return backward(result)

        with target.lowering():
            traced_program = jax.make_jaxpr(forward if program == "forward" else gradient)(ids, *leaves)
        for routing in ROUTINGS:
            known = {0: jnp.asarray(chosen_experts(shape, tokens, routing))}
            yield routing, tpu_kernel_calls(traced_program, known)
        return
    rows = math.ceil(tokens * shape.top_k / shape.ranks / 512) * 512
    projections = 2 if shape.activation.is_gated else 1
    weights = (shape.local_experts, projections * shape.intermediate_size, shape.hidden_size)
    operands = (
        jax.ShapeDtypeStruct((rows, shape.hidden_size), jnp.bfloat16),
        jax.ShapeDtypeStruct(weights, jnp.bfloat16),
        jax.ShapeDtypeStruct((shape.local_experts,), jnp.int32),
    )
    with target.lowering():
        traced_program = jax.make_jaxpr(functools.partial(multiplication, target, program, tiling))(*operands)
    for routing in ROUTINGS:
        found = chosen_experts(shape, tokens, routing)
        sizes = np.bincount(found[found < shape.local_experts], minlength=shape.local_experts)
        sizes = np.minimum(sizes, np.maximum(rows - np.concatenate([[0], np.cumsum(sizes)[:-1]]), 0))
        yield routing, tpu_kernel_calls(traced_program, {2: jnp.asarray(sizes, jnp.int32)})


def multiplication(target: TpuTarget, program: str, tiling: Any, rows: Any, weights: Any, sizes: Any) -> Any:
    """A grouped matmul with the tiles that are chosen for it (`tiling` None), or with those given."""
    if program == "megablox":
        from jax.experimental.pallas.ops.tpu.megablox import gmm

        tile_rows, _, columns = tiling
        sizes_of_tile = (tile_rows, weights.shape[2], columns)
        return gmm(rows, weights, sizes, preferred_element_type=rows.dtype, tiling=sizes_of_tile, transpose_rhs=True)
    if tiling is None:
        return grouped_matmul(rows, weights, sizes, implementation="pallas_tpu")
    from moe_jax.kernels.groups import Groups
    from moe_jax.kernels.mosaic_tpu.rows_kernel import multiply_rows
    from moe_jax.kernels.mosaic_tpu.schedule import VisitTable
    from moe_jax.kernels.mosaic_tpu.tiles import RowTiles

    tile_rows, _, columns = tiling
    chunk = min(tile_rows, max(128, target.device.mxu_size))
    tiles = RowTiles(rows=tile_rows, columns=columns, chunk=chunk, remainder=64, least=min(chunk, 128))
    table = VisitTable.of(Groups(jnp.cumsum(sizes) - sizes, sizes), rows.shape[0], tile_rows)
    return multiply_rows(rows, weights[:, None], table, tiles=tiles, output_dtype=rows.dtype, device=target.device)[0]


def figures(schedule: Schedule, execution: Execution, useful_multiplies: float) -> dict[str, Any]:
    """What is reported of one execution."""
    spills = execution.slots("VSTORE:SPILL")
    return {
        "bundles": execution.bundles,
        "matmul_slots": execution.slots("MATMUL"),
        "occupancy": round(execution.matmul_occupancy, 4),
        "spills": spills,
        "spills_per_billion_multiplies": round(spills / useful_multiplies * 1e9, 3) if useful_multiplies else 0,
        "read_bytes": sum(execution.read_bytes.values()),
        "written_bytes": sum(execution.written_bytes.values()),
    }


def useful_multiplies(shape: ExpertShape, tokens: int, routing: str, call: TpuKernelCall) -> float:
    """Products of numbers that the rows of local experts need, of the matrices that the call has."""
    found = chosen_experts(shape, tokens, routing)
    matrices = [array.shape for array in (*call.operands, *call.results) if len(array.shape) > 2]
    return float((found < shape.local_experts).sum()) * math.prod(matrices[0][1:]) if matrices else 0.0


def count(schedule: Schedule, by_routing: Any, position: int, shape: ExpertShape, tokens: int) -> dict[str, Any]:
    """The figures of one kernel for each routing, of the slower core; bytes are those of all cores."""
    counted = {}
    for routing, calls in by_routing.items():
        useful = useful_multiplies(shape, tokens, routing, calls[position])
        cores = [calls[position].execute(schedule, core=core) for core in range(schedule.cores)]
        each = [figures(schedule, execution, useful) for execution in cores]
        slowest = max(each, key=lambda found: found["bundles"])
        sums = {name: sum(found[name] for found in each) for name in ("read_bytes", "written_bytes")}
        counted[routing] = slowest | sums
    return counted


def compile_cases(target_name: str, cases: Iterable[tuple[Case, Any]], dumps: Path) -> Iterator[dict[str, Any]]:
    """A row of the table for each kernel that is not the same as one before."""
    target = TpuTarget.named(target_name)
    compiled: dict[str, Schedule] = {}
    for case, tiling in cases:
        model, tokens, program = case
        row = {"tpu": target_name, "model": model, "tokens": tokens, "program": program, "tiling": tiling}
        try:
            by_routing = dict(traced(target, case, tiling))
            for position, call in enumerate(by_routing[ROUTINGS[0]]):
                if call.sameness() not in compiled:
                    limit = target.device.vmem_bytes - 4 * 2**20
                    started = time.perf_counter()
                    limited = call.with_vmem_limit(limit) if program == "megablox" else call
                    compiled[call.sameness()] = limited.compile_alone(target, dumps)
                    row["seconds"] = round(time.perf_counter() - started, 1)
                schedule = compiled[call.sameness()]
                try:
                    counted = count(schedule, by_routing, position, EXPERT_SHAPES[model], tokens)
                except ValueError as error:  # what it executes depends on more than scalars
                    counted = {"not_counted": str(error)[:300]}
                details = {"kernel": call.name, "arrays": call.arrays(), "vmem_bytes": call.vmem_bytes()}
                yield {**row, **details, "code_bundles": len(schedule), **counted}
        except Exception as error:  # noqa: BLE001 - whatever jax or the compiler raises is a finding, listed with the others
            yield {**row, "failure": f"{type(error).__name__}: {str(error)[:600]}"}


def compile_layer(slice_name: str) -> str:
    """Compile one MoE layer, split over the chips of a slice, and say what came of it."""
    target = TpuTarget.named(slice_name)
    devices = np.array(target.topology().devices)
    mesh = Mesh(devices.reshape(-1, min(len(devices), 16)), ("data", "expert"))
    config = MoEConfig(
        hidden_size=2048,
        intermediate_size=768,
        num_experts=128,
        top_k=8,
        parallel=ParallelConfig(expert_axis="expert", data_axis="data"),
        implementation="pallas_tpu",
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
    )
    with target.lowering():
        layer = nnx.eval_shape(lambda: MoERunner(config, rngs=nnx.Rngs(0), mesh=mesh))
        graph, state = nnx.split(layer)

        def placed(array: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

        arguments = jax.tree.map(placed, state, layer.partition_specs())
        tokens = placed(
            jax.ShapeDtypeStruct((len(devices) * 128, config.hidden_size), jnp.bfloat16), PartitionSpec("data")
        )
        compiled = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(arguments, tokens).compile()
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    if not kernels:
        raise ValueError("no kernel in the compiled layer")
    return f"{slice_name}: a layer on {len(devices)} devices, {kernels} kernels"


def compile_layer_in_child(slice_name: str) -> dict[str, Any]:
    """`compile_layer` in a process of its own."""
    command = [sys.executable, __file__, "--layer", slice_name]
    environment = {**os.environ, **TPU_ENVIRONMENT}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    row = {"tpu": slice_name, "program": "layer"}
    if child.returncode:
        return {**row, "failure": f"exit code {child.returncode}: {child.stderr[-1000:]}"}
    return {**row, "compiled": child.stdout.strip().splitlines()[-1]}


def run_in_child(unit: tuple[str, list[tuple[Case, Any]]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """`compile_cases` in a process of its own, with a folder for dumps of its own, which is deleted."""
    target, cases = unit
    folder = Path(tempfile.mkdtemp(prefix="tpu-dumps-"))
    environment = {**os.environ, **TPU_ENVIRONMENT, DUMP_VARIABLE: dump_flags(folder)}
    command = [sys.executable, __file__, "--child", target, str(folder), json.dumps(cases)]
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = [json.loads(line.removeprefix("ROW ")) for line in child.stdout.splitlines() if line.startswith("ROW ")]
    for row in rows if arguments.verbose else ():
        print(*row.values(), flush=True)
    if child.returncode:
        rows.append({"tpu": target, "failure": f"exit code {child.returncode}: {child.stderr[-1000:]}"})
    return rows


def units(arguments: argparse.Namespace) -> list[tuple[str, list[tuple[Case, Any]]]]:
    """What each child process compiles: the cases of one model for one generation."""
    if arguments.search:
        return [
            (tpu, [((model, COMPARED_TOKENS, program), tiling) for tiling in TILINGS])
            for tpu, model, program in itertools.product(arguments.tpus, arguments.compare, ("grouped", "megablox"))
        ]
    if arguments.all:
        programs = ("forward", "gradient")
        return [
            (tpu, [((model, tokens, program), None) for tokens in arguments.tokens for program in programs])
            for tpu, model in itertools.product(arguments.tpus, arguments.models)
        ]
    found = []  # every model for one generation and number of tokens, every other one backward too
    for number, model in enumerate(arguments.models):
        tpu = arguments.tpus[number % len(arguments.tpus)]
        tokens = arguments.tokens[(number + number // 4) % len(arguments.tokens)]
        found.append((tpu, [((model, tokens, "gradient" if number % 2 else "forward"), None)]))
    return found


HEADINGS = (
    "tpu", "model", "tokens", "program", "kernel", "code", "bundles uniform", "zipf", "occupancy", "spills/G", "VMEM MiB",
    "read MiB", "zipf", "written MiB", "",
)  # fmt: skip


def table(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The rows as lines of text, with headings."""
    cells = [HEADINGS]
    for row in rows:
        name = row.get("program", "?") + (f" {row['tiling']}" if row.get("tiling") else "")
        texts = [str(row.get(key, "")) for key in ("tpu", "model", "tokens")] + [name, row.get("kernel", "")]
        if "failure" in row:
            cells.append((*texts, *[""] * 9, "FAILED"))
            continue
        if "not_counted" in row:
            cells.append((*texts, str(row["code_bundles"]), "not counted", *[""] * 8))
            continue
        uniform, zipf = row["uniform"], row["zipf"]
        mebibytes = [uniform["read_bytes"], zipf["read_bytes"], uniform["written_bytes"]]
        numbers = (row["code_bundles"], uniform["bundles"], zipf["bundles"], uniform["occupancy"])
        spills = uniform["spills_per_billion_multiplies"]
        sizes = (f"{value / 2**20:.1f}" for value in (row["vmem_bytes"], *mebibytes))
        cells.append((*texts, *map(str, numbers), str(spills), *sizes, ""))
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    for line in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def best(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Ours against megablox, each at the tiling with fewest bundles for each routing."""
    results = [row for row in rows if "uniform" in row]
    key = lambda row: (row["tpu"], row["model"])  # noqa: E731 - used twice, in one place
    for (tpu, model), group in itertools.groupby(sorted(results, key=key), key):
        members = list(group)
        for routing in ROUTINGS:
            least = {}
            for program in ("grouped", "megablox"):
                of_program = [row for row in members if row["program"] == program]
                if of_program:
                    least[program] = min(of_program, key=lambda row: row[routing]["bundles"])
            if len(least) == 2:
                ours, theirs = (least[program][routing] for program in ("grouped", "megablox"))
                ratio = ours["bundles"] / theirs["bundles"]
                yield (
                    f"{tpu} {model} {routing}: {ratio:.3f} of megablox's bundles"
                    f" ({least['grouped']['tiling']}: {ours['bundles']}, {least['megablox']['tiling']}: {theirs['bundles']});"
                    f" occupancy {ours['occupancy']} / {theirs['occupancy']}, spills per billion multiplies"
                    f" {ours['spills_per_billion_multiplies']} / {theirs['spills_per_billion_multiplies']}"
                )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tpus", nargs="+", default=list(TPU_TOPOLOGIES), choices=TPU_TOPOLOGIES, metavar="TPU")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=EXPERT_SHAPES, metavar="MODEL")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--all", action="store_true", help="every kernel, instead of a sample")
    parser.add_argument(
        "--compare", nargs="+", default=list(COMPARED), choices=COMPARED, help="models that are searched"
    )
    parser.add_argument("--search", action="store_true", help="compare with megablox over a list of tilings")
    parser.add_argument("--verbose", action="store_true", help="print rows as they come")
    parser.add_argument("--jobs", type=int, default=2, help="how many processes compile side by side")
    parser.add_argument("--output", type=Path, default=Path("build/aot"))
    parser.add_argument("--json", type=Path, help="where to write the result instead")
    parser.add_argument("--layer", help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Compile, print, and say whether all is well."""
    arguments = parse_arguments()
    if arguments.layer:
        print(compile_layer(arguments.layer))
        return 0
    if arguments.child:
        target, folder, cases = arguments.child
        for row in compile_cases(target, [(tuple(case), tiling) for case, tiling in json.loads(cases)], Path(folder)):
            print("ROW", json.dumps(row), flush=True)
        return 0
    arguments.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if arguments.search:
        print("tilings (rows, contracted, columns):", *TILINGS)
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        rows = [
            row for found in pool.map(lambda unit: run_in_child(unit, arguments), units(arguments)) for row in found
        ]
    layers = [] if arguments.search else [compile_layer_in_child(slice_name) for slice_name in LAYER_SLICES]
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    command = " ".join(["python", *sys.argv])
    result = {"versions": versions, "command": command, "static": True, "rows": rows, "layers": layers}
    file = arguments.json or arguments.output / "tpu_kernels.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(*table(rows), sep="\n")
    print(*best(rows), sep="\n")
    failures = [row for row in rows if "failure" in row]
    print(f"\njax {versions['jax']}, libtpu {versions['libtpu']}: {len(rows)} rows, {len(failures)} failures,")
    print(f"in {time.perf_counter() - started:.0f} s")
    for row in failures:
        print("FAILED", row.get("tpu"), row.get("model"), row.get("tokens"), row.get("program"), row["failure"])
    excused = arguments.search and len(failures) < len(rows)  # of a list of tilings, not all fit every shape
    return 1 if (failures and not excused) or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
