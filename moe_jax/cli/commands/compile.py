"""`moe-jax compile`: compile a model for hardware you don't have, and say what would happen on it."""

import argparse
import dataclasses
import os
from typing import TYPE_CHECKING, Any

from moe_jax.cli import arguments as shared
from moe_jax.cli import exit_codes

if TYPE_CHECKING:
    from moe_jax.aot.compile_report import CompileReport, ProgramReport

SUMMARY = "compile a model for hardware you don't have"
DESCRIPTION = """\
Compile prefill and decode of a model for TPUs or GPUs that you don't have, from its config.json alone: no weight is read or
allocated. Reports whether each program fits into a device's memory, which collectives it runs and how many bytes they move, and
a lower bound on its time from the chip's published peaks. Nothing is measured.

Needs the compilers of the targets: pip install -e '.[aot]' in a clone of the repository.
"""
EXAMPLES = """\
  moe-jax compile examples/demo_model --target v6e:2x2
  moe-jax compile deepseek-ai/DeepSeek-V3 --target v5p:4x4x4 --batch 64
  moe-jax compile MODEL/config.json --target h200:2x8 --mesh expert=16 --json
  moe-jax compile MODEL --target 7x:2x2x1 --strategy ragged_all_to_all --batch 8
  moe-jax compile MODEL --target v5e:4x4 --prompt-length 4096 --cache-length 8192 --dtype bfloat16
"""

# The names of moe_jax.config.DispatchStrategy, and of the implementations of moe_jax.kernels, which are slow to import.
STRATEGIES = ("replicated", "allgather_reducescatter", "padded_all_to_all", "ragged_all_to_all", "remote_dma")
IMPLEMENTATIONS = ("pallas_gpu", "pallas_tpu", "xla")

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}
"""What jax and the compilers read when they are imported; see `moe_jax.aot.targets`. The last two describe the machine that runs
the command, which libtpu otherwise looks for, and complains; they change nothing for the target."""

