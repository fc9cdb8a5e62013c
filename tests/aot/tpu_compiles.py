"""Compile every TPU kernel that models of published shapes call, for TPUs that this machine lacks: whether they fit, and no more.

    python tests/aot/tpu_compiles.py [--tpus 7x] [--models mixtral-8x7b] [--tokens 8192] [--minutes 60]

The expert computation is traced forward and backward, as by `tpu_kernels.py`, and each kernel found in it is compiled once, without
the compiler's dumps. That a kernel compiles shows that it fits the vector memory of its chip. What compiled is kept in the
output folder and is not compiled again, so a run can be cut short and taken up later. The exit code is 1 if a kernel
fails; one that there was no time for is listed, but is no failure.
"""

import argparse
import collections
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tpu_children import CHILD_OPTION, Job, Row, rows_of_children, run_as_child
from tpu_counts import digest, versions
from tpu_options import add_run_options, add_selection_options
from tpu_programs import traced_experts

from moe_jax.aot.targets import TpuTarget
from moe_jax.aot.tpu_calls import TpuKernelCall, tpu_kernels


def compiled(target: TpuTarget, call: TpuKernelCall, *, kept: Path, deadline: float) -> dict[str, Any]:
    """That a kernel compiled, now or before.

    Args:
        target: what to compile for.
        call: of the kernel.
        kept: folder in which it is written down.
        deadline: time from which on nothing more is compiled.

    Returns:
        "kernel" and "arrays", "vmem_bytes", "seconds" that the processors were busy with it, and "digest", which is equal
        for kernels that are the same.

    Raises:
        TimeoutError: it would have to be compiled, and the deadline is over.
    """
    name = digest(f"{target} {versions()}", call)
    file = kept / f"{name}.json"
    if file.exists():
        return json.loads(file.read_text())
    if time.time() > deadline:
        raise TimeoutError("no time is left to compile it")
    started = time.process_time()
    call.compile_alone(target)
    found = {
        "kernel": call.name,
        "arrays": call.arrays(),
        "vmem_bytes": call.vmem_bytes(),
        "seconds": round(time.process_time() - started, 1),
        "digest": name,
    }
    kept.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found) + "\n")
    return found


def rows_of(job: Job, _dumps: Path, deadline: float) -> Iterator[Row]:
    """A row for each kernel of a program: what was compiled, why it was not, or that there was no time."""
    target = TpuTarget.named(job["tpu"])
    traced = traced_experts(target, job["model"], job["tokens"], job["program"])
    calls = {digest("", call): call for call in tpu_kernels(traced)}
    for call in calls.values():
        described = {"kernel": call.name, "arrays": call.arrays()}
        try:
            yield compiled(target, call, kept=Path(job["kept"]), deadline=deadline)
        except TimeoutError:
            yield {**described, "left_out": True}
        except Exception as error:  # noqa: BLE001 - whatever jax or the compiler raises is a finding; other kernels go on
            yield {**described, "failure": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}


def rounds(arguments: argparse.Namespace) -> Iterator[list[Job]]:
    """All programs: first those of many tokens, which need most memory, then of few, whose kernels are others, then the rest."""
    falling = sorted(arguments.tokens, reverse=True)
    from_both_ends = dict.fromkeys(itertools.chain.from_iterable(zip(falling, reversed(falling), strict=True)))
    for tokens, program in itertools.product(from_both_ends, reversed(arguments.programs)):
        yield [
            {
                "tpu": tpu,
                "model": model,
                "tokens": tokens,
                "program": program,
                "kept": str(arguments.output / "tpu_compiled"),
            }
            for tpu, model in itertools.product(arguments.tpus, arguments.models)
        ]


def summary(rows: Iterable[Row]) -> Iterator[str]:
    """Lines of text: for each generation how many different kernels compiled, how many failed, and how many were left out."""
    rows = list(rows)
    for tpu in dict.fromkeys(row["tpu"] for row in rows):
        of_tpu = [row for row in rows if row["tpu"] == tpu]
        fitting = {row["digest"]: row for row in of_tpu if "digest" in row}
        counts = collections.Counter(
            "failed" if "failure" in row else "left out" for row in of_tpu if "digest" not in row
        )
        programs = {(row["model"], row["tokens"], row["program"]) for row in of_tpu}
        whole = programs - {(row["model"], row["tokens"], row["program"]) for row in of_tpu if "digest" not in row}
        seconds = [row["seconds"] for row in fitting.values()]
        most = max((row["vmem_bytes"] for row in fitting.values()), default=0)
        yield (
            f"{tpu}: {len(fitting)} kernels compiled, in {sum(seconds):.0f} s of processors, the slowest in"
            f" {max(seconds, default=0):.0f} s, with up to {most / 2**20:.1f} MiB; {counts['failed']} failed,"
            f" {counts['left out']} left out; {len(whole)} of {len(programs)} programs are whole"
        )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_selection_options(parser)
    add_run_options(parser)
    return parser.parse_args(arguments)


def main() -> int:
    """Compile, print, and say whether all is well."""
    if CHILD_OPTION in sys.argv:
        run_as_child(sys.argv[sys.argv.index(CHILD_OPTION) + 1 :], rows_of)
        return 0
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + 60 * arguments.minutes
    rows: list[Row] = []
    for jobs in rounds(arguments):
        rows += rows_of_children(
            __file__,
            jobs,
            processes=arguments.processes,
            minutes=(deadline - time.time()) / 60,
            verbose=arguments.verbose,
            dumps=False,
        )
    result = {"versions": versions(), "command": " ".join(["python", *sys.argv]), "static": True, "rows": rows}
    (arguments.output / "tpu_compiles.json").write_text(json.dumps(result, indent=1) + "\n")
    print(*summary(rows), versions(), sep="\n")
    failures = [row for row in rows if "failure" in row]
    for row in failures:
        print("FAILED", row["tpu"], row["model"], row["tokens"], row["program"], row.get("arrays", ""), row["failure"])
    return 1 if failures or not any("digest" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
