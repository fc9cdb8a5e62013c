"""Several processes of one job on this machine, each with a few CPU devices of its own."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from support.xla_flags import xla_flags

TESTS = Path(__file__).parents[1]


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """The environment of a process with this many CPU devices, in which test modules can be imported."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
        "PYTHONPATH": os.pathsep.join(paths),
    }


@contextlib.contextmanager
def started(
    command: Sequence[str], *, count: int, devices: int, folder: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """`count` processes of `python command`, in which {count}, {number} and {coordinator} are filled in.

    What process i prints goes to `folder/out.i` and `folder/err.i`. Those still running at the end are killed.
    """
    coordinator = f"localhost:{free_port()}"
    processes = []
    try:
        for number in range(count):
            filled = [part.format(count=count, number=number, coordinator=coordinator) for part in command]
            with open(folder / f"out.{number}", "wb") as out, open(folder / f"err.{number}", "wb") as err:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *filled], stdout=out, stderr=err, env=environment(devices), cwd=folder
                    )
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(command: Sequence[str], *, count: int, devices: int, folder: Path, timeout: float) -> list[str]:
    """What each process printed on standard output; an assertion fails with its errors if one fails."""
    with started(command, count=count, devices=devices, folder=folder) as processes:
        for number, process in enumerate(processes):
            status = process.wait(timeout)
            assert status == 0, f"process {number} ended with {status}:\n{(folder / f'err.{number}').read_text()}"
    return [(folder / f"out.{number}").read_text() for number in range(count)]