_ADVICE = "\n--implementation xla compiles the model without kernels of its own."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a config.json, a folder that has one, or a hub id (owner/name), of which only that file is downloaded",
    )
    shared.add_revision(parser)
    parser.add_argument(
        "--target",
        required=True,
        metavar="NAME",
        help="TPU slice (v6e:16x16, v5p:4x4x4, 7x:2x2x1 ...) or hosts x GPUs per host (h200:2x8 ...); without a shape, the "
        "smallest slice, or one GPU",
    )
    sizes = parser.add_argument_group("what is generated")
    sizes.add_argument(
        "--batch", type=shared.positive_int, default=8, metavar="N", help="number of prompts (default: 8)"
    )
    sizes.add_argument(
        "--prompt-length",
        type=shared.positive_int,
        default=1024,
        metavar="N",
        help="tokens of each prompt (default: 1024)",
    )
    sizes.add_argument(
        "--cache-length",
        type=shared.positive_int,
        metavar="N",
        help="tokens of each prompt that the cache has room for, new ones included (default: twice --prompt-length)",
    )
    spread = parser.add_argument_group("how it is spread")
    spread.add_argument(
        "--mesh",
        metavar="AXES",
        help="size of each axis, as in data=2,expert=16,tensor=2 (default: the smallest tensor axis that fits)",
    )
    spread.add_argument(
        "--strategy",
        choices=STRATEGIES,
        metavar="NAME",
        help=f"how tokens reach their experts: {', '.join(STRATEGIES)}; all but the first also split the batch over the expert "
        "axis (default: the strategy that moves the fewest rows, with the batch split over data only)",
    )
    spread.add_argument(
        "--implementation",
        choices=IMPLEMENTATIONS,
        help="how experts are computed (default: what the target would choose)",
    )
    parser.add_argument(
        "--dtype",
        choices=shared.DTYPES,
        help="dtype of the model (default: that of config.json, or bfloat16)",
    )
    shared.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compile; returns the exit status."""
    os.environ.update(ENVIRONMENT)

    # What is slow to import, and reads the environment.
    import jax.numpy as jnp
    from jax.errors import JaxRuntimeError

    from moe_jax.aot.compile_report import report
    from moe_jax.aot.mesh_choice import choose_mesh, parallel_for, parse_mesh
    from moe_jax.aot.model_programs import abstract_model, compile_generation, target_mesh
    from moe_jax.aot.sizes import Sizes
    from moe_jax.aot.targets import UnfitEnvironmentError, target_named
    from moe_jax.checkpoints import describe, resolve_config
    from moe_jax.checkpoints.dtypes import named_dtype
    from moe_jax.cli.output import print_json, remark
    from moe_jax.json_files import read_json_object
    from moe_jax.parallel import written_axes

    target = target_named(arguments.target)
    if arguments.implementation not in (None, "xla", f"pallas_{target.device.platform}"):
        raise ValueError(
            f"--implementation {arguments.implementation} cannot be compiled for {target.name}; legal are "
            f"pallas_{target.device.platform} and xla"
        )
    sizes = Sizes(
        batch_size=arguments.batch,
        prompt_length=arguments.prompt_length,
        cache_length=arguments.cache_length or 2 * arguments.prompt_length,
    )
    file = resolve_config(arguments.model, arguments.revision)
    config = read_json_object(file)
    _, decoder = describe(config, file)
    dtype = jnp.dtype(arguments.dtype) if arguments.dtype else named_dtype(config, file)
    try:
        devices = len(target.topology().devices)
    except UnfitEnvironmentError as error:
        raise ValueError(
            f"{error}; or everything it needs: pip install -e '.[aot]' in a clone of the repository"
        ) from error
    if arguments.mesh:
        positions, reason = parse_mesh(arguments.mesh, devices), None
    else:
        positions, reason = choose_mesh(
            decoder,
            devices,
            sizes=sizes.padded(),
            itemsize=dtype.itemsize,
            memory_bytes=target.device.memory_bytes,
            strategy=arguments.strategy,
        )
    mesh = target_mesh(target, positions)
    with target.lowering():
        model = abstract_model(
            decoder,
            dtype=dtype,
            mesh=mesh,
            parallel=parallel_for(mesh, arguments.strategy),
            implementation=arguments.implementation,
        )
    remark(f"{devices} device{'s' * (devices > 1)} of {target.name} as {written_axes(positions)}")
    try:
        programs = compile_generation(
            model, target, sizes, on_start=lambda name: remark(f"compiling {name}, which can take minutes")
        )
    except JaxRuntimeError as error:
        reason = str(error).strip()
        raise ValueError(f"the compiler of {target.name} refused the program: {reason}{_ADVICE}") from error
    result = report(model, target, sizes, positions, programs, mesh_reason=reason)
    if arguments.json:
        print_json({"model": arguments.model, **as_json(result)})
    else:
        print_report(arguments.model, result)
    return exit_codes.SUCCESS if result.fits else exit_codes.CHECK_FAILED


def as_json(result: "CompileReport") -> dict[str, Any]:
    """Everything that is known, with what the classes work out."""
    document: dict[str, Any] = {**dataclasses.asdict(result), "fits": result.fits}
    for program, values in zip(result.programs, document["programs"], strict=True):
        if program.roofline is not None:
            values["roofline"] |= {"seconds": program.roofline.seconds, "limit": program.roofline.limit}
    return document


def print_report(model: str, result: "CompileReport") -> None:
    """Print a report as text."""
    from moe_jax.cli.output import format_bytes, print_facts, print_table, stdout_console
    from moe_jax.parallel import written_axes

    sizes = result.sizes
    print_facts(
        f"{model} on {result.target}",
        [
            ("devices", f"{result.devices}, as {written_axes(result.mesh)}"),
            ("mesh", result.mesh_reason or "as asked for"),
            (
                "sizes",
                f"batch {sizes.batch_size}, prompt {sizes.prompt_length}, cache {sizes.cache_length}, {result.dtype}",
            ),
            ("weights", f"{format_bytes(result.parameter_bytes)} per device"),
            ("cache", f"{format_bytes(result.cache_bytes)} per device"),
            ("verdict", "fits" if result.fits else "DOES NOT FIT"),
        ],
    )
    print_table("Each device", ["", *map(_title, result.programs)], _program_rows(result.programs))
    for program in result.programs:
        if program.memory is None:
            continue
        print_table(f"Collectives of {_title(program)}", *_collective_table(program))
    if result.warnings:
        console = stdout_console()
        console.print("\nRemarks", style="bold")
        for warning in result.warnings:
            console.print(f"- {warning}", markup=False, soft_wrap=True)
    print(
        "\nNothing was measured: memory and collectives are the compiler's plan, work and times are counted from shapes."
    )


def _title(program: "ProgramReport") -> str:
    return "prefill" if program.name == "prefill" else "decode, per token"


def _program_rows(programs: "tuple[ProgramReport, ...]") -> list[list[str]]:
    """One row per fact, one column per program."""
    from moe_jax.cli.output import format_bytes

    def memory(name: str) -> list[str]:
        return ["-" if one.memory is None else format_bytes(getattr(one.memory, name)) for one in programs]

    def least(name: str) -> list[str]:
        return ["-" if one.roofline is None else _time(getattr(one.roofline, name)) for one in programs]

    return [
        ["memory needed", *(f"{format_bytes(one.needed_bytes)}{'' if one.fits else ', too much'}" for one in programs)],
        ["  of", *(format_bytes(one.available_bytes) for one in programs)],
        ["  weights, cache and inputs", *memory("argument_bytes")],
        ["  results", *memory("output_bytes")],
        ["  temporary", *memory("temporary_bytes")],
        ["  program", *memory("code_bytes")],
        ["matrix products (analytic)", *(_flop(one.work.flops) for one in programs)],
        ["  whole model (analytic)", *(_flop(one.model_flops) for one in programs)],
        ["weights read (analytic)", *(format_bytes(one.work.weight_bytes) for one in programs)],
        ["cache read and written (analytic)", *(format_bytes(one.work.cache_bytes) for one in programs)],
        ["least time, products", *least("compute_seconds")],
        ["least time, memory", *least("memory_seconds")],
        ["least time, links", *least("links_seconds")],
        ["at least", *("-" if one.roofline is None else _bound(one) for one in programs)],
        [
            "sent between hosts",
            *("-" if one.roofline is None else format_bytes(one.roofline.network_bytes) for one in programs),
        ],
    ]


def _bound(program: "ProgramReport") -> str:
    roofline = program.roofline
    return "-" if roofline is None else f"{_time(roofline.seconds)}, by {roofline.limit}"


def _flop(count: float) -> str:
    for unit, size in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 1e6:,.2f} MFLOP"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "no peak known"
    return f"{seconds * 1e3:,.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.2f} µs"


def _collective_table(program: "ProgramReport") -> tuple[list[str], list[list[Any]]]:
    from moe_jax.cli.output import format_bytes

    columns = ["kind", "each device gives", "devices", "times", "in all", "meanwhile"]
    if program.name == "decode":
        columns.append("per")
    rows: list[list[Any]] = []
    for row in program.collectives:
        devices = f"{row.group_size}, hosts" if row.between_hosts else str(row.group_size)
        overlap = f"{row.overlapped_by} run" if row.is_async else "waits"
        values = [row.kind, " ".join(row.operands), devices, row.executions, format_bytes(row.total_bytes), overlap]
        rows.append(values if program.name == "prefill" else [*values, "token" if row.in_loop else "call"])
    return columns, rows
