"""Compile the TPU kernels that models of published shapes call, for TPUs that this machine lacks, and report what they execute.

    make aot-tpu                                (two models with 2048 tokens, in .venv-aot; part of make aot)
    python tests/aot/tpu_kernels.py             (a sample: each model once, for one generation and number of tokens)
    python tests/aot/tpu_kernels.py --all       (every kernel of every model, number of tokens and generation: hours)

The expert computation is traced forward and backward; the kernels found in it are those that a user's program would call, with
the tiles that were chosen for them. Each is compiled alone, and if two are the same, once. What the compiled code executes is
then counted for uniform and for Zipf-distributed choices of experts, and so are the bytes that it copies from and to device
memory. All of it is static: it tells no time. What was counted is kept in the output folder and is not counted again, so a run
can be cut short (`--minutes`) and taken up later. A kernel that does not compile, or needs more vector memory than there is, is
a failure, which makes the exit code 1.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tpu_children import CHILD_OPTION, Job, Row, rows_of_children, run_as_child
from tpu_counts import counted, versions
from tpu_options import add_run_options, add_selection_options
from tpu_programs import ROUTINGS, experts_calls, useful_multiplies

from moe_jax.aot.targets import TpuTarget
from moe_jax.aot.tpu_calls import TpuKernelCall


def rows_of(job: Job, dumps: Path, deadline: float) -> Iterator[dict[str, Any]]:
    """A row for each kernel of a program."""
    target, model, tokens = TpuTarget.named(job["tpu"]), job["model"], job["tokens"]
    kernels: dict[str, dict[str, list[TpuKernelCall]]] = {}
    for routing, calls in experts_calls(target, model, tokens, job["program"]).items():
        for call in calls:
            kernels.setdefault(call.sameness(), {}).setdefault(routing, []).append(call)
    for named in kernels.values():
        call = next(iter(named.values()))[0]
        useful = {routing: useful_multiplies(model, tokens, routing, call) for routing in named}
        found = counted(target, named, useful, dumps=dumps, kept=Path(job["kept"]), deadline=deadline)
        yield {"kernel": call.name, "arrays": call.arrays(), **found}


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """All programs, or a sample: every model for one generation and number of tokens, every third one backward too.

    In an order of which the beginning is a sample already.
    """
    tpus, models, tokens = arguments.tpus, arguments.models, arguments.tokens
    for turn, program, number in itertools.product(
        range(len(tokens) * len(tpus) if arguments.all else 1), arguments.programs, range(len(models))
    ):
        if not arguments.all and program != arguments.programs[-1 if number % 3 == 0 else 0]:
            continue
        shift = number + number // len(tpus) + turn % len(tokens)
        yield {
            "tpu": tpus[(number + turn // len(tokens)) % len(tpus)],
            "model": models[number],
            "tokens": tokens[shift % len(tokens)],
            "program": program,
            "kept": str(arguments.output / "tpu_kept"),
        }


HEADINGS = (
    "tpu", "model", "tokens", "program", "kernel", "code", "bundles uniform", "zipf", "occupancy", "zipf", "spills/G",
    "VMEM MiB", "read MiB", "zipf", "written MiB",
)  # fmt: skip


def table(rows: Iterable[Row]) -> Iterator[str]:
    """The rows as lines of text, with headings."""
    cells = [HEADINGS]
    for row in rows:
        texts = tuple(str(row.get(key, "")) for key in ("tpu", "model", "tokens", "program", "kernel"))
        if not {*ROUTINGS} <= row.keys():
            what = "FAILED" if "failure" in row else "left out" if "left_out" in row else "not counted"
            cells.append((*texts, str(row.get("code_bundles", "")), what, *[""] * 8))
            continue
        uniform, zipf = (row[routing] for routing in ROUTINGS)
        mebibytes = [uniform["read_bytes"], zipf["read_bytes"], uniform["written_bytes"]]
        numbers = (row["code_bundles"], uniform["bundles"], zipf["bundles"], uniform["occupancy"], zipf["occupancy"])
        spills = uniform["spills_per_billion_multiplies"]
        sizes = (f"{value / 2**20:.1f}" for value in (row["vmem_bytes"], *mebibytes))
        cells.append((*texts, *map(str, numbers), str(spills), *sizes))
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    for line in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_selection_options(parser)
    parser.add_argument(
        "--all",
        action="store_true",
        help="all programs of the models, tokens and generations named, instead of a sample of them",
    )
    add_run_options(parser)
    return parser.parse_args()


def main() -> int:
    """Compile, print, and say whether all is well."""
    if CHILD_OPTION in sys.argv:
        run_as_child(sys.argv[sys.argv.index(CHILD_OPTION) + 1 :], rows_of)
        return 0
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    rows = rows_of_children(
        __file__,
        jobs(arguments),
        processes=arguments.processes,
        minutes=arguments.minutes,
        verbose=arguments.verbose,
    )
    result = {"versions": versions(), "command": " ".join(["python", *sys.argv]), "static": True, "rows": rows}
    (arguments.output / "tpu_kernels.json").write_text(json.dumps(result, indent=1) + "\n")
    print(*table(rows), sep="\n")
    failures = [row for row in rows if "failure" in row]
    left_out = sum("left_out" in row for row in rows)
    print(f"\n{versions()}: {len(rows) - left_out} rows, {len(failures)} failures, {left_out} programs left out,")
    print(f"in {time.perf_counter() - started:.0f} s")
    for row in failures:
        print("FAILED", row["tpu"], row["model"], row["tokens"], row["program"], row["failure"])
    return 1 if failures or len(rows) == left_out else 0


if __name__ == "__main__":
    sys.exit(main())
