"""Compile every GPU kernel that models of published shapes call, for GPUs that this machine lacks; check what the compilers say.

    make aot-gpu                                        (every kernel, in .venv-aot; part of make aot)
    python tests/aot/gpu_kernels.py [--gpus h200 b200] [--models olmoe-1b-7b ...] [--tokens 1 8 ...] [--output build/aot]

For each GPU, model and number of tokens, the expert computation is traced forward and backward, without compiling it; the
kernels found in it are those that a user's program would call, with the tiles that were chosen for them. Each distinct one is
compiled alone. Calls that differ in nothing but their numbers of rows share one compilation, that of most rows. Three shapes
are of no model: one is less regular than any, one smaller, and one narrower than a tile.

A kernel fails if it spills, if ptxas says that it runs its wgmma one by one or ignores how registers are shared out, if a loop
starts a tensor-core instruction without waiting for the one before, if a fence, a barrier or a wait is missing between its own
writes to shared memory and what copies or multiplies from there, if it needs more shared memory than there is, or if the
compilers reported nothing. Any failure makes the exit code 1.
Prints a table and writes gpu_kernels.json, and the dumps of all kernels, to the output folder.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from moe_jax.aot.kernel_calls import KernelCall, kernel_calls
from moe_jax.aot.targets import GPU_ENVIRONMENT, GpuTarget, check_environment
from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES, TOKENS, ExpertShape
from moe_jax.kernels import fused_moe, grouped_matmul

GPUS = ("h200", "b200")  # the h100 is the same as the h200 to the compilers
IRREGULAR = ExpertShape(name="irregular", hidden_size=1472, intermediate_size=336, num_experts=8, top_k=4)
"""Of no model: H, 2I and I are multiples of 128, 64 and 32 bytes, which are different swizzles."""
IRREGULAR_TOKENS = (5, 251)
"""With these, a grouped matmul has 20 and 1004 rows: no multiples of 8, streamed and tiled."""
FEW_TILES = ExpertShape(name="few-tiles", hidden_size=512, intermediate_size=192, num_experts=4, top_k=2)
"""Of no model either: so small that the smaller tiles, too, are chosen by default, of which published models need only some."""
FEW_TILES_TOKENS = (64, 128, 1152)
NARROW = ExpertShape(name="narrow", hidden_size=64, intermediate_size=32, num_experts=8, top_k=2)
"""The sizes of the README's layer: a tile reaches beyond every result."""
NARROW_TOKENS = (8, 128, 1024)
SHAPES = {**EXPERT_SHAPES, **{shape.name: shape for shape in (IRREGULAR, FEW_TILES, NARROW)}}
OWN_TOKENS = {IRREGULAR.name: IRREGULAR_TOKENS, FEW_TILES.name: FEW_TILES_TOKENS, NARROW.name: NARROW_TOKENS}
"""Of the shapes that are not compiled for the numbers of tokens asked for."""
IMPLEMENTATION = "pallas_gpu"
Program = tuple[Callable[..., Any], tuple[Any, ...]]
Result = TypeVar("Result")


def gradient_of(function: Callable[..., jax.Array], arguments: tuple[Any, ...]) -> Program:
    """The function with its backward pass; which cotangent it gets is of no interest."""

    def forward_and_backward(*arguments: Any) -> Any:
        result, backward = jax.vjp(function, *arguments)
        return backward(result)

    return forward_and_backward, arguments


def fused_moe_program(shape: ExpertShape, tokens: int) -> Program:
    """The expert block, as a function of its floating arguments."""
    floating = shape.fused_moe_arguments(tokens)
    topk_ids = floating.pop("topk_ids")

    def block(floating: dict[str, Any], topk_ids: jax.Array) -> jax.Array:
        return fused_moe(
            **floating,
            topk_ids=topk_ids,
            activation=shape.activation,
            expected_rows=shape.expected_rows(tokens),
            implementation=IMPLEMENTATION,
        )

    return block, (floating, topk_ids)


def grouped_matmul_program(shape: ExpertShape, tokens: int) -> Program:
    """The down projection alone, of rows that are sorted already."""
    rows = shape.expected_rows(tokens)
    down_proj = shape.fused_moe_arguments(tokens)["down_proj"]
    assert down_proj is not None
    arguments = (
        jax.ShapeDtypeStruct((rows, shape.intermediate_size), down_proj.dtype),
        down_proj,
        jax.ShapeDtypeStruct((shape.local_experts,), jnp.int32),
    )
    return functools.partial(grouped_matmul, implementation=IMPLEMENTATION), arguments


PROGRAMS: dict[str, Callable[[ExpertShape, int], Program]] = {
    "fused_moe": fused_moe_program,
    "fused_moe gradient": lambda shape, tokens: gradient_of(*fused_moe_program(shape, tokens)),
    "grouped_matmul gradient": lambda shape, tokens: gradient_of(*grouped_matmul_program(shape, tokens)),
}


@dataclasses.dataclass(eq=False)
class Case:
    """A kernel to be compiled, and where it was found."""

    call: KernelCall
    """The one with most rows of those whose compiled code is the same."""
    programs: list[str] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    calls: int = 0

    def add(self, call: KernelCall, program: str, tokens: int) -> None:
        """Count a call whose compiled code is the same."""
        self.calls += 1
        if program not in self.programs:
            self.programs.append(program)
        if tokens not in self.tokens:
            self.tokens.append(tokens)
        self.call = max(self.call, call, key=lambda call: sum(math.prod(operand.shape) for operand in call.operands))

    def arrays(self) -> str:
        """What it computes with, tables aside: `[rows,2048] [256,768,2048] -> [rows,768]`."""
        operands = [array for array in self.call.operands if len(array.shape) > 1]
        texts = [" ".join(str(list(a.shape)).replace(" ", "") for a in side) for side in (operands, self.call.results)]
        return " -> ".join(texts)


