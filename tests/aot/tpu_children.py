"""Compile in processes of their own, one per TPU generation: what the compiler dumps, and where, is decided when it is loaded."""

import concurrent.futures
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_jax.aot.bundles import DUMP_VARIABLE, dump_flags
from moe_jax.aot.targets import TPU_ENVIRONMENT

Job = dict[str, Any]
"""What to compile, as JSON: "tpu" names a target, the rest is the script's own."""
Row = dict[str, Any]
CHILD_OPTION = "--child"


def rows_of_children(
    script: str, jobs: Iterable[Job], *, processes: int, minutes: float, verbose: bool, dumps: bool = True
) -> list[Row]:
    """What `script`, started with `CHILD_OPTION`, makes of all jobs.

    With `dumps`, the compiler writes down its schedules, which takes most of the time that it then needs.
    A job whose process dies has a row with "failure"; one that needs to compile after `minutes` has one with "left_out".
    """
    ordered = sorted(jobs, key=lambda job: job["tpu"])
    by_tpu = [list(group) for _, group in itertools.groupby(ordered, key=lambda job: job["tpu"])]
    deadline = time.time() + 60 * minutes

    def run(jobs: list[Job]) -> list[Row]:
        return list(_rows_of_one_tpu(script, jobs, deadline, verbose, dumps))

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        return [row for rows in pool.map(run, by_tpu) for row in rows]


def _rows_of_one_tpu(script: str, jobs: list[Job], deadline: float, verbose: bool, dumps: bool) -> Iterator[Row]:
    while jobs:
        folder = Path(tempfile.mkdtemp(prefix="tpu-dumps-"))
        environment = {**os.environ, **TPU_ENVIRONMENT, **({DUMP_VARIABLE: dump_flags(folder)} if dumps else {})}
        command = [sys.executable, script, CHILD_OPTION, str(folder), str(deadline)]
        done = 0
        with tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(
                command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                child.stdin.write(json.dumps(jobs))
                child.stdin.close()
                for line in child.stdout:
                    if line.startswith("ROW "):
                        row = json.loads(line.removeprefix("ROW "))
                        if verbose:
                            print(*(f"{key}={value}" for key, value in row.items()), flush=True)
                        yield row
                    done += line.startswith("DONE")
                child.wait()
            finally:
                child.kill()
                shutil.rmtree(folder, ignore_errors=True)
            if child.returncode == 0:
                return
            errors.seek(0)
            yield {**jobs[done], "failure": f"exit code {child.returncode}: {errors.read()[-1000:]}"}
        jobs = jobs[done + 1 :]


def run_as_child(arguments: list[str], rows_of: Callable[[Job, Path, float], Iterable[Row]]) -> None:
    """Print the rows of the jobs that are read as JSON: the other side of `rows_of_children`.

    Args:
        arguments: what follows `CHILD_OPTION`.
        rows_of: compiles a job, with the folder into which the compiler dumps, and the time from which on it must not;
            raises TimeoutError then.
    """
    folder, deadline = Path(arguments[0]), float(arguments[1])
    for job in json.load(sys.stdin):
        try:
            for row in rows_of(job, folder, deadline):
                print("ROW", json.dumps({**job, **row}), flush=True)
        except TimeoutError:
            print("ROW", json.dumps({**job, "left_out": True}), flush=True)
        except Exception as error:  # noqa: BLE001 - whatever jax or the compiler raises is a finding, listed with the others
            print("ROW", json.dumps({**job, "failure": f"{type(error).__name__}: {str(error)[:600]}"}), flush=True)
        print("DONE", flush=True)