def traced_kernels(program: str, shape: ExpertShape, tokens: int, target: GpuTarget) -> tuple[KernelCall, ...]:
    """The kernels that a program calls on a target."""
    with target.lowering():
        function, arguments = PROGRAMS[program](shape, tokens)
        return kernel_calls(jax.make_jaxpr(function)(*arguments))


def compile_model(gpu: str, model: str, tokens: Iterable[int], output: Path) -> list[dict[str, Any]]:
    """The rows of the table for one model on one GPU."""
    target, shape = GpuTarget.named(gpu), SHAPES[model]
    rows: list[dict[str, Any]] = []
    cases: dict[str, Case] = {}
    for program, num_tokens in itertools.product(PROGRAMS, tokens):
        found, failures = attempt(traced_kernels, program, shape, num_tokens, target)
        if failures:
            rows.append({"kernel": program, "tokens": [num_tokens], "failures": failures})
        for call in found or ():
            cases.setdefault(call.sameness(), Case(call)).add(call, program, num_tokens)
    dumps = output / "dumps"
    dumps.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases.values()):
        dump = dumps / f"{gpu}-{model}-{number}-{case.call.name}.txt"
        report, failures = attempt(case.call.compile_alone, target, dump)
        if report is not None:
            failures = list(report.shortcomings(target.device))
        rows.append(
            {
                "kernel": case.call.name,
                "programs": case.programs,
                "tokens": case.tokens,
                "calls": case.calls,
                "arrays": case.arrays(),
                "buffers": case.call.buffers(),
                "dump": dump.name,
                "report": dataclasses.asdict(report) if report else None,
                "failures": failures,
            }
        )
    return [{"gpu": gpu, "model": model, **row} for row in rows]


def attempt(function: Callable[..., Result], *arguments: Any) -> tuple[Result | None, list[str]]:
    """The function's result, or what it raised."""
    try:
        return function(*arguments), []
    except Exception as error:  # noqa: BLE001 - whatever jax or a compiler raises is a finding, listed with the others
        return None, [f"{type(error).__name__}: {str(error)[:1000]}"]


def run_in_child(gpu: str, model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """`compile_model` in a process of its own: a compiler that aborts takes no other model with it."""
    result = arguments.output / f"{gpu}-{model}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--child", "--gpus", gpu, "--models", model]
    command += ["--output", str(arguments.output), "--tokens", *map(str, arguments.tokens)]
    child = subprocess.run(command, env={**os.environ, **GPU_ENVIRONMENT}, capture_output=True, text=True, check=False)
    if child.returncode or not result.exists():
        reason = f"exit code {child.returncode}: {child.stderr[-2000:]}"
        return [{"gpu": gpu, "model": model, "kernel": "?", "failures": [reason]}]
    return json.loads(result.read_text())


HEADINGS = ("gpu", "model", "kernel", "arrays", "tile buffers", "tokens", "registers", "shared", "spills", "mma", "")


def table(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The rows as lines of text, with headings."""
    cells = [HEADINGS]
    for row in rows:
        report = row.get("report")
        tokens = row.get("tokens", [])
        figures = ("", "", "", "")
        if report is not None:
            spills = report["spill_store_bytes"] + report["spill_load_bytes"]
            counts = (report["registers"], report["shared_memory_bytes"], spills, report["tensor_core_instructions"])
            figures = tuple(map(str, counts))
        span = f"{min(tokens)}-{max(tokens)}" if tokens else ""
        texts = (row["gpu"], row["model"], row["kernel"], row.get("arrays", ""), " ".join(row.get("buffers", ())), span)
        cells.append((*texts, *figures, "FAILED" if row["failures"] else ""))
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    for line in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gpus", nargs="+", default=GPUS, metavar="GPU", help=f"h100, h200 or b200 (default: {' '.join(GPUS)})"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(SHAPES),
        choices=SHAPES,
        metavar="MODEL",
        help=f"models: {' '.join(SHAPES)} (default: all)",
    )
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        default=TOKENS,
        metavar="N",
        help=f"numbers of tokens (default: {' '.join(map(str, TOKENS))})",
    )
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="processes that compile side by side (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/aot"),
        metavar="FOLDER",
        help="where to write gpu_kernels.json and the dumps (default: %(default)s)",
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Compile, print, and say whether all is well."""
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.child:
        (gpu,), (model,) = arguments.gpus, arguments.models
        tokens = OWN_TOKENS.get(model, arguments.tokens)
        result = compile_model(gpu, model, tokens, arguments.output)
        (arguments.output / f"{gpu}-{model}.json").write_text(json.dumps(result))
        return 0
    check_environment()
    started = time.perf_counter()
    units = [(gpu, model) for gpu in arguments.gpus for model in arguments.models]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda unit: run_in_child(*unit, arguments), units))
    rows = [row for result in results for row in result]
    failures = [(row, failure) for row in rows for failure in row["failures"]]
    (arguments.output / "gpu_kernels.json").write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1))
    print(*table(rows), sep="\n")
    calls, compiled = sum(row.get("calls", 0) for row in rows), sum("report" in row for row in rows)
    print(
        f"\njax {jax.__version__}: {compiled} kernels compiled in {time.perf_counter() - started:.0f} s,"
        f" {calls - compiled} more calls differ in numbers of rows only; {len(failures)} failures"
    )
    for row, failure in failures:
        print(f"FAILED {row['gpu']} {row['model']} {row['kernel']} {row.get('arrays', '')}: {failure}")
    if not compiled:
        print("FAILED: no kernel was found")
    return 1 if failures or not compiled else 0


if __name__ == "__main__":
    sys.exit(main())
